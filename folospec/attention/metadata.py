"""Describes a step to attention: its rows, where their KV goes, which keys each row may see."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.int64]


class SuffixMask:
    """Which keys of its sequence's suffix each row sees: its ancestors by depth, itself last.

    Args:
        seen: bool [rows, suffix].
    """

    def __init__(self, seen: NDArray[np.bool_]) -> None:
        self.seen = seen

    @cached_property
    def listed(self) -> tuple[IntArray, IntArray]:
        """The keys that row 0 sees, then those of row 1, and so on; and how many each row sees."""
        rows, keys = np.nonzero(self.seen)
        return keys, np.bincount(rows, minlength=len(self.seen))

    @cached_property
    def is_chain(self) -> bool:
        """Whether the last row sees all, the row before it all but the last key, and so on: what a
        sequence without a mask sees."""
        num_rows, suffix = self.seen.shape
        return bool((self.seen == np.tri(num_rows, suffix, suffix - num_rows, np.bool_)).all())

    @cached_property
    def words(self) -> NDArray[np.int32]:
        """A bit per key, the lowest of a row's first word for key 0: [rows, suffix / 32 rounded
        up]."""
        num_words = -(-self.seen.shape[1] // 32)
        packed = np.packbits(self.seen, axis=1, bitorder="little")
        filled = np.zeros((len(self.seen), 4 * num_words), np.uint8)
        filled[:, : packed.shape[1]] = packed
        return filled.view("<i4")


@dataclass(slots=True, kw_only=True)
class SequenceRows:
    """The rows of one sequence in a step, in plain Python, for `AttentionMetadata.from_rows`.

    Without a suffix of its own the suffix is the rows themselves.
    """

    positions: Sequence[int]
    slots: Sequence[int]
    """KV slot that each row writes to."""
    context_len: int
    """Tokens with KV before row 0: logical indices 0..context_len-1, found through
    `block_table`."""
    block_table: Sequence[int]
    suffix_slots: Sequence[int] | None = None
    suffix_positions: Sequence[int] | None = None
    suffix_mask: Tensor | None = None
    """bool [rows, suffix]: what each row sees. None: all of the suffix up to the row itself."""


@dataclass(slots=True, kw_only=True)
class AttentionMetadata:
    """Ragged rows of several sequences; the rows of a sequence are contiguous.

    A row's keys in logical order are its sequence's context (positions 0..context_len-1, by block
    table), then the suffix keys it may see, ancestors by depth, itself last. The suffix are keys
    outside of the committed context: usually the step's own rows; for a row that runs alone, also
    ancestors written earlier. Every row sees itself.

    `plan` belongs to the attention backend: what it derives from the rest once per step and uses in
    every layer. Only `advance` changes fields. The fields other than `positions` and `slot_mapping`
    are read on the host.
    """

    query_start_loc: NDArray[np.int32]
    """[num_seqs + 1]: row 0 of each sequence, then the number of rows."""
    context_lens: NDArray[np.int32]
    """[num_seqs]: committed tokens with KV before row 0."""
    block_table: NDArray[np.int32]
    """[num_seqs, max_blocks], padded with 0."""
    block_size: int
    positions: Tensor
    """int64 [num_tokens], on the model's device."""
    slot_mapping: Tensor
    """int64 [num_tokens], on the model's device: the slot each row's key and value are written
    to."""
    suffix_start_loc: NDArray[np.int32]
    """[num_seqs + 1]; each sequence has at least one suffix key."""
    suffix_slots: IntArray
    """[total]."""
    suffix_positions: IntArray
    """[total]."""
    suffix_masks: list[SuffixMask | None]
    """By sequence. None: a chunk or chain; the last row sees the whole suffix, the row before it
    all but the last key, and so on."""
    plan: dict[Any, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Rows of the step."""
        return self.positions.shape[0]

    @property
    def num_seqs(self) -> int:
        """Sequences of the step."""
        return self.context_lens.shape[0]

    @classmethod
    def from_rows(
        cls,
        sequences: Sequence[SequenceRows],
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> AttentionMetadata:
        """Pack the rows of several sequences, in the order given.

        Raises:
            ValueError: a sequence has no rows, or rows without a slot, or a suffix whose slots,
                positions and mask do not fit each other.
        """
        for rows in sequences:
            _check(rows)
        suffixes = [_suffix(rows) for rows in sequences]
        masks = [rows.suffix_mask for rows in sequences]
        return cls(
            query_start_loc=starts([len(rows.positions) for rows in sequences]),
            context_lens=np.array([rows.context_len for rows in sequences], np.int32),
            block_table=pack_tables([rows.block_table for rows in sequences]),
            block_size=block_size,
            positions=torch.from_numpy(_flat([r.positions for r in sequences])).to(device),
            slot_mapping=torch.from_numpy(_flat([r.slots for r in sequences])).to(device),
            suffix_start_loc=starts([len(slots) for slots, _ in suffixes]),
            suffix_slots=_flat([slots for slots, _ in suffixes]),
            suffix_positions=_flat([positions for _, positions in suffixes]),
            suffix_masks=[None if m is None else SuffixMask(m.cpu().numpy()) for m in masks],
        )

    @classmethod
    def of_single_rows(
        cls,
        positions: IntArray,
        block_table: NDArray[np.int32],
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> AttentionMetadata:
        """One row per sequence, behind a context of as many tokens as its position says.

        Args:
            positions: [num_seqs]; the metadata keeps the array, and `advance` changes it.
            block_table: [num_seqs, max_blocks].
        """
        slots = find_slots(block_table, np.arange(len(positions)), positions, block_size)
        every = np.arange(len(positions) + 1, dtype=np.int32)
        return cls(
            query_start_loc=every,
            context_lens=positions.astype(np.int32),
            block_table=block_table,
            block_size=block_size,
            positions=torch.from_numpy(positions).to(device),
            slot_mapping=torch.from_numpy(slots).to(device),
            suffix_start_loc=every,
            suffix_slots=slots,
            suffix_positions=positions,
            suffix_masks=[None] * len(positions),
        )

    def advance(self) -> None:
        """Go on by one position, in place, where each sequence has one row (`of_single_rows`): the
        row becomes context, and the next one takes its place.

        An entry of `plan` that has a method `advance` is told, and stays; the others are dropped.
        """
        positions, slots = self.suffix_positions, self.suffix_slots
        positions += 1
        self.context_lens += 1
        seqs = self.query_start_loc[:-1]
        slots[:] = find_slots(self.block_table, seqs, positions, self.block_size)
        if self.positions.device.type != "cpu":  # there they are the same memory
            self.positions.copy_(torch.from_numpy(positions))
            self.slot_mapping.copy_(torch.from_numpy(slots))
        self.plan = {key: kept for key, kept in self.plan.items() if hasattr(kept, "advance")}
        for kept in self.plan.values():
            kept.advance()


def starts(lengths: Sequence[int] | IntArray) -> NDArray[np.int32]:
    """Where each of several parts begins that lie one after the other, and where the last ends."""
    found = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=found[1:])
    return found


def pack_tables(tables: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    """Block tables one below the other, padded with 0: int32 [num_seqs, length of the longest]."""
    width = max(map(len, tables), default=0)
    flat = array("i")
    for table in tables:
        flat.extend(table)
        flat.frombytes(bytes(flat.itemsize * (width - len(table))))
    return np.frombuffer(flat, np.int32).reshape(len(tables), width)


def find_slots(
    block_table: NDArray[np.int32], seqs: NDArray[Any], indices: IntArray, block_size: int
) -> IntArray:
    """The slots of token `indices[i]` of sequence `seqs[i]`, for every i."""
    blocks, offsets = np.divmod(indices, block_size)
    return block_table[seqs, blocks].astype(np.int64) * block_size + offsets


def _suffix(rows: SequenceRows) -> tuple[Sequence[int], Sequence[int]]:
    if rows.suffix_slots is None or rows.suffix_positions is None:
        return rows.slots, rows.positions
    return rows.suffix_slots, rows.suffix_positions


def _check(rows: SequenceRows) -> None:
    num_rows, (slots, positions) = len(rows.positions), _suffix(rows)
    if num_rows == 0 or num_rows != len(rows.slots):
        raise ValueError(
            f"a sequence needs rows and a slot for each, got {num_rows} and {len(rows.slots)}"
        )
    if len(slots) != len(positions) or len(slots) == 0:
        raise ValueError(
            f"a suffix needs slots, each with a position, got {len(slots)} and {len(positions)}"
        )
    if rows.suffix_mask is not None and rows.suffix_mask.shape != (num_rows, len(slots)):
        raise ValueError(
            f"suffix_mask must be [{num_rows}, {len(slots)}], got {list(rows.suffix_mask.shape)}"
        )


def _flat(lists: Sequence[Sequence[int]]) -> IntArray:
    return np.array([item for items in lists for item in items], np.int64)
