"""Computes attention with the native CPU kernels, which read pages in place in logical order.

A row's bits depend on its keys alone, so that a token's logits are the same decoded alone, verified
in a tree or computed in a chunk (`kernels/cpu/attention.h`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from folospec.attention.base import AttentionBackend, LayerKV
from folospec.attention.metadata import AttentionMetadata
from folospec.kernels import native
from folospec.kernels.checked import (
    array_pointer,
    array_pointers,
    check_all_ids,
    id_pointer,
    pointer,
)

MAX_HEAD_SIZE = 256
HEAD_STEP = 32
MAX_QUERIES = 32
"""Query heads times rows that share the loading of keys: what one unit of work has room for."""
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(slots=True)
class StepPlan:
    """Where every row of a step finds its keys; one per step, for all layers. The arrays are those
    of `AttentionStep` in `kernels/cpu/attention.h`."""

    row_seq: NDArray[np.int32]
    num_keys: NDArray[np.int32]
    context_lens: NDArray[np.int32]
    block_table: NDArray[np.int32]
    tail_start: NDArray[np.int64]
    tail_slots: NDArray[np.int64]
    group_starts: dict[int, NDArray[np.int32]]
    """By the number of rows that a group may have."""
    first_keys: dict[int, NDArray[np.int32]]
    """By window: the first key that each row sees."""
    steps: dict[tuple[Any, ...], native.AttentionStep]
    """By what a layer asks: the plan as the kernels read it."""

    def advance(self) -> None:
        """Follow `AttentionMetadata.advance`: what the plan shares with it has moved on already."""
        self.num_keys += 1
        for window, first in self.first_keys.items():
            np.maximum(self.num_keys - window, 0, out=first)


class NativeAttention(AttentionBackend):
    """Raises RuntimeError where the native kernels do not run."""

    name = "native"
    devices = ("cpu",)
    deterministic = True

    def __init__(self) -> None:
        library = native.load()
        if library is None:
            raise RuntimeError(native.why_not())
        self.library = library

    def supports(self, dtype: torch.dtype, head_size: int, block_size: int) -> str | None:
        """float32 and bfloat16, head sizes in steps of 32."""
        return _why_not(dtype, head_size)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv: LayerKV,
        metadata: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """See `AttentionBackend.forward`."""
        rows, heads, size = len(metadata.positions), query.shape[1], kv.key.shape[-1]
        step = describe(metadata, heads, kv, scale=scale, window=sliding_window, softcap=softcap)
        pages = find_pages(kv, kv.key.shape, kv.key.dtype)
        wide = [tensor.float().contiguous() for tensor in (query, key, value)]
        out = native.floats(rows, heads, size)
        widths = (heads, step.kv_heads, step.kv_heads)
        self.library.attention(
            ctypes.byref(step),
            ctypes.byref(pages),
            *(
                pointer(name, tensor, torch.float32, (rows, width, size))
                for name, tensor, width in zip(("query", "key", "value"), wide, widths, strict=True)
            ),
            find_slots(metadata, len(kv.key)),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out.to(query.dtype)


def describe(
    metadata: AttentionMetadata,
    num_heads: int,
    kv: LayerKV,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> native.AttentionStep:
    """The step as the kernels read it. It points into `metadata`'s plan, which must outlive it.

    Raises:
        ValueError: the kernels do not run such heads, or the step reads KV that is not there.
    """
    plan = plan_step(metadata)
    asked = (num_heads, kv.key.shape, scale, window, softcap, kv.key.dtype)
    step = plan.steps.get(asked)
    if step is None:
        num_slots, kv_heads, head_size = kv.key.shape
        if reason := _why_not(kv.key.dtype, head_size):
            raise ValueError(reason)
        if not 0 < kv_heads <= num_heads or num_heads % kv_heads:
            raise ValueError(f"{num_heads} heads cannot share {kv_heads} of the KV")
        _check(plan, metadata, num_slots)
        rows, (seqs, width) = len(plan.row_seq), plan.block_table.shape
        groups = group_start(plan, max(1, MAX_QUERIES // (num_heads // kv_heads)))
        first = None if window is None else first_keys(plan, window)
        row_seq, num_keys, *others = array_pointers(
            ("row_seq", plan.row_seq, np.int32, (rows,)),
            ("num_keys", plan.num_keys, np.int32, (rows,)),
            ("context_lens", plan.context_lens, np.int32, (seqs,)),
            ("block_table", plan.block_table, np.int32, (seqs, width)),
            ("tail_start", plan.tail_start, np.int64, (rows,)),
            ("tail_slots", plan.tail_slots, np.int64, (None,)),
            ("groups", groups, np.int32, (None,)),
        )
        step = plan.steps[asked] = native.AttentionStep(
            rows,
            num_heads,
            kv_heads,
            head_size,
            metadata.block_size,
            width,
            row_seq,
            num_keys,
            None if first is None else array_pointer("first_keys", first, np.int32, (rows,)),
            *others,
            len(groups) - 1,
            scale,
            softcap or 0.0,
            native.FORMATS[kv.key.dtype],
        )
    return step


def find_pages(kv: LayerKV, shape: Sequence[int], dtype: torch.dtype) -> native.Pages:
    """Where a layer's KV lies.

    Raises:
        ValueError: keys or values are not of this shape and type, or not contiguous on the CPU.
    """
    return native.Pages(
        pointer("keys of the KV", kv.key, dtype, shape),
        pointer("values of the KV", kv.value, dtype, shape),
    )


def find_slots(metadata: AttentionMetadata, num_slots: int) -> int:
    """The address of the slots that a step writes to.

    Raises:
        ValueError: one is not there.
    """
    return id_pointer("slot_mapping", metadata.slot_mapping, metadata.num_tokens, num_slots)


def _why_not(dtype: torch.dtype, head_size: int) -> str | None:
    if dtype not in DTYPES:
        return f"dtype must be float32 or bfloat16, got {dtype}"
    if head_size % HEAD_STEP or not HEAD_STEP <= head_size <= MAX_HEAD_SIZE:
        allowed = f"a multiple of {HEAD_STEP} up to {MAX_HEAD_SIZE}"
        return f"head size must be {allowed}, got {head_size}"
    return None


def _check(plan: StepPlan, metadata: AttentionMetadata, num_slots: int) -> None:
    """Check that every key of every row is there. `AttentionMetadata.advance` keeps it so."""
    rows, (seqs, width) = metadata.num_tokens, plan.block_table.shape
    starts, room = metadata.query_start_loc, width * metadata.block_size
    if len(plan.row_seq) != rows or len(starts) != seqs + 1 or seqs != metadata.num_seqs:
        raise ValueError(
            f"{rows} rows of {metadata.num_seqs} sequences must have a block table each and starts "
            f"that fit, got {seqs} tables and the starts {starts}"
        )
    num_tail = plan.num_keys - plan.context_lens[plan.row_seq]
    if rows and (num_tail.min() < 1 or plan.tail_start.min() < 0):
        raise ValueError(f"every row must see itself, got {num_tail} keys of the suffix")
    check_all_ids(
        ("block ids", plan.block_table, num_slots // metadata.block_size),
        ("slots of a suffix", plan.tail_slots, num_slots),
        ("context lengths", plan.context_lens, room + 1),
        ("ends of suffixes", plan.tail_start + num_tail, len(plan.tail_slots) + 1),
    )


def plan_step(metadata: AttentionMetadata) -> StepPlan:
    """Number every row's keys; kept with the metadata."""
    plan: Any = metadata.plan.get("native")
    if plan is None:
        plan = metadata.plan["native"] = _plan(metadata)
    return plan


def _plan(metadata: AttentionMetadata) -> StepPlan:
    row_starts, suffix_starts = metadata.query_start_loc, metadata.suffix_start_loc
    contexts, suffix_slots = metadata.context_lens, metadata.suffix_slots
    num_seqs, num_rows = metadata.num_seqs, metadata.num_tokens
    seqs = np.arange(num_seqs, dtype=np.int32)
    is_ragged = num_rows > num_seqs
    row_seq = np.repeat(seqs, np.diff(row_starts)) if is_ragged else seqs
    tail_start = suffix_starts[row_seq].astype(np.int64)
    num_tail = suffix_starts[row_seq + 1] - suffix_starts[row_seq]
    if is_ragged:
        # A chunk or chain: the last row sees the whole suffix, the row before it all but one, ...
        behind = row_starts[row_seq + 1] - np.arange(1, num_rows + 1, dtype=np.int32)
        num_tail = num_tail - behind.astype(np.int32)
    tails, length = [suffix_slots], len(suffix_slots)
    for seq, mask in enumerate(metadata.suffix_masks):
        if mask is None:
            continue
        seen, counts = mask.listed
        rows = slice(row_starts[seq], row_starts[seq + 1])
        num_tail[rows] = counts
        tail_start[rows] = length + np.cumsum(counts) - counts
        tails.append(suffix_slots[suffix_starts[seq] + seen])
        length += len(seen)
    return StepPlan(
        row_seq,
        contexts[row_seq] + num_tail,
        contexts,
        metadata.block_table,
        tail_start,
        np.concatenate(tails) if len(tails) > 1 else suffix_slots,
        {},
        {},
        {},
    )


def group_start(plan: StepPlan, most: int) -> NDArray[np.int32]:
    """Cut each sequence's rows into groups of at most `most`: [groups + 1]."""
    found = plan.group_starts.get(most)
    if found is None:
        num_rows = len(plan.row_seq)
        if num_rows == len(plan.context_lens):
            found = np.arange(num_rows + 1, dtype=np.int32)
        else:
            starts = np.flatnonzero(np.diff(plan.row_seq, prepend=-1))
            rank = np.arange(num_rows) - starts[plan.row_seq]
            found = np.append(np.flatnonzero(rank % most == 0), num_rows).astype(np.int32)
        plan.group_starts[most] = found
    return found


def first_keys(plan: StepPlan, window: int) -> NDArray[np.int32]:
    """First key in each row's window: int32 [rows]. A key's logical number is its position."""
    found = plan.first_keys.get(window)
    if found is None:
        found = plan.first_keys[window] = np.maximum(plan.num_keys - window, 0)
    return found
