"""Which rows run in a step, where their keys and values go, and which keys each row may see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


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
    every layer. A step whose fields change needs new metadata. The fields other than `positions`
    and `slot_mapping` are read on the host.
    """

    query_start_loc: Tensor
    """int32 [num_seqs + 1]: row 0 of each sequence, then the number of rows."""
    context_lens: Tensor
    """int32 [num_seqs]: committed tokens with KV before row 0."""
    block_table: Tensor
    """int32 [num_seqs, max_blocks], padded with 0."""
    block_size: int
    positions: Tensor
    """int64 [num_tokens], on the model's device."""
    slot_mapping: Tensor
    """int64 [num_tokens], on the model's device: the slot each row's key and value are written
    to."""
    suffix_start_loc: Tensor
    """int32 [num_seqs + 1]; each sequence has at least one suffix key."""
    suffix_slots: Tensor
    """int64 [total]."""
    suffix_positions: Tensor
    """int64 [total]."""
    suffix_masks: list[Tensor | None]
    """bool [rows, suffix] per sequence: each row's ancestors, itself included. None: a chunk or
    chain; the last row sees the whole suffix, the row before it all but the last key, and so on."""
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
        width = max((len(rows.block_table) for rows in sequences), default=0)
        tables = [[*rows.block_table, *[0] * (width - len(rows.block_table))] for rows in sequences]
        return cls(
            query_start_loc=_starts([len(rows.positions) for rows in sequences]),
            context_lens=torch.tensor([rows.context_len for rows in sequences], dtype=torch.int32),
            block_table=torch.tensor(tables, dtype=torch.int32).reshape(len(sequences), width),
            block_size=block_size,
            positions=_flat([rows.positions for rows in sequences], device),
            slot_mapping=_flat([rows.slots for rows in sequences], device),
            suffix_start_loc=_starts([len(slots) for slots, _ in suffixes]),
            suffix_slots=_flat([slots for slots, _ in suffixes], "cpu"),
            suffix_positions=_flat([positions for _, positions in suffixes], "cpu"),
            suffix_masks=[rows.suffix_mask for rows in sequences],
        )


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


def _starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def _flat(lists: Sequence[Sequence[int]], device: torch.device | str) -> Tensor:
    return torch.tensor(
        [item for items in lists for item in items], dtype=torch.int64, device=device
    )
