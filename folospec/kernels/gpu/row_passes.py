"""The passes over parts of rows that every draw begins with, as launches: see `gpu.draw`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

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


class RowPasses:
    """The draws of a step, and what is found out about their rows.

    Args:
        logits: float32 [num_rows, vocab_size].
        laws: int64 [6 * num_laws].
        draws: int64 [4 * num_draws].
        part: tokens of the vocabulary that one program works on, a power of two.
    """

    def __init__(self, logits: Tensor, laws: Tensor, draws: Tensor, part: int) -> None:
        self.logits, self.laws, self.draws = logits, laws, draws.view(-1, DRAW)
        self.num_draws, self.vocab = len(self.draws), logits.shape[1]
        self.num_parts = triton.cdiv(self.vocab, part)
        parts = triton.next_power_of_2(self.num_parts)
        self._constants = {
            "PART": part,
            "PARTS": parts,
            "TILE": max(1, min(part, 2048 // parts)),
            "BITS": 62 - self.vocab.bit_length(),  # the sum of a row's weights fits 62 bits
            "ID_BITS": self.vocab.bit_length(),
        }

    @property
    def inputs(self) -> tuple[Tensor, int, int, Tensor]:
        """What every kernel begins with."""
        return self.logits, self.logits.stride(0), self.vocab, self.laws

    def constants(self, names: str) -> dict[str, int]:
        """Those constants of a kernel that are named, and how many warps run it."""
        return {name: self._constants[name] for name in names.split()} | {"num_warps": NUM_WARPS}

    def scan(self, advance: int, *, children: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Peaks, their first ids, the best rough scores, and for children the sums."""
        shape, device = (self.num_draws, self.num_parts), self.logits.device
        peaks, roughs, sums = torch.empty((3, *shape), dtype=torch.float32, device=device)
        firsts = torch.empty(shape, dtype=torch.int32, device=device)
        launch.launch(
            scan_kernel,
            shape,
            *(*self.inputs, self.draws, advance, peaks, firsts, roughs, sums, self.num_parts),
            CHILDREN=children,
            **self.constants("PART"),
        )
        return peaks, firsts, roughs, sums

    def weigh(self, peaks: Tensor) -> Tensor:
        """The sums of weights before any filter, int64 [num_draws, num_parts]."""
        totals = torch.empty_like(peaks, dtype=torch.int64)
        launch.launch(
            weigh_kernel,
            (self.num_draws, self.num_parts),
            *(*self.inputs, self.draws, peaks, totals, self.num_parts),
            **self.constants("PART PARTS BITS"),
        )
        return totals

    def filter(
        self, peaks: Tensor, totals: Tensor, *, on: bool, chunk: int
    ) -> Iterator[tuple[slice, Kept]]:
        """Draws, a chunk at a time, each with what filters keep; that is to be used before the next
        chunk is asked for. Where filters are not `on` there is one chunk, and nothing of it is ever
        read."""
        count = min(self.num_draws, chunk) if on else 0
        parts, device = (count, self.num_parts), peaks.device
        shape = (*parts, self._constants["PART"])
        candidates = torch.empty(shape, dtype=torch.int64, device=device)
        counts = torch.empty(parts, dtype=torch.int32, device=device)
        lasts, kept_totals = torch.empty((2, count), dtype=torch.int64, device=device)
        kept = Kept(candidates, counts, lasts, kept_totals)
        if not on:
            yield slice(0, self.num_draws), kept
            return
        for begin in range(0, self.num_draws, count):
            rows = slice(begin, min(begin + count, self.num_draws))
            size, of_rows = rows.stop - begin, (self.draws[rows], peaks[rows], totals[rows])
            launch.launch(
                narrow_kernel,
                (size, self.num_parts),
                *(*self.inputs, *of_rows, candidates, counts, self.num_parts),
                **self.constants("PART PARTS BITS ID_BITS"),
            )
            launch.launch(
                select_kernel,
                (size,),
                *(self.vocab, self.laws, *of_rows, *kept, self.num_parts),
                **self.constants("PART PARTS TILE BITS ID_BITS"),
            )
            yield rows, kept
