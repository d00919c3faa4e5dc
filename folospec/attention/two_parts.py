"""Computes attention with paged kernels of other libraries, which know no trees.

Their one mask is the causal one, its corner at the last row and the last key. A chunk or chain
needs no other; a tree's rows all see the context, and the tree is seen by our own kernel:

    rows                       the library's kernel               the Triton kernel
    chunk, chain, decode       context and rows, causal
    tree                       context, no mask                   rows, the tree's mask
                                        └── merged by log-sum-exp ──┘

What else the library cannot do, a sliding window that ends at another place for every row of a tree
for one, the Triton kernel does alone.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from folospec.attention import paged_rows
from folospec.attention.base import BLOCK_STEPS, LayerKV
from folospec.attention.merge import merge
from folospec.attention.metadata import AttentionMetadata, find_slots, starts
from folospec.attention.paged import PagedBackend
from folospec.attention.triton_paged import TritonAttention

DTYPES = (torch.float16, torch.bfloat16)


class Scoring(NamedTuple):
    """How scores are made; see `AttentionBackend.forward`."""

    scale: float
    sliding_window: int | None
    softcap: float | None


@dataclass(slots=True)
class Part:
    """The sequences of a step that one call runs: B of them, R rows."""

    metadata: AttentionMetadata
    """Of these sequences alone."""
    rows: Tensor
    """int64 [R]: which rows of the step they are."""
    num_rows: NDArray[np.int32]
    """[B], on the host."""
    num_keys: NDArray[np.int32]
    """[B], on the host: the keys that the call may read, found through the block table."""
    row_starts: Tensor
    """int32 [B + 1]"""
    key_starts: Tensor
    """int32 [B + 1]: as if the keys of all sequences lay one after the other."""
    key_lens: Tensor
    """int32 [B]"""
    block_table: Tensor
    """int32 [B, max_blocks]"""
    kept: Any = None
    """What a library makes of the part, for all layers."""

    @property
    def common_rows(self) -> int | None:
        """How many rows each sequence has, if all have as many."""
        first = int(self.num_rows[0])
        return first if (self.num_rows == first).all() else None


class TwoPartBackend(PagedBackend):
    """Raises ImportError or RuntimeError where it cannot run.

    No bits are promised: libraries split long contexts by the shape of the batch, and a token's
    ancestors count as context in one step and as a tree's rows in another.
    """

    converts_kv = False

    def __init__(self) -> None:
        self.triton = TritonAttention()
        self.devices = self.triton.devices

    def supports(self, dtype: torch.dtype, head_size: int, block_size: int) -> str | None:
        """float16 and bfloat16, head sizes of both kernels, multiples of the library's pages."""
        if dtype not in DTYPES:
            return f"dtype must be float16 or bfloat16, got {dtype}"
        if reason := self._refused_head_size(head_size):
            return reason
        step = BLOCK_STEPS[self.name]
        if block_size % step:
            better = -(-block_size // step) * step
            return (
                f"block_size must be a multiple of {step}, got {block_size}; "
                f"block_size={better} would do"
            )
        return self.triton.supports(dtype, head_size, block_size)

    def attend(
        self,
        query: Tensor,
        kv: LayerKV,
        metadata: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """See `PagedBackend.attend`.

        Raises:
            ValueError: the KV is of another type than the query.
        """
        if kv.key.dtype != query.dtype:
            raise ValueError(
                f"attention_backend {self.name!r} needs KV of the model's type {query.dtype}, got "
                f"{kv.key.dtype}; leave kv_cache_dtype at 'auto'"
            )
        scoring = Scoring(scale, sliding_window, softcap)
        if not self._knows(scoring):
            return self.triton.attend(query, kv, metadata, **scoring._asdict())
        joined, apart = self._parts(metadata)
        runs = ((joined, self._joined), (apart, self._apart))
        parts = [(part, run) for part, run in runs if part is not None]
        if len(parts) == 1:
            part, run = parts[0]
            return run(query, kv, part, scoring)
        out = torch.empty_like(query)
        for part, run in parts:
            out[part.rows] = run(query[part.rows], kv, part, scoring)
        return out

    def _parts(self, metadata: AttentionMetadata) -> tuple[Part | None, Part | None]:
        """The sequences that are run by one causal call, and those whose suffix is seen apart."""
        found: Any = metadata.plan.get(self.name)
        if found is None:
            is_joined = lies_in_order(metadata)
            is_joined &= self._joinable(np.diff(metadata.query_start_loc), is_joined)
            found = metadata.plan[self.name] = (
                take(metadata, is_joined, with_suffix=True),
                take(metadata, ~is_joined, with_suffix=False),
            )
        return found

    def _apart(self, query: Tensor, kv: LayerKV, part: Part, scoring: Scoring) -> Tensor:
        """Context and suffix, merged."""
        from folospec.kernels.gpu import attention

        metadata = part.metadata
        if scoring.sliding_window is not None:
            return self.triton.attend(query, kv, metadata, **scoring._asdict())
        fold = query.shape[1] // kv.key.shape[1]
        size = self.triton.rows_per_tile(len(query), metadata.num_seqs, fold)
        rows = paged_rows.on_device(metadata, query.device, rows_per_tile=size)
        own, own_lse = attention.attend_suffix(
            query, kv, rows, metadata.positions, scale=scoring.scale, softcap=scoring.softcap
        )
        if not part.num_keys.any():
            return own.to(query.dtype)
        seen, seen_lse = self._context(query, kv, part, scoring)
        return merge(seen, seen_lse, own, own_lse).to(query.dtype)

    @abstractmethod
    def _refused_head_size(self, head_size: int) -> str | None:
        """Say why the library's kernel cannot take such heads; None if it can."""

    def _knows(self, scoring: Scoring) -> bool:
        """Whether the library's kernel can make such scores."""
        return True

    def _joinable(
        self, num_rows: NDArray[np.int32], candidates: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Which of the candidates one causal call can run: bool [num_seqs]."""
        return candidates

    @abstractmethod
    def _joined(self, query: Tensor, kv: LayerKV, part: Part, scoring: Scoring) -> Tensor:
        """Causal attention, the last row of a sequence at its last key: [R, heads, size], of the
        query's type."""

    @abstractmethod
    def _context(
        self, query: Tensor, kv: LayerKV, part: Part, scoring: Scoring
    ) -> tuple[Tensor, Tensor]:
        """Attention of every row over its sequence's keys, without a window: [R, heads, size], and
        its log-sum-exp [R, heads], -inf without keys."""


def lies_in_order(metadata: AttentionMetadata) -> NDArray[np.bool_]:
    """Which sequences are chunks or chains whose suffix lies where the block table has the tokens
    behind the context: bool [num_seqs]."""
    suffix_starts, table = metadata.suffix_start_loc, metadata.block_table
    seqs = np.repeat(np.arange(metadata.num_seqs), np.diff(suffix_starts))
    indices = np.arange(len(seqs)) + (metadata.context_lens - suffix_starts[:-1])[seqs]
    in_table = indices < table.shape[1] * metadata.block_size
    slots = find_slots(table, seqs, np.where(in_table, indices, 0), metadata.block_size)
    in_place = in_table & (slots == metadata.suffix_slots)
    is_chain = np.array([mask is None for mask in metadata.suffix_masks])
    return is_chain & np.logical_and.reduceat(in_place, suffix_starts[:-1])


def take(
    metadata: AttentionMetadata, wanted: NDArray[np.bool_], *, with_suffix: bool
) -> Part | None:
    """The wanted sequences as a part, None if there are none.

    Args:
        with_suffix: the call reads context and suffix through the block table, else the context.
    """
    if not wanted.any():
        return None
    device = metadata.positions.device
    rows = torch.from_numpy(np.flatnonzero(_spread(metadata.query_start_loc, wanted))).to(device)
    if not wanted.all():
        metadata = _subset(metadata, wanted, rows)
    num_keys = metadata.context_lens
    if with_suffix:
        num_keys = num_keys + np.diff(metadata.suffix_start_loc)
    arrays = (metadata.query_start_loc, starts(num_keys.tolist()), num_keys, metadata.block_table)
    row_starts, key_starts, key_lens, table = (
        torch.tensor(array, dtype=torch.int32, device=device) for array in arrays
    )
    return Part(
        metadata,
        rows,
        np.diff(metadata.query_start_loc),
        num_keys,
        row_starts,
        key_starts,
        key_lens,
        table,
    )


def _subset(
    metadata: AttentionMetadata, wanted: NDArray[np.bool_], rows: Tensor
) -> AttentionMetadata:
    keys = _spread(metadata.suffix_start_loc, wanted)
    return AttentionMetadata(
        query_start_loc=starts(np.diff(metadata.query_start_loc)[wanted].tolist()),
        context_lens=metadata.context_lens[wanted],
        block_table=metadata.block_table[wanted],
        block_size=metadata.block_size,
        positions=metadata.positions[rows],
        slot_mapping=metadata.slot_mapping[rows],
        suffix_start_loc=starts(np.diff(metadata.suffix_start_loc)[wanted].tolist()),
        suffix_slots=metadata.suffix_slots[keys],
        suffix_positions=metadata.suffix_positions[keys],
        suffix_masks=list(compress(metadata.suffix_masks, wanted)),
    )


def _spread(part_starts: NDArray[np.int32], wanted: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What holds of a part, for each of its elements."""
    return np.repeat(wanted, np.diff(part_starts))
