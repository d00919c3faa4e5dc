"""Random steps over paged KV, and what attention should make of them, in plain float64 loops."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from folospec.attention.base import LayerKV
from folospec.attention.metadata import AttentionMetadata, SequenceRows

BLOCK_SIZE = 4
NUM_SLOTS = 2048


@dataclass
class Step:
    """The tensors of one step; slots that nobody may read hold NaN."""

    sequences: list[SequenceRows]
    query: Tensor
    key: Tensor
    value: Tensor
    kv: LayerKV

    @property
    def metadata(self) -> AttentionMetadata:
        return AttentionMetadata.from_rows(self.sequences, BLOCK_SIZE)

    def without_masks(self) -> Step:
        return replace(self, sequences=[replace(rows, suffix_mask=None) for rows in self.sequences])


def random_step(
    kinds: list[str],
    heads: tuple[int, int],
    *,
    seed: int,
    dtype: torch.dtype = torch.float64,
    head_size: int = 8,
    contexts: tuple[int, ...] = (),
    num_rows: int | None = None,
    num_slots: int | None = None,
) -> Step:
    """A step with one sequence per kind: "decode", "chain", "chunk" (long), "prompt", "tree".

    `contexts` are their tokens before the step, as far as it goes, and `num_rows` their rows in it;
    else these are drawn too. The KV has `num_slots`, as many as all steps need if None.
    """
    num_slots = num_slots or NUM_SLOTS
    rng, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    blocks = list(range(num_slots // BLOCK_SIZE))
    rng.shuffle(blocks)
    given = [*contexts, *[None] * (len(kinds) - len(contexts))]
    sequences = [
        _random_rows(kind, rng, blocks, context, num_rows)
        for kind, context in zip(kinds, given, strict=True)
    ]
    total = sum(len(rows.positions) for rows in sequences)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise, dtype=torch.float64).to(dtype)

    shape = (num_slots, heads[1], head_size)
    caches = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)]
    for rows in sequences:
        slots = [_slot(rows.block_table, index) for index in range(rows.context_len)]
        for cache in caches:
            cache[slots] = normal(len(slots), heads[1], head_size)
    return Step(
        sequences=sequences,
        query=normal(total, heads[0], head_size),
        key=normal(total, heads[1], head_size),
        value=normal(total, heads[1], head_size),
        kv=LayerKV(*caches),
    )


def naive(step: Step, *, window: int | None, softcap: float | None) -> Tensor:
    """Row by row, head by head, over the list of keys that the row may see."""
    caches = [cache.clone() for cache in step.kv]
    slots = [slot for rows in step.sequences for slot in rows.slots]
    caches[0][slots], caches[1][slots] = step.key, step.value
    out, at = torch.zeros_like(step.query), 0
    for rows in step.sequences:
        for row, position in enumerate(rows.positions):
            seen = [
                slot
                for slot, where in _keys(rows, row)
                if window is None or where > position - window
            ]
            out[at] = _attend(step.query[at], caches[0][seen], caches[1][seen], softcap)
            at += 1
    return out


def _attend(query: Tensor, keys: Tensor, values: Tensor, softcap: float | None) -> Tensor:
    heads = query.shape[0] // keys.shape[1]
    results = []
    for head, vector in enumerate(query):
        scores = (keys[:, head // heads] @ vector) / math.sqrt(len(vector))
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        results.append(scores.softmax(0) @ values[:, head // heads])
    return torch.stack(results)


def _keys(rows: SequenceRows, row: int) -> list[tuple[int, int]]:
    """(slot, position) of what a row sees."""
    context = [(_slot(rows.block_table, index), index) for index in range(rows.context_len)]
    own = list(zip(rows.slots, rows.positions, strict=True))
    if rows.suffix_mask is None:
        return context + own[: row + 1]
    return context + [key for key, seen in zip(own, rows.suffix_mask[row], strict=True) if seen]


def _random_rows(
    kind: str, rng: random.Random, blocks: list[int], given: int | None, num_rows: int | None
) -> SequenceRows:
    context = given
    if context is None:
        context = 0 if kind == "prompt" else rng.randrange(0, 40)
    drawn = {"decode": 1, "chain": rng.randrange(2, 7), "tree": rng.randrange(4, 13)}.get(kind)
    num_rows = num_rows or drawn or rng.randrange(35, 60)
    table = [blocks.pop() for _ in range((context + num_rows - 1) // BLOCK_SIZE + 1)]
    slots = [_slot(table, context + row) for row in range(num_rows)]
    parents = [rng.randrange(row) if kind == "tree" else row - 1 for row in range(1, num_rows)]
    depths, mask = [0], torch.eye(num_rows, dtype=torch.bool)
    for row, parent in enumerate(parents, start=1):
        depths.append(depths[parent] + 1)
        mask[row] |= mask[parent]
    return SequenceRows(
        positions=[context + depth for depth in depths],
        slots=slots,
        context_len=context,
        block_table=table,
        suffix_mask=mask if kind == "tree" else None,
    )


def _slot(block_table: object, index: int) -> int:
    return block_table[index // BLOCK_SIZE] * BLOCK_SIZE + index % BLOCK_SIZE  # type: ignore[index]
