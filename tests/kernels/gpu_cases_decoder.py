"""Cases of the kernels around a decoder's matrix products, of those products, and of KV that is
written and moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from gpu_case import Canvas, Case
from torch import Tensor
from torch.nn import functional

from folospec.kernels import torch_ops
from folospec.kernels.gpu import kv, linear, rows

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
ROUNDING = {FLOAT: 2e-6, BFLOAT: 2.0**-8, HALF: 2.0**-11}
"""Relative error of numbers that were rounded to a type once, at most."""
NORM_ROUNDING = {FLOAT: 2e-6, BFLOAT: 2.1e-3, HALF: 2.7e-4}
"""That of a row of `MANY` numbers, whose errors are spread evenly, as root mean square: a sum that
was not rounded before the norm has 1.4 times as much."""
MANY = 1000
BITS = {2: torch.int16, 4: torch.int32}
NUM_SLOTS, LENGTH = 40, 50


class Draws:
    """Random tensors on a device; the numbers do not depend on it."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def floats(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype).to(self.device)

    def places(self, count: int, below: int) -> Tensor:
        """Distinct integers."""
        return torch.randperm(below, generator=self.generator)[:count].to(self.device)

    def slots(self, count: int) -> Tensor:
        """Slot 0 and others; -1 for the second row and every third one after it."""
        slots = self.places(count, NUM_SLOTS)
        slots[slots == 0] = slots[:1]
        slots[:1] = 0
        slots[1::3] = -1
        return slots

    def integers(self, count: int, below: int) -> Tensor:
        return torch.randint(below, (count,), generator=self.generator).to(self.device)


def bits(tensor: Tensor) -> Tensor:
    """Integers, to be compared exactly."""
    return tensor.view(BITS[tensor.element_size()])


@contextmanager
def on_canvases(canvases: list[Canvas]) -> Iterator[None]:
    """Outputs that a wrapper allocates are poisoned and lie between canaries."""

    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        canvases.append(Canvas(shape, dtype, device))
        return canvases[-1].tensor

    with mock.patch.object(torch, "empty", empty):
        yield


def case(
    name: str,
    launches: Callable[[list[Tensor]], dict[str, Tensor]],
    changed: Sequence[Tensor],
    expected: Callable[[], dict[str, Tensor]],
    tolerance: float = 0.0,
) -> Case:
    """A case that can run again: each run changes copies of `changed`, on canvases."""
    canvases: list[Canvas] = []

    def run() -> dict[str, Tensor]:
        canvases[:] = [Canvas.of(tensor) for tensor in changed]
        with on_canvases(canvases):
            return launches([canvas.tensor for canvas in canvases])

    return Case(name=name, run=run, expected=expected, tolerance=tolerance, canvases=canvases)


ROTATIONS = [
    # rows, query heads, KV heads, head size, type, type of the cache, norm
    (7, 5, 3, 40, FLOAT, FLOAT, True),
    (9, 4, 1, 64, BFLOAT, BFLOAT, False),
    (5, 2, 2, 256, HALF, HALF, True),
    (6, 6, 2, 96, BFLOAT, FLOAT, True),
    (3, 7, 1, 32, FLOAT, BFLOAT, False),
    (1, 8, 2, 128, BFLOAT, HALF, True),
    (0, 2, 1, 32, FLOAT, FLOAT, False),
]


def rotation(draws: Draws, shape: tuple[int, int, int, int], dtype, cache_dtype, norm) -> Case:
    """Heads are a part of wider rows; the second row has a position beyond the tables."""
    num_rows, num_heads, num_kv_heads, size = shape
    wide = draws.floats(num_rows, num_heads + 2 * num_kv_heads + 2, size + 8, dtype=dtype)
    heads = wide[:, 1:-1, 4:-4]
    angles = draws.floats(LENGTH, size // 2, dtype=FLOAT)
    cos, sin = angles.cos(), angles.sin()
    positions = draws.integers(num_rows, LENGTH)
    positions[:1], positions[1:2] = LENGTH - 1, LENGTH
    slots = draws.slots(num_rows)
    caches = [draws.floats(NUM_SLOTS, num_kv_heads, size, dtype=cache_dtype) for _ in "kv"]
    norms = [draws.floats(size, dtype=dtype) for _ in "qk"]
    qk_norm = (norms[0], norms[1]) if norm else None

    def launches(changed: list[Tensor]) -> dict[str, Tensor]:
        key, value = changed
        query = kv.rotate_and_write(
            heads, num_heads, positions, slots, cos, sin, (key, value), qk_norm, 1e-3
        )
        return {"query": query, "key": key, "value": bits(value)}

    def padded(table: Tensor) -> Tensor:
        return torch.cat([table, torch.zeros_like(table[:1])])

    def expected() -> dict[str, Tensor]:
        parts = heads.double().split((num_heads, num_kv_heads, num_kv_heads), dim=1)
        turned = []
        for part, weight in zip(parts[:2], norms, strict=True):
            normed = torch_ops.rms_norm(part, weight.double(), 1e-3) if norm else part
            angle = [padded(table)[positions][:, None].double() for table in (cos, sin)]
            turned.append(torch_ops.rotary(normed, *angle))
        key, value = caches[0].double(), caches[1].clone()
        is_kept = slots >= 0
        key[slots[is_kept]] = turned[1][is_kept]
        value[slots[is_kept]] = heads[is_kept, num_heads + num_kv_heads :].to(cache_dtype)
        return {"query": turned[0], "key": key, "value": bits(value)}

    name = f"rotate {list(shape)} {dtype} into {cache_dtype}, norm {norm}"
    return case(name, launches, caches, expected, max(ROUNDING[dtype], ROUNDING[cache_dtype]))


def writing(draws: Draws, num_rows: int, num_kv_heads: int, size: int, dtype, cache_dtype) -> Case:
    """Keys and values of different strides."""
    key = draws.floats(num_rows, num_kv_heads + 1, size + 3, dtype=dtype)[:, 1:, 2:-1]
    value = draws.floats(num_rows, num_kv_heads, size + 1, dtype=dtype)[:, :, :-1]
    slots = draws.slots(num_rows).int()
    caches = [draws.floats(NUM_SLOTS, num_kv_heads, size, dtype=cache_dtype) for _ in "kv"]

    def launches(changed: list[Tensor]) -> dict[str, Tensor]:
        kv.write_kv(key, value, slots, (changed[0], changed[1]))
        return {"key": bits(changed[0]), "value": bits(changed[1])}

    def expected() -> dict[str, Tensor]:
        result, is_kept = [cache.clone() for cache in caches], slots >= 0
        for cache, part in zip(result, (key, value), strict=True):
            cache[slots[is_kept].long()] = part[is_kept].to(cache_dtype)
        return {"key": bits(result[0]), "value": bits(result[1])}

    name = f"write {num_rows} rows {num_kv_heads} x {size} {dtype} into {cache_dtype}"
    return case(name, launches, caches, expected)


MOVED = [(3, 40, BFLOAT), (3, 40, BFLOAT), (5, 36, BFLOAT), (4, 80, FLOAT), (3, 1, HALF)]
MOVED += [(3, 1, FLOAT)]
"""Heads, head size and type: rows of every width of word, with and without a last block."""


def moving(draws: Draws, name: str, sources: Tensor, targets: Tensor, num_slots: int) -> Case:
    """All of `MOVED` at once."""
    pools = [draws.floats(num_slots, heads, size, dtype=dtype) for heads, size, dtype in MOVED]

    def launches(changed: list[Tensor]) -> dict[str, Tensor]:
        kv.move_slots(changed, sources, targets)
        return {f"tensor {i}": bits(tensor) for i, tensor in enumerate(changed)}

    def expected() -> dict[str, Tensor]:
        moved = [pool.clone() for pool in pools]
        for result, pool in zip(moved, pools, strict=True):
            result[targets.long()] = pool[sources.long()]
        return {f"tensor {i}": bits(tensor) for i, tensor in enumerate(moved)}

    return case(f"move {len(sources)}: {name}", launches, pools, expected)


def moves(draws: Draws) -> Iterator[Case]:
    for count in (1, 7, 33, 256, 300):
        places = draws.places(count, 310)
        yield moving(draws, "a cycle", places, places.roll(1), 310)
    places = draws.places(20, NUM_SLOTS)
    yield moving(draws, "forwards", places[:-1].int(), places[1:].int(), NUM_SLOTS)
    yield moving(draws, "backwards", places[1:], places[:-1], NUM_SLOTS)
    yield moving(draws, "one to many", places[:1].repeat(19), places[:19], NUM_SLOTS)
    yield moving(draws, "nothing", places[:0], places[:0], NUM_SLOTS)


def norm(draws: Draws, num_rows: int, size: int, dtype: torch.dtype, has_delta: bool) -> Case:
    stream = draws.floats(num_rows, size, dtype=dtype)
    delta = draws.floats(num_rows, size, dtype=dtype) if has_delta else None
    weight = draws.floats(size, dtype=dtype)

    def launches(changed: list[Tensor]) -> dict[str, Tensor]:
        normed = rows.add_rms_norm(changed[0], delta, weight, 1e-2)
        return {"stream": bits(changed[0]), "normed": normed}

    def expected() -> dict[str, Tensor]:
        total = stream if delta is None else stream + delta
        normed = torch_ops.rms_norm(total.double(), weight.double(), 1e-2)
        return {"stream": bits(total), "normed": normed}

    name = f"norm [{num_rows}, {size}] {dtype}, delta {has_delta}"
    most = NORM_ROUNDING if size >= MANY else ROUNDING
    return case(name, launches, [stream], expected, most[dtype])


def gate(draws: Draws, num_rows: int, size: int, dtype: torch.dtype) -> Case:
    gate_up = 3 * draws.floats(num_rows, 2 * size, dtype=dtype)
    gate_up[:, :1], gate_up[:, 1:2] = -200.0, 200.0

    def expected() -> dict[str, Tensor]:
        gates, ups = gate_up.double().chunk(2, dim=-1)
        return {"product": functional.silu(gates) * ups}

    return case(
        f"gate [{num_rows}, {size}] {dtype}",
        lambda _: {"product": rows.silu_mul(gate_up)},
        [],
        expected,
        ROUNDING[dtype],
    )


PRODUCTS = [
    # rows, inner size, columns, type, has a bias
    (1, 150, 60, BFLOAT, True),
    (7, 128, 32, HALF, False),
    (33, 5, 33, BFLOAT, False),
    (17, 257, 40, HALF, True),
    (19, 70, 45, FLOAT, True),
    (0, 32, 32, FLOAT, False),
]


def product(
    draws: Draws, shape: tuple[int, int, int], dtype: torch.dtype, has_bias: bool, out_dtype
) -> Case:
    num_rows, size, num_columns = shape
    x, weight = (draws.floats(n, size, dtype=dtype) for n in (num_rows, num_columns))
    bias = draws.floats(num_columns, dtype=dtype) if has_bias else None

    def expected() -> dict[str, Tensor]:
        wide = None if bias is None else bias.double()
        return {"product": functional.linear(x.double(), weight.double(), wide)}

    return case(
        f"product {list(shape)} {dtype} to {out_dtype}, bias {has_bias}",
        lambda _: {"product": linear.linear(x, weight, bias, out_dtype=out_dtype)},
        [],
        expected,
        ROUNDING[out_dtype or dtype],
    )


def cases(device: torch.device, seed: int = 0) -> Iterator[Case]:
    """All of them."""
    draws = Draws(device, seed)
    for *shape, dtype, cache_dtype, has_norm in ROTATIONS:
        yield rotation(draws, tuple(shape), dtype, cache_dtype, has_norm)
    for *shape, dtype, cache_dtype, _ in ROTATIONS:
        yield writing(draws, shape[0], shape[2], shape[3], dtype, cache_dtype)
    yield from moves(draws)
    for num_rows, size in ((13, 50), (1, 1030), (7, 96), (0, 32)):
        for dtype in ROUNDING:
            yield norm(draws, num_rows, size, dtype, True)
    yield norm(draws, 19, 40, BFLOAT, False)
    for dtype in ROUNDING:
        yield gate(draws, 3, 1030, dtype)
    yield gate(draws, 0, 7, FLOAT)
    for *shape, dtype, has_bias in PRODUCTS:
        yield product(draws, tuple(shape), dtype, has_bias, None)
        yield product(draws, tuple(shape), dtype, has_bias, FLOAT)
