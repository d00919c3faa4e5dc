"""From rows to tensors: what the model reads in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from folospec.attention.metadata import AttentionMetadata, SequenceRows
from folospec.spec.draft_runner import Rows


@dataclass(slots=True)
class InputBatch:
    """Packed rows of several sequences: `input_ids` int64 [num_rows], their attention metadata, and
    `logits_indices` int64, the rows that need logits."""

    input_ids: Tensor
    metadata: AttentionMetadata
    logits_indices: Tensor


def make_batch(batch: Sequence[Rows], block_size: int, device: torch.device) -> InputBatch:
    """Pack the rows of each sequence, in order; the keys of a step are its rows."""
    input_ids: list[int] = []
    logits_indices: list[int] = []
    sequences = []
    for rows in batch:
        input_ids.extend(rows.token_ids[rows.num_computed :])
        logits_indices.extend(range(len(input_ids) - rows.num_logits, len(input_ids)))
        sequences.append(_sequence_rows(rows, block_size))
    return InputBatch(
        torch.tensor(input_ids, device=device),
        AttentionMetadata.from_rows(sequences, block_size, device),
        torch.tensor(logits_indices, dtype=torch.int64, device=device),
    )


def _sequence_rows(rows: Rows, block_size: int) -> SequenceRows:
    """Rows with KV from an earlier pass are keys of the suffix only."""
    done = rows.num_computed
    indices = range(rows.start, rows.start + len(rows.token_ids))
    slots = _slots(rows.block_table, indices, block_size)
    positions = [rows.start + depth for depth in _depths(rows)]
    return SequenceRows(
        positions=positions[done:],
        slots=slots[done:],
        context_len=rows.start,
        block_table=rows.block_table,
        suffix_slots=slots,
        suffix_positions=positions,
        suffix_mask=None if rows.parents is None else _ancestor_mask(rows.parents)[done:],
    )


def make_single(rows: Rows, row: int, block_size: int, device: torch.device) -> InputBatch:
    """One row alone, its ancestors read from the slots where they lie: the pass that plain decoding
    would make.

    A row of a chain has all its ancestors in context; a tree's row has them in suffix slots, in
    order of depth. Either way the keys are gathered in logical order, and are as many, so the
    arithmetic is the same to the bit.
    """
    if rows.parents is None:
        start, path = rows.start + row, [0]
    else:
        start, path = rows.start, _path(rows.parents, row)
    slots = _slots(rows.block_table, [start + r for r in path], block_size)
    single = SequenceRows(
        positions=[start + len(path) - 1],
        slots=slots[-1:],
        context_len=start,
        block_table=rows.block_table,
        suffix_slots=slots,
        suffix_positions=range(start, start + len(path)),
        suffix_mask=torch.ones(1, len(path), dtype=torch.bool),
    )
    return InputBatch(
        torch.tensor([rows.token_ids[row]], device=device),
        AttentionMetadata.from_rows([single], block_size, device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )


def _depths(rows: Rows) -> Sequence[int]:
    """Depth of each row below row 0."""
    if rows.parents is None:
        return range(len(rows.token_ids))
    depths: list[int] = []
    for parent in rows.parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return depths


def _path(parents: Sequence[int], row: int) -> list[int]:
    """The rows on the way from row 0 to `row`, by depth, itself last."""
    path = [row]
    while (parent := parents[path[-1]]) >= 0:
        path.append(parent)
    return path[::-1]


def _slots(block_table: Sequence[int], indices: Sequence[int], block_size: int) -> list[int]:
    return [block_table[i // block_size] * block_size + i % block_size for i in indices]


def _ancestor_mask(parents: Sequence[int]) -> Tensor:
    """Bool [num_rows, num_rows]: row r sees itself and its ancestors."""
    mask = torch.eye(len(parents), dtype=torch.bool)
    for row, parent in enumerate(parents):
        if parent >= 0:
            mask[row] |= mask[parent]
    return mask
