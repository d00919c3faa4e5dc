"""Plans attention by gathering: which sequences share a call, and which keys a row sees.

Sequences with few rows are padded together into one batched call, long chunks run one by one. A
step of one row gathers exactly the keys that the row sees, in logical order, and has no mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from folospec.attention.metadata import AttentionMetadata, IntArray, find_slots

ROW_CLASSES = (8, 32)
"""Sequences of up to 8 rows share a call, and those of up to 32; longer ones run alone."""
KEY_WASTE = 256
"""Sequences share a call if the shorter one is padded by at most this many keys, or to at most
twice its length."""


@dataclass(slots=True)
class Group:
    """Sequences that run in one call, padded to `num_rows` rows and `num_keys` keys each."""

    num_seqs: int
    num_rows: int
    num_keys: int
    key_slots: Tensor
    """int64 [num_seqs * num_keys]; padding repeats a slot of the same sequence."""
    mask: Tensor | None
    """[num_seqs, 1, num_rows, num_keys], 0 or -inf; None: all visible, or causal."""
    causal: bool
    padded_rows: Tensor | None
    """int64 [num_seqs * num_rows]: the step's row at each place; None: the rows of the step as they
    are."""
    real_places: Tensor | None
    """int64: places that are not padding."""
    real_rows: Tensor | None
    """int64: the step's rows at those places."""


class _Step:
    """The step's metadata on the host, as numpy."""

    def __init__(self, metadata: AttentionMetadata, window: int | None) -> None:
        self.row_starts = metadata.query_start_loc.astype(np.int64)
        self.num_rows = np.diff(self.row_starts)
        self.contexts = metadata.context_lens.astype(np.int64)
        self.block_table = metadata.block_table
        self.block_size = metadata.block_size
        self.positions: IntArray = metadata.positions.cpu().numpy()
        self.suffix_starts = metadata.suffix_start_loc.astype(np.int64)
        self.suffix_lens = np.diff(self.suffix_starts)
        self.suffix_slots = metadata.suffix_slots
        self.suffix_positions = metadata.suffix_positions
        self.masks = [None if mask is None else mask.seen for mask in metadata.suffix_masks]
        self.window = window
        self.first_keys = np.zeros_like(self.contexts)
        if window is not None:
            # Nothing before the window of a sequence's earliest row is ever read.
            earliest = np.minimum.reduceat(self.positions, self.row_starts[:-1])
            self.first_keys = np.clip(earliest - window + 1, 0, self.contexts)
        self.num_keys = self.contexts - self.first_keys + self.suffix_lens

    def logical(self, seqs: IntArray, num_keys: int) -> IntArray:
        """Logical index of each key, [seqs, num_keys]: below the context's length a position, then
        suffix keys."""
        return self.first_keys[seqs, None] + np.arange(num_keys)

    def suffix_index(self, seqs: IntArray, logical: IntArray) -> IntArray:
        """Where in the flat suffix arrays a logical index points; clipped into the sequence's own
        suffix."""
        offsets = np.maximum(logical - self.contexts[seqs, None], 0)
        last = self.suffix_lens[seqs, None] - 1
        return self.suffix_starts[seqs, None] + np.minimum(offsets, last)

    def slots(self, seqs: IntArray, logical: IntArray) -> IntArray:
        """KV slot of each key, [seqs, num_keys]."""
        slots = self.suffix_slots[self.suffix_index(seqs, logical)]
        if self.block_table.shape[1] == 0:
            return slots
        contexts = self.contexts[seqs, None]
        context = np.minimum(logical, np.maximum(contexts - 1, 0))
        paged = find_slots(self.block_table, seqs[:, None], context, self.block_size)
        return np.where(logical < contexts, paged, slots)

    def visible(self, seqs: IntArray, logical: IntArray, num_rows: int) -> NDArray[np.bool_]:
        """Which keys each row sees, [seqs, num_rows, num_keys]; padded rows see what is in the
        window of row 0."""
        contexts, suffixes, rows = self.contexts[seqs], self.suffix_lens[seqs], self.num_rows[seqs]
        last_seen = (contexts + suffixes - rows)[:, None] + np.arange(num_rows)
        last_seen = np.minimum(last_seen, (contexts + suffixes - 1)[:, None])
        visible = logical[:, None, :] <= last_seen[:, :, None]
        for index, seq in enumerate(seqs):
            if (mask := self.masks[seq]) is not None:
                start = contexts[index] - self.first_keys[seq]
                visible[index, : mask.shape[0], start : start + mask.shape[1]] = mask
        if self.window is not None:
            in_context = logical < contexts[:, None]
            key_positions = np.where(
                in_context, logical, self.suffix_positions[self.suffix_index(seqs, logical)]
            )
            row_positions = self.positions[self.places(seqs, num_rows)]
            visible &= key_positions[:, None, :] > row_positions[:, :, None] - self.window
        return visible

    def places(self, seqs: IntArray, num_rows: int) -> IntArray:
        """The step's row at each place, [seqs, num_rows]; padding repeats row 0."""
        offsets = np.arange(num_rows)
        offsets = np.where(offsets < self.num_rows[seqs, None], offsets, 0)
        return self.row_starts[seqs, None] + offsets


def plan(metadata: AttentionMetadata, window: int | None, like: Tensor, fused: bool) -> list[Group]:
    """Lay the step out in groups, with masks of the type and on the device of `like`.

    Args:
        fused: whether torch's fused attention will run, which knows causal attention by itself.
    """
    step = _Step(metadata, window)
    if metadata.num_tokens == 1:
        return [_single_row(step, like)]
    return [_group(step, np.array(seqs), like, fused) for seqs in _partition(step)]


def _single_row(step: _Step, like: Tensor) -> Group:
    """The only row of a step: exactly the keys it sees, so that no mask and no padding enter its
    arithmetic."""
    seqs = np.zeros(1, dtype=np.int64)
    logical = step.logical(seqs, int(step.num_keys[0]))
    slots = step.slots(seqs, logical)[step.visible(seqs, logical, 1)[:, 0]]
    return Group(1, 1, slots.size, _device(slots, like), None, False, None, None, None)


def _partition(step: _Step) -> list[list[int]]:
    """Which sequences run together: of the same class of rows, and not too different in keys."""
    groups: list[list[int]] = []
    classes: list[list[int]] = [[] for _ in ROW_CLASSES]
    for seq, num_rows in enumerate(step.num_rows.tolist()):
        for row_class, limit in zip(classes, ROW_CLASSES, strict=True):
            if num_rows <= limit:
                row_class.append(seq)
                break
        else:
            groups.append([seq])
    for row_class in classes:
        lengths = step.num_keys
        longest = 0
        for seq in sorted(row_class, key=lambda seq: -lengths[seq]):
            if longest == 0 or longest - lengths[seq] > max(KEY_WASTE, lengths[seq]):
                groups.append([])
                longest = int(lengths[seq])
            groups[-1].append(seq)
    # In the step's own order, rows of equal number need no gathering.
    return [sorted(group) for group in groups]


def _group(step: _Step, seqs: IntArray, like: Tensor, fused: bool) -> Group:
    num_rows, num_keys = int(step.num_rows[seqs].max()), int(step.num_keys[seqs].max())
    logical = step.logical(seqs, num_keys)
    key_slots = _device(step.slots(seqs, logical), like)
    group = Group(len(seqs), num_rows, num_keys, key_slots, None, False, None, None, None)
    # A long chunk without context: the kernel's own causal mask saves building one.
    seq = seqs[0]
    plain = (
        num_rows == num_keys
        and step.masks[seq] is None
        and (step.window is None or step.window >= num_rows)
    )
    if fused and num_rows > ROW_CLASSES[-1] and plain:
        group.causal = True
    else:
        visible = step.visible(seqs, logical, num_rows)
        if not visible.all():
            mask = torch.zeros(visible.shape, dtype=like.dtype).masked_fill_(
                ~torch.from_numpy(visible), -torch.inf
            )
            group.mask = mask.unsqueeze(1).to(like.device)
    real = np.arange(num_rows) < step.num_rows[seqs, None]
    if len(seqs) == len(step.num_rows) and real.all():
        return group
    places = step.places(seqs, num_rows)
    group.padded_rows = _device(places, like)
    group.real_places = _device(np.flatnonzero(real), like)
    group.real_rows = _device(places[real], like)
    return group


def _device(array: NDArray[np.int64], like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array).reshape(-1)).to(like.device)
