"""Packs rows into the tensors that a model reads in one forward pass.

The rows of all sequences are numbered at once, in numpy: a step costs in proportion to its
sequences and its trees, not to its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from folospec.attention.metadata import (
    AttentionMetadata,
    IntArray,
    SequenceRows,
    SuffixMask,
    find_slots,
    pack_tables,
    starts,
)
from folospec.models.forward import Rows


@dataclass(slots=True)
class InputBatch:
    """Packed rows of several sequences: `input_ids` int64 [num_rows], their attention metadata, and
    `logits_indices` int64, the rows that need logits; None: all do."""

    input_ids: Tensor
    metadata: AttentionMetadata
    logits_indices: Tensor | None


@dataclass(frozen=True, slots=True)
class TreeRows:
    """What a tree's rows are, whatever their tokens and slots."""

    depths: IntArray
    """[num_rows], of all rows, those with KV from an earlier pass among them."""
    mask: SuffixMask
    """Which of all rows each row sees that is run."""


def make_batch(batch: Sequence[Rows], block_size: int, device: torch.device) -> InputBatch:
    """Pack the rows of each sequence, in order.

    The rows of a sequence, whether run or seen only, are its suffix; the context is what lies
    before them.

    Raises:
        ValueError: a sequence has more rows than slots.
    """
    starting = np.array([rows.start for rows in batch])
    sizes = np.array([len(rows.token_ids) for rows in batch])
    tables = pack_tables([rows.block_table for rows in batch])
    check_room(starting + sizes, [rows.block_table for rows in batch], block_size)
    token_ids = np.array([token_id for rows in batch for token_id in rows.token_ids])
    if len(token_ids) == len(batch) and all(rows.num_logits == 1 for rows in batch):
        metadata = AttentionMetadata.of_single_rows(starting, tables, block_size, device)
        return InputBatch(torch.from_numpy(token_ids).to(device), metadata, None)
    suffix_starts = starts(sizes)
    seqs = np.repeat(np.arange(len(batch)), sizes)
    indices = np.arange(len(seqs)) + (starting - suffix_starts[:-1])[seqs]
    slots = find_slots(tables, seqs, indices, block_size)
    positions, masks = _place_trees(batch, indices, suffix_starts)
    done = np.array([rows.num_computed for rows in batch])
    row_starts, row_positions, row_slots = suffix_starts, positions, slots
    if done.any():
        is_run = indices >= (starting + done)[seqs]
        token_ids, row_positions, row_slots = token_ids[is_run], positions[is_run], slots[is_run]
        row_starts = starts(sizes - done)
    metadata = AttentionMetadata(
        query_start_loc=row_starts,
        context_lens=starting.astype(np.int32),
        block_table=tables,
        block_size=block_size,
        positions=torch.from_numpy(row_positions).to(device),
        slot_mapping=torch.from_numpy(row_slots).to(device),
        suffix_start_loc=suffix_starts,
        suffix_slots=slots,
        suffix_positions=positions,
        suffix_masks=masks,
    )
    wanted = _last_rows(row_starts, np.array([rows.num_logits for rows in batch]))
    return InputBatch(
        torch.from_numpy(token_ids).to(device),
        metadata,
        None if len(wanted) == len(token_ids) else torch.from_numpy(wanted).to(device),
    )


def check_room(ends: IntArray, tables: Sequence[Sequence[int]], block_size: int) -> None:
    """Refuse rows up to `ends` that the block tables have no slots for: behind the end of a shorter
    table there is padding, and it would be another sequence's block.

    Raises:
        ValueError: there are fewer slots; the message says how many.
    """
    room = np.array([len(table) for table in tables]) * block_size
    if (ends > room).any():
        seq = int(np.argmax(ends > room))
        raise ValueError(f"rows must be within the {room[seq]} slots, got a row {ends[seq] - 1}")


def _place_trees(
    batch: Sequence[Rows], indices: IntArray, suffix_starts: NDArray[np.int32]
) -> tuple[IntArray, list[SuffixMask | None]]:
    """The positions of all rows, and the masks of trees. In a chain positions are slot indices."""
    positions = indices
    masks: list[SuffixMask | None] = [None] * len(batch)
    for seq, rows in enumerate(batch):
        if rows.parents is not None:
            tree = tree_rows(tuple(rows.parents), rows.num_computed)
            masks[seq] = tree.mask
            positions = indices.copy() if positions is indices else positions
            positions[suffix_starts[seq] : suffix_starts[seq + 1]] = rows.start + tree.depths
    return positions, masks


@lru_cache(maxsize=1024)
def tree_rows(parents: tuple[int, ...], num_computed: int) -> TreeRows:
    """Read the shape of a tree. Of few shapes there are many trees: static ones, a level's first
    rows, and what is likely."""
    depths = np.zeros(len(parents), np.int64)
    seen = np.eye(len(parents), dtype=np.bool_)
    for row, parent in enumerate(parents):
        if parent >= 0:
            depths[row] = depths[parent] + 1
            seen[row] |= seen[parent]
    return TreeRows(depths, SuffixMask(seen[num_computed:]))


def _last_rows(row_starts: NDArray[np.int32], counts: IntArray) -> IntArray:
    """The last `counts[i]` rows of sequence i, for every i."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1]) + np.repeat(row_starts[1:] - ends, counts)


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
    table = rows.block_table
    slots = [
        table[i // block_size] * block_size + i % block_size for i in (start + r for r in path)
    ]
    single = SequenceRows(
        positions=[start + len(path) - 1],
        slots=slots[-1:],
        context_len=start,
        block_table=table,
        suffix_slots=slots,
        suffix_positions=range(start, start + len(path)),
    )
    return InputBatch(
        torch.tensor([rows.token_ids[row]], device=device),
        AttentionMetadata.from_rows([single], block_size, device),
        None,
    )


def _path(parents: Sequence[int], row: int) -> list[int]:
    """The rows on the way from row 0 to `row`, by depth, itself last."""
    path = [row]
    while (parent := parents[path[-1]]) >= 0:
        path.append(parent)
    return path[::-1]
