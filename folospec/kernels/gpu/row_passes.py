"""Launches the passes over parts of rows that every draw begins with; see `gpu.draw`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from folospec.kernels.gpu import launch
from folospec.kernels.gpu.draw import scan_kernel, weigh_kernel
from folospec.kernels.gpu.filters import narrow_kernel, select_kernel
from folospec.kernels.gpu.sampling_arrays import DRAW

NUM_WARPS = 8


class Kept(NamedTuple):
    """What filters keep of a few rows, see `gpu.filters`."""

    candidates: Tensor
    counts: Tensor
    lasts: Tensor
    totals: Tensor


class Chunk(NamedTuple):
    """Some draws that come one after the other, and what is known of their rows before they are
    drawn; see the kernels."""

    rows: slice
    draws: Tensor
    peaks: Tensor
    firsts: Tensor
    roughs: Tensor
    sums: Tensor
    totals: Tensor
    kept: Kept


class RowPasses:
    """The draws of a step, and what is found out about their rows.

    Args:
        logits: float32 [num_rows, vocab_size].
        all_params: int64 [6 * num_params].
        draws: int64 [4 * num_draws].
        part: tokens of the vocabulary that one program works on, a power of two; None: by the
            vocabulary.
        filters: whether any parameter set has some.
        children: whether what is drawn are children of draft nodes.
        advance: added to the positions of the draws.
    """

    def __init__(
        self,
        logits: Tensor,
        all_params: Tensor,
        draws: Tensor,
        part: int | None,
        *,
        filters: bool,
        children: bool = False,
        advance: int = 0,
    ) -> None:
        self.logits, self.all_params, self.draws = logits, all_params, draws.view(-1, DRAW)
        self.num_draws, self.vocab = len(self.draws), logits.shape[1]
        self.filters, self.children, self.advance = filters, children, advance
        if part is None:
            # About 32 parts, as far as they are of a good size: a row keeps many processors busy.
            part = min(4096, max(256, triton.next_power_of_2(triton.cdiv(self.vocab, 32))))
        self.num_parts = triton.cdiv(self.vocab, part)
        parts = triton.next_power_of_2(self.num_parts)
        self._constants = {
            "PART": part,
            "PARTS": parts,
            "TILE": max(1, min(part, 2048 // parts)),
            "BITS": 62 - self.vocab.bit_length(),  # the sum of a row's weights fits 62 bits
            "ID_BITS": self.vocab.bit_length(),
            "FILTERS": filters,
            "CHILDREN": children,
        }

    def launch(self, kernel: Any, grid: Sequence[int], *args: Any) -> None:
        """Launch a kernel that begins with the rows and parameter sets, and ends with the number of
        parts."""
        inputs = (self.logits, self.logits.stride(0), self.vocab, self.all_params)
        self._launch(kernel, grid, *inputs, *args)

    def _launch(self, kernel: Any, grid: Sequence[int], *args: Any) -> None:
        wanted = {k: v for k, v in self._constants.items() if k in kernel.arg_names}
        launch.launch(kernel, grid, *args, self.num_parts, **wanted, num_warps=NUM_WARPS)

    def chunks(self, filtered_rows: int) -> Iterator[Chunk]:
        """All draws; where there are filters `filtered_rows` at a time, and what those keep is to
        be used before the next chunk is asked for. Without filters nothing of it is ever read."""
        shape, device = (self.num_draws, self.num_parts), self.logits.device
        peaks, roughs, sums = torch.empty((3, *shape), dtype=torch.float32, device=device)
        firsts = torch.empty(shape, dtype=torch.int32, device=device)
        found = (peaks, firsts, roughs, sums)
        self.launch(scan_kernel, shape, self.draws, self.advance, *found)
        totals = torch.empty(shape, dtype=torch.int64, device=device)
        if self.filters or not self.children:
            self.launch(weigh_kernel, shape, self.draws, peaks, totals)
        kept = self._room(min(self.num_draws, filtered_rows) if self.filters else 0)
        step = filtered_rows if self.filters else max(self.num_draws, 1)
        for begin in range(0, self.num_draws, step):
            rows = slice(begin, min(begin + step, self.num_draws))
            known = (self.draws[rows], peaks[rows], firsts[rows], roughs[rows], sums[rows])
            chunk = Chunk(rows, *known, totals[rows], kept)
            if self.filters:
                self._filter(chunk)
            yield chunk

    def _room(self, num_rows: int) -> Kept:
        shape, device = (num_rows, self.num_parts), self.logits.device
        candidates = (*shape, self._constants["PART"])
        return Kept(
            torch.empty(candidates, dtype=torch.int64, device=device),
            torch.empty(shape, dtype=torch.int32, device=device),
            torch.empty(num_rows, dtype=torch.int64, device=device),
            torch.empty(num_rows, dtype=torch.int64, device=device),
        )

    def _filter(self, chunk: Chunk) -> None:
        of_rows, size = (chunk.draws, chunk.peaks, chunk.totals), len(chunk.draws)
        candidates, counts, *_ = chunk.kept
        self.launch(narrow_kernel, (size, self.num_parts), *of_rows, candidates, counts)
        self._launch(select_kernel, (size,), self.vocab, self.all_params, *of_rows, *chunk.kept)
