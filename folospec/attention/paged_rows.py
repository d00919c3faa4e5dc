"""Packs the rows of a step for GPU kernels: flat int32 arrays, uploaded in one copy.

The rows of a sequence are cut into tiles, and a kernel's program takes a tile:

    packed rows      0  1  2  3  4  5 | 6 | 7  8  9
    sequence         0                | 1 | 2             query_start_loc  0 6 7 10
    tiles of four   [0        ][1    ] [2] [3      ]      tile_row 0 4 6 7,  tile_seq 0 0 1 2

A row's keys in logical order are the sequence's context, then its suffix, of which a row sees a
part: all up to itself, or what a tree's mask says, a bit per key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from folospec.attention.metadata import AttentionMetadata, SuffixMask, starts

Int32Array = NDArray[np.int32]
PLAN_KEY = "paged"
WORD = 32
MOST_QUERIES = 64
"""Rows of a tile times the query heads that share a KV head, at most, unless there are more heads
than that: so many of the largest float32 heads fit into a multiprocessor beside their keys."""
_ALIGNMENT = 4
"""Elements to which each array is aligned in the upload: 16 bytes, as kernels like it."""


class PagedRows(NamedTuple):
    """A step's rows on the device, int32. What a step does not fill of longer arrays is padding:
    `tile_seq` -1, anything else is not read."""

    query_start_loc: Tensor
    """[num_seqs + 1]: row 0 of each sequence, then the number of rows."""
    context_lens: Tensor
    """[num_seqs]"""
    table_row: Tensor
    """[num_seqs]: its row of `block_table`."""
    block_table: Tensor
    """[num_tables, table_width]"""
    suffix_start_loc: Tensor
    """[num_seqs + 1]"""
    suffix_slots: Tensor
    """[num_suffix_keys]"""
    suffix_positions: Tensor
    """[num_suffix_keys]"""
    mask_start: Tensor
    """[num_seqs]: first word of its mask, or -1: the last row sees the whole suffix, the row before
    it all but the last key, and so on."""
    mask_words: Tensor
    """[num_words]: bit i of a row's words says whether it sees suffix key i; each row has as many
    words as its sequence's suffix needs, bit 0 is the lowest of the first. Without elements: no
    sequence has a mask."""
    tile_seq: Tensor
    """[num_tiles]; -1: nothing to do."""
    tile_row: Tensor
    """[num_tiles]: first packed row of the tile."""
    rows_per_tile: int
    """A tile ends there, or with its sequence."""


def rows_per_tile(num_rows: int, num_seqs: int, fold: int) -> int:
    """How many rows share the loading of keys, by the shape of a step alone.

    Args:
        fold: query heads per KV head; they share it too, and the tile of a matrix product has at
            least 16 of both.
    """
    rows = -(-num_rows // max(num_seqs, 1))
    queries = 16
    while queries < min(rows * fold, MOST_QUERIES):
        queries *= 2
    return max(1, queries // fold)


def describe(
    metadata: AttentionMetadata, *, rows_per_tile: int, expands: bool
) -> dict[str, Int32Array]:
    """The fields of `PagedRows` by name, on the host, none longer than the step needs.

    Costs in proportion to sequences, tiles and trees. A tree that is a chain has no mask.

    Args:
        rows_per_tile: at least 1.
        expands: every row of a sequence with a mask becomes a sequence of its own, whose suffix is
            what the row sees. Then keys lie in logical order for every row, and no mask is left.
    """
    table_row = np.arange(metadata.num_seqs, dtype=np.int32)
    fields = {
        "query_start_loc": metadata.query_start_loc,
        "context_lens": metadata.context_lens,
        "table_row": table_row,
        "block_table": metadata.block_table,
        "suffix_start_loc": metadata.suffix_start_loc,
        "suffix_slots": metadata.suffix_slots.astype(np.int32),
        "suffix_positions": metadata.suffix_positions.astype(np.int32),
        "mask_start": np.full(metadata.num_seqs, -1, np.int32),
        "mask_words": np.empty(0, np.int32),
    }
    if metadata.num_tokens == metadata.num_seqs:
        tiles = {"tile_seq": table_row, "tile_row": metadata.query_start_loc[:-1]}
    else:
        tiles = _tiles(metadata.query_start_loc, rows_per_tile)
    masks = [None if m is None or m.is_chain else m for m in metadata.suffix_masks]
    if any(mask is not None for mask in masks):
        if expands:
            fields |= _expanded(metadata, masks)
            tiles = _tiles(fields["query_start_loc"], rows_per_tile)
        else:
            fields |= _masks(masks)
    return fields | tiles


def sizes(
    num_seqs: int,
    num_rows: int,
    table_width: int,
    *,
    rows_per_tile: int,
    expands: bool,
    max_rows_per_seq: int,
) -> dict[str, int]:
    """How many elements each field of `describe` has at most, for steps within these bounds.

    Args:
        num_rows: of all sequences, at least `num_seqs`.
        table_width: blocks of the longest table.
        max_rows_per_seq: suffix keys of one sequence, which are its rows, and those that its rows
            see outside of the context.
    """
    seqs = num_rows if expands else num_seqs
    # A single suffix key is the row's own.
    is_masked = max_rows_per_seq > 1 and not expands
    words = num_rows * -(-max_rows_per_seq // WORD) if is_masked else 0
    tiles = seqs + (num_rows - seqs) // rows_per_tile
    suffix = seqs * max_rows_per_seq
    return {
        "query_start_loc": seqs + 1,
        "context_lens": seqs,
        "table_row": seqs,
        "block_table": num_seqs * table_width,
        "suffix_start_loc": seqs + 1,
        "suffix_slots": suffix,
        "suffix_positions": suffix,
        "mask_start": seqs,
        "mask_words": words,
        "tile_seq": tiles,
        "tile_row": tiles,
    }


def on_device(
    metadata: AttentionMetadata,
    device: torch.device,
    *,
    rows_per_tile: int,
    expands: bool = False,
) -> PagedRows:
    """The step's rows on `device`, kept in `metadata.plan`; see `describe` for the arguments.

    Where they are in the plan already, put there by whoever replays a captured step, they are used
    as they are, and nothing of `metadata` is read.
    """
    rows: Any = metadata.plan.get(PLAN_KEY)
    if rows is None:
        fields = describe(metadata, rows_per_tile=rows_per_tile, expands=expands)
        rows = metadata.plan[PLAN_KEY] = upload(fields, device, rows_per_tile)
    return rows


def upload(fields: dict[str, Int32Array], device: torch.device, rows_per_tile: int) -> PagedRows:
    """Bring what `describe` returned to `device`, in one copy."""
    places, length = {}, 0
    for name, array in fields.items():
        places[name] = slice(length, length + array.size)
        length += -(-array.size // _ALIGNMENT) * _ALIGNMENT
    packed = torch.empty(length, dtype=torch.int32, pin_memory=device.type == "cuda")
    host = packed.numpy()
    for name, place in places.items():
        host[place] = fields[name].reshape(-1)
    there = packed.to(device, non_blocking=True)
    views = {name: there[place].view(fields[name].shape) for name, place in places.items()}
    return PagedRows(**views, rows_per_tile=rows_per_tile)


def _tiles(row_starts: Int32Array, rows_per_tile: int) -> dict[str, Int32Array]:
    counts = -(-np.diff(row_starts) // rows_per_tile)
    seqs = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    rank = np.arange(len(seqs), dtype=np.int32) - starts(counts)[seqs]
    return {"tile_seq": seqs, "tile_row": row_starts[seqs] + rank * np.int32(rows_per_tile)}


def _masks(masks: Sequence[SuffixMask | None]) -> dict[str, Int32Array]:
    words, length = [], 0
    mask_start = np.full(len(masks), -1, np.int32)
    for seq, mask in enumerate(masks):
        if mask is not None:
            mask_start[seq] = length
            words.append(mask.words)
            length += mask.words.size
    return {"mask_start": mask_start, "mask_words": np.concatenate(words, axis=None)}


def _expanded(
    metadata: AttentionMetadata, masks: Sequence[SuffixMask | None]
) -> dict[str, Int32Array]:
    """Sequences of one row for the rows of trees; the others as they are."""
    num_rows, suffix_lens = np.diff(metadata.query_start_loc), np.diff(metadata.suffix_start_loc)
    seen, counts = [], []
    for mask, length in zip(masks, suffix_lens, strict=True):
        some, each = mask.listed if mask is not None else (np.arange(length), length[None])
        seen.append(some)
        counts.append(each)
    table_row = np.repeat(np.arange(len(masks), dtype=np.int32), [len(each) for each in counts])
    is_tree = np.array([mask is not None for mask in masks])
    before = np.repeat(metadata.suffix_start_loc[:-1], [len(some) for some in seen])
    keys = np.concatenate(seen) + before
    return {
        "query_start_loc": starts(np.where(is_tree, 1, num_rows)[table_row]),
        "context_lens": metadata.context_lens[table_row],
        "table_row": table_row,
        "suffix_start_loc": starts(np.concatenate(counts)),
        "suffix_slots": metadata.suffix_slots[keys].astype(np.int32),
        "suffix_positions": metadata.suffix_positions[keys].astype(np.int32),
        "mask_start": np.full(len(table_row), -1, np.int32),
    }
