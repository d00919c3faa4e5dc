"""Cases of paged attention: ragged steps, and an oracle that loops over rows in float64.

What no row may see is NaN in the caches, outputs are poisoned, and there are rows and tiles of
padding.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_case import Canvas, Case
from torch import Tensor

from folospec.attention import paged_rows
from folospec.attention.metadata import AttentionMetadata, SequenceRows
from folospec.kernels.gpu import attention

HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32
TOLERANCES = {HALF: 2e-3, BF16: 1.5e-2, FULL: 3e-6}
"""Weights are rounded to the query's type before they meet the values."""
PADDING = 8
"""Rows behind the real ones: as many as a tile has, so that a kernel that writes too far is found
out, and does no other harm."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A step: (context, rows, kind) of every sequence. Kinds are "chain"; "tree"; "late", a tree of
    which only the last half runs, as the rest was written before; "reversed", a tree whose rows are
    in another order than its keys."""

    name: str
    sequences: tuple[tuple[int, int, str], ...]
    heads: tuple[int, int] = (2, 1)
    head_size: int = 32
    dtype: torch.dtype = FULL
    kv_dtype: torch.dtype | None = None
    block_size: int = 16
    rows_per_tile: int = 8
    window: int | None = None
    softcap: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """Those of `attend`: ordered, num_parts."""


MIX = (
    (70, 1, "chain"), (5, 7, "tree"), (0, 1, "chain"), (0, 21, "chain"), (64, 5, "chain"),
    (1, 1, "tree"), (63, 6, "late"), (129, 2, "tree"), (1, 1, "chain"), (2, 9, "reversed"),
)  # fmt: skip
LONG = ((2100, 1, "chain"), (1020, 9, "chain"), (1500, 1, "chain"), (3, 2, "chain"))
TREES = ((70, 64, "tree"), (31, 33, "tree"), (0, 1, "tree"), (17, 2, "tree"), (3, 9, "chain"))
SHAPES = (
    Shape(name="mix", sequences=MIX, heads=(4, 2)),
    Shape(name="mix, half", sequences=MIX, dtype=HALF, heads=(6, 2), head_size=80),
    Shape(name="mix, bfloat16", sequences=MIX, dtype=BF16, heads=(3, 1), head_size=96),
    Shape(name="mix, window", sequences=MIX, window=9, block_size=5),
    Shape(name="mix, window of one", sequences=MIX, window=1),
    Shape(name="mix, window and cap", sequences=MIX, window=66, softcap=0.7, dtype=HALF),
    Shape(name="mix, cap", sequences=MIX, softcap=2.0, block_size=1),
    Shape(name="mix, parts", sequences=MIX, options={"num_parts": 3}),
    Shape(name="mix, wide KV", sequences=MIX, dtype=BF16, kv_dtype=FULL),
    Shape(name="mix, narrow KV", sequences=MIX, dtype=FULL, kv_dtype=BF16, rows_per_tile=3),
    Shape(name="mix, mixed halves", sequences=MIX, dtype=HALF, kv_dtype=BF16),
    Shape(name="mix, one tile each", sequences=MIX, rows_per_tile=32, heads=(1, 1)),
    Shape(name="mix, ordered", sequences=MIX, heads=(4, 2), options={"ordered": True}),
    Shape(name="trees", sequences=TREES, rows_per_tile=16),
    Shape(name="trees, half", sequences=TREES, dtype=HALF, rows_per_tile=8, heads=(10, 2)),
    Shape(name="trees, window", sequences=TREES, window=4, rows_per_tile=16),
    Shape(name="long, parts", sequences=LONG, options={"num_parts": 5}),
    Shape(name="long, window", sequences=LONG, window=600, options={"num_parts": 7}),
    Shape(name="long, many parts", sequences=LONG, options={"num_parts": 20}),
    Shape(name="long, ordered", sequences=LONG, options={"ordered": True, "num_parts": 2}),
    Shape(
        name="long, ordered, one program", sequences=LONG, heads=(2, 1),
        options={"ordered": True, "num_parts": 1},
    ),
    Shape(
        name="long, ordered, window", sequences=LONG, window=1100, dtype=HALF,
        options={"ordered": True, "num_parts": 2},
    ),
    Shape(name="heads of 256", sequences=MIX[:3], head_size=256, dtype=HALF, heads=(1, 1)),
    Shape(name="heads of 256, float32", sequences=MIX[:3], head_size=256, rows_per_tile=32),
    Shape(name="heads of 128, prompt", sequences=((9, 70, "chain"),), head_size=128, dtype=BF16,
          rows_per_tile=32),
    Shape(name="many heads", sequences=MIX[:5], heads=(71, 1), rows_per_tile=1),
)  # fmt: skip


class Step:
    """A step on the device, and on the host what its oracle reads."""

    def __init__(self, shape: Shape, device: torch.device, seed: int) -> None:
        self.shape = shape
        rng = random.Random(f"{seed} {shape.name}")
        noise = torch.Generator().manual_seed(rng.randrange(2**31))
        size = shape.block_size
        blocks = list(range(sum((c + r) // size + 2 for c, r, _ in shape.sequences)))
        rng.shuffle(blocks)
        self.sequences = [_rows(*facts, size, rng, blocks) for facts in shape.sequences]
        num_rows = sum(len(rows.positions) for rows in self.sequences)
        kv_dtype = shape.kv_dtype or shape.dtype

        def normal(*dims: int) -> Tensor:
            return torch.randn(*dims, generator=noise)

        num_slots = size * (max(max(rows.block_table) for rows in self.sequences) + 1)
        known = sorted({slot for rows in self.sequences for slot in _known(rows, shape)})
        dims = (num_slots, shape.heads[1], shape.head_size)
        self.kv = []
        for _ in range(2):
            cache = torch.full(dims, torch.nan)
            cache[known] = normal(len(known), *dims[1:])
            self.kv.append(cache.to(kv_dtype))
        query = normal(num_rows + PADDING, shape.heads[0], shape.head_size)
        self.query = query.to(shape.dtype)
        self.num_rows = num_rows
        self._upload(device)

    def _upload(self, device: torch.device) -> None:
        metadata = AttentionMetadata.from_rows(self.sequences, self.shape.block_size)
        fields = paged_rows.describe(
            metadata,
            rows_per_tile=self.shape.rows_per_tile,
            expands=bool(self.shape.options.get("ordered")),
        )
        # Padding need not stand at the end, and no row is a tile's that has none.
        seqs, rows = fields["tile_seq"].tolist(), fields["tile_row"].tolist()
        for at in (0, len(seqs) // 2, len(seqs)):
            seqs.insert(at, -1)
            rows.insert(at, 0)
        fields["tile_seq"] = fields["tile_seq"].__class__((len(seqs),), "int32")
        fields["tile_row"] = fields["tile_seq"].copy()
        fields["tile_seq"][:], fields["tile_row"][:] = seqs, rows
        self.rows = paged_rows.upload(fields, device, self.shape.rows_per_tile)
        padding = torch.zeros(PADDING, dtype=torch.int64)
        self.positions = torch.cat([metadata.positions, padding]).to(device)
        # Queries, keys and values may be parts of something larger.
        self.device_query = _inside(self.query, device, 1)
        self.device_kv = tuple(_inside(cache, device, 1) for cache in self.kv)

    def expected(self, *, context: bool) -> tuple[Tensor, Tensor]:
        """Float64 outputs of the real rows, and their log-sum-exps."""
        shape, outs, sums = self.shape, [], []
        query = self.query.double()
        keys, values = (cache.to(shape.dtype).double() for cache in self.kv)
        at = 0
        for rows in self.sequences:
            for row in range(len(rows.positions)):
                seen = _seen(rows, row, shape, context)
                out, lse = _attend(query[at], keys[seen], values[seen], shape)
                outs.append(out)
                sums.append(lse)
                at += 1
        return torch.stack(outs), torch.stack(sums)


def _attend(query: Tensor, keys: Tensor, values: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    fold = shape.heads[0] // shape.heads[1]
    keys, values = (t.repeat_interleave(fold, dim=1) for t in (keys, values))
    scores = torch.einsum("hd,khd->hk", query, keys) * scale_of(shape)
    if shape.softcap is not None:
        scores = shape.softcap * torch.tanh(scores / shape.softcap)
    weights = scores.softmax(1)
    return torch.einsum("hk,khd->hd", weights, values), scores.logsumexp(1)


def scale_of(shape: Shape) -> float:
    """Larger than usual, so that softmaxes are uneven."""
    return 2 / math.sqrt(shape.head_size)


def _slot(table: Any, index: int, size: int) -> int:
    return table[index // size] * size + index % size


def _rows(
    context: int, num_rows: int, kind: str, size: int, rng: random.Random, blocks: list[int]
) -> SequenceRows:
    table = [blocks.pop() for _ in range((context + num_rows - 1) // size + 1)]
    slots = [_slot(table, context + row, size) for row in range(num_rows)]
    if kind == "chain":
        positions = list(range(context, context + num_rows))
        return SequenceRows(
            positions=positions, slots=slots, context_len=context, block_table=table
        )
    depths, mask = [0], torch.eye(num_rows, dtype=torch.bool)
    for row in range(1, num_rows):
        parent = rng.randrange(max(0, row - 12), row)
        depths.append(depths[parent] + 1)
        mask[row] |= mask[parent]
    positions = [context + depth for depth in depths]
    run = list(range(num_rows // 2 if kind == "late" else 0, num_rows))
    if kind == "reversed":
        run.reverse()
    return SequenceRows(
        positions=[positions[row] for row in run],
        slots=[slots[row] for row in run],
        context_len=context,
        block_table=table,
        suffix_slots=slots,
        suffix_positions=positions,
        suffix_mask=mask[run],
    )


def _suffix(rows: SequenceRows) -> list[tuple[int, int]]:
    slots = rows.slots if rows.suffix_slots is None else rows.suffix_slots
    where = rows.positions if rows.suffix_positions is None else rows.suffix_positions
    return list(zip(slots, where, strict=True))


def _known(rows: SequenceRows, shape: Shape) -> list[int]:
    """Slots that hold numbers: of all the suffix, and of what some row sees."""
    seen = [slot for row in range(len(rows.positions)) for slot in _seen(rows, row, shape, True)]
    return seen + [slot for slot, _ in _suffix(rows)]


def _seen(rows: SequenceRows, row: int, shape: Shape, context: bool) -> list[int]:
    """The slots of a row's keys."""
    before = range(rows.context_len if context else 0)
    keys = [(_slot(rows.block_table, index, shape.block_size), index) for index in before]
    if rows.suffix_mask is None:
        keys += _suffix(rows)[: row + 1]
    else:
        mask = rows.suffix_mask[row].tolist()
        keys += [key for key, sees in zip(_suffix(rows), mask, strict=True) if sees]
    least = -math.inf if shape.window is None else rows.positions[row] - shape.window
    return [slot for slot, where in keys if where > least]


def _inside(tensor: Tensor, device: torch.device, more: int) -> Tensor:
    """The same numbers with strides that are not their shape's; what lies between is NaN."""
    rows, heads, size = tensor.shape
    wide = torch.full((rows, heads + more, size), torch.nan, dtype=tensor.dtype, device=device)
    wide[:, :heads] = tensor.to(device)
    return wide[:, :heads]


def make_case(shape: Shape, device: torch.device, seed: int = 0) -> Case:
    """A step through `attend`."""
    step = Step(shape, device, seed)
    canvas = Canvas(step.query.shape, shape.dtype, device)

    def run() -> dict[str, Tensor]:
        attention.attend(
            step.device_query, step.device_kv, step.rows, step.positions, out=canvas.tensor,
            block_size=shape.block_size, scale=scale_of(shape), window=shape.window,
            softcap=shape.softcap, **shape.options,
        )  # fmt: skip
        out = canvas.tensor
        return {"out": out[: step.num_rows], "padding": out[step.num_rows :].isnan().long()}

    def expected() -> dict[str, Tensor]:
        out, _ = step.expected(context=True)
        return {"out": out, "padding": torch.ones(step.query[step.num_rows :].shape).long()}

    tolerance = TOLERANCES[shape.dtype]
    return Case(name=shape.name, run=run, expected=expected, tolerance=tolerance, canvases=[canvas])


def make_suffix_case(shape: Shape, device: torch.device, seed: int = 0) -> Case:
    """A step through `attend_suffix`."""
    step = Step(shape, device, seed)

    def run() -> dict[str, Tensor]:
        out, lse = attention.attend_suffix(
            step.device_query, step.device_kv, step.rows, step.positions, scale=scale_of(shape),
            window=shape.window, softcap=shape.softcap,
        )  # fmt: skip
        return {"out": out[: step.num_rows], "lse": lse[: step.num_rows]}

    def expected() -> dict[str, Tensor]:
        out, lse = step.expected(context=False)
        return {"out": out, "lse": lse}

    tolerance = TOLERANCES[shape.dtype]
    return Case(name=f"suffix of {shape.name}", run=run, expected=expected, tolerance=tolerance)


SUFFIX_SHAPES = [
    shape
    for shape in SHAPES
    if shape.name in ("mix", "mix, bfloat16", "mix, window", "mix, window and cap", "trees, half")
]


def cases(device: torch.device, seed: int = 0) -> Iterator[Case]:
    """Every shape."""
    for shape in SHAPES:
        yield make_case(shape, device, seed)
    for shape in SUFFIX_SHAPES:
        yield make_suffix_case(shape, device, seed)
