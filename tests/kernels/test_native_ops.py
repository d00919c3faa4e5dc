"""Every native op equals its torch form in float64, on shapes that are multiples of nothing, and a
row's bits do not depend on the rows beside it."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import pytest
import torch
from native_builds import ARM, NEON, X86, breakable, built_for, require_native
from torch import Tensor

from folospec.kernels.native import Native, matrix
from folospec.kernels.torch_ops import Int8Weight, linear, quantize_int8, rms_norm, rotary

ROWS = (*range(1, 21), 33, 64)
SHAPES = ((1, 1), (3, 5), (13, 31), (50, 64), (97, 130), (64, 1030), (101, 2100))
"""Outputs and inputs; the last two are longer than a chunk of any of the weights."""
FORMATS = ("float32", "bfloat16", "int8")
EPSILON = 2.0**-24
"""Half a unit in the last place of 1, float32."""


@pytest.fixture(scope="module", params=["own", *ARM])
def native(request) -> Native:
    """This machine's kernels; and those for Arm, emulated where it is none."""
    return require_native() if request.param == "own" else built_for(request.param)


class Case:
    """A product: its matrix, and the exact result for the numbers that the kernel is to sum."""

    def __init__(self, kind: str, out: int, inner: int, rows: int, bias: bool = True) -> None:
        noise = torch.Generator().manual_seed(out + inner)
        self.x = torch.randn(rows, inner, generator=noise)
        self.bias = torch.randn(out, generator=noise) if bias else None
        weight = torch.randn(out, inner, generator=noise) * torch.linspace(0.5, 2, out)[:, None]
        self.weight: Tensor | Int8Weight = weight
        exact, x = weight.double(), self.x.double()
        if kind == "bfloat16":
            self.weight = weight.bfloat16()
            exact, x = self.weight.double(), self.x.bfloat16().double()
        elif kind == "int8":
            self.weight = quantize_int8(weight)
            exact = self.weight.values.double() * self.weight.scale.double()[:, None]
        wide = None if self.bias is None else self.bias.double()
        self.exact = linear(x, exact, wide)
        # What any order of a float32 sum keeps to, and what is lost at the end.
        self.bound = EPSILON * (math.sqrt(inner) + 4) * (x.abs() @ exact.abs().T + 1)

    def run(self, native: Native, rows: int | None = None) -> Tensor:
        described = matrix(self.weight, self.bias)
        return native.apply_linear(self.x[:rows], described)

    def excess(self, native: Native) -> float:
        """The largest error, as a multiple of the bound."""
        return float(((self.run(native).double() - self.exact).abs() / self.bound).max())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("out", "inner"), SHAPES)
def test_linear_is_the_exact_product_up_to_float32_rounding(native, kind, out, inner, bias):
    for rows in ROWS:
        assert Case(kind, out, inner, rows, bias).excess(native) < 1


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_of_a_linear_have_the_same_bits_in_any_company_and_on_any_threads(native, kind):
    for out, inner in ((13, 31), (97, 130), (101, 2100)):
        case = Case(kind, out, inner, 64)
        whole = case.run(native)
        for rows in ROWS:
            assert torch.equal(case.run(native, rows), whole[:rows])
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 3, 4):
                torch.set_num_threads(threads)
                assert all(torch.equal(case.run(native, n), whole[:n]) for n in (1, 8, 33))
        finally:
            torch.set_num_threads(before)


def test_a_sum_by_the_number_of_rows_is_as_right_and_has_other_bits():
    """Control of the test above."""
    case = Case("float32", 97, 130, 33)
    with breakable().without("a sum by the number of rows") as broken:
        assert case.excess(broken) < 1
        assert not torch.equal(case.run(broken, 3), case.run(broken)[:3])
    fine = breakable().library
    assert torch.equal(case.run(fine, 3), case.run(fine)[:3])


def test_threads_that_fall_asleep_where_they_meet_are_woken():
    """In this build they hardly spin; one that were not woken would never end."""
    case, library = Case("float32", 97, 130, 3), breakable().library
    alone = case.run(library)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        assert all(torch.equal(case.run(library), alone) for _ in range(200))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("target", X86)
@pytest.mark.parametrize("kind", FORMATS)
def test_linear_of_builds_for_lesser_machines(target, kind):
    lesser = built_for(target)
    for rows in (1, 4, 7, 13, 33):
        case = Case(kind, 97, 1030, rows)
        assert case.excess(lesser) < 1
        assert torch.equal(case.run(lesser, 1), case.run(lesser)[:1])


@pytest.mark.parametrize(
    ("rule", "kind"),
    [("no last columns", kind) for kind in FORMATS]
    + [("the first scales for all", "int8")]
    + [("the first biases for all", kind) for kind in FORMATS],
)
def test_a_broken_rule_of_linear_is_seen(rule, kind):
    for rows in (1, 5, 20):
        case = Case(kind, 13, 31, rows)
        assert case.excess(breakable().library) < 1
        with breakable().without(rule) as broken:
            assert case.excess(broken) > 1000


def norm(native: Native, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    native.rms_norm(x.data_ptr(), weight.data_ptr(), *x.shape, eps, out.data_ptr())
    return out


@pytest.mark.parametrize("size", [16, 32, 48, 96, 576, 2048])
def test_rms_norm(native, size):
    noise = torch.Generator().manual_seed(size)
    x, weight = torch.randn(7, size, generator=noise), torch.randn(size, generator=noise)
    x[1] *= 1e-4  # where epsilon counts
    x[2] *= 1e4
    x[3] = 0
    expected = rms_norm(x.double(), weight.double(), 1e-6)
    torch.testing.assert_close(norm(native, x, weight, 1e-6).double(), expected, rtol=1e-6, atol=0)
    with breakable().without("no epsilon") as broken:
        assert not torch.allclose(norm(broken, x, weight, 1e-6)[1].double(), expected[1], rtol=1e-3)


def rotated(native: Native, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = x.clone()
    native.rotate(out.data_ptr(), cos.data_ptr(), sin.data_ptr(), *x.shape)
    return out


@pytest.mark.parametrize("size", [2, 6, 32, 64, 80, 128])
def test_rotation(native, size):
    noise = torch.Generator().manual_seed(size)
    x, angles = torch.randn(5, 3, size, generator=noise), torch.randn(5, size // 2, generator=noise)
    cos, sin = angles.cos(), angles.sin()
    wide = (cos.double()[:, None], sin.double()[:, None])
    expected = rotary(x.double(), *wide)
    torch.testing.assert_close(rotated(native, x, cos, sin).double(), expected, rtol=0, atol=1e-6)
    with breakable().without("a rotation the other way") as broken:
        assert (rotated(broken, x, cos, sin).double() - expected).abs().max() > 0.1


def gated(native: Native, gate: Tensor, up: Tensor) -> Tensor:
    out, both = torch.empty_like(gate), torch.cat((gate, up), dim=1).contiguous()
    native.silu_mul(both.data_ptr(), *gate.shape, out.data_ptr())
    return out


def test_silu_is_right_to_a_few_units_in_the_last_place_wherever_it_is(native):
    """And so is the exponential in it."""
    gate = torch.cat([torch.linspace(-87, 100, 40_001), torch.logspace(-30, 0, 16383)]).view(4, -1)
    expected = torch.nn.functional.silu(gate.double())
    error = (gated(native, gate, torch.ones_like(gate)).double() / expected - 1).abs()
    error[expected == 0] = 0
    assert error.max() < 4 * 2 * EPSILON
    with breakable().without("no sigmoid") as broken:
        wrong = (gated(broken, gate, torch.ones_like(gate)).double() / expected - 1).abs()
        assert wrong[expected != 0].max() > 0.1


def test_silu_of_what_is_out_of_range(native):
    gate = torch.tensor([[-torch.inf, -200.0, -88.0, 0.0, 200.0, torch.inf, torch.nan, 1.0]])
    out = gated(native, gate.repeat(1, 2), torch.full((1, 16), 2.0))[0, :8]
    assert out[6].isnan()
    assert out[1:3].abs().max() < 1e-35
    assert out[3:6].tolist() == [0.0, 400.0, torch.inf]


def test_the_gate_is_multiplied(native):
    noise = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, 9, 112, generator=noise)
    expected = torch.nn.functional.silu(gate.double()) * up.double()
    torch.testing.assert_close(gated(native, gate, up).double(), expected, rtol=1e-6, atol=0)


SOURCES, TARGETS = [4, 5, 6, 0, 9], [5, 6, 7, 4, 0]
"""Rows that are read and rows that are written overlap, in either direction."""


def moved(native: Native) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors of several types, as torch moves their rows and as the library does."""
    noise = torch.Generator().manual_seed(1)
    tensors = [
        torch.randn(12, 2, 3, generator=noise),
        torch.randn(12, 5, generator=noise).bfloat16(),
        torch.randint(0, 100, (12,), generator=noise),
    ]
    expected = [tensor.clone() for tensor in tensors]
    for tensor in expected:
        tensor[TARGETS] = tensor[SOURCES]
    native.move(tensors, SOURCES, TARGETS)
    return tensors, expected


def test_all_rows_are_read_before_one_is_written(native):
    assert all(torch.equal(a, b) for a, b in zip(*moved(native), strict=True))
    with breakable().without("rows read late") as broken:
        assert not all(torch.equal(a, b) for a, b in zip(*moved(broken), strict=True))


WRONG: dict[str, Callable[[Native], bool]] = {
    "no last columns": lambda library: Case("float32", 13, 31, 5).excess(library) > 1000,
    "the first scales for all": lambda library: Case("int8", 13, 31, 5).excess(library) > 1000,
    "no epsilon": lambda library: not norm(library, TINY, ONES, 1e-6).abs().max() < 0.1,
    "a rotation the other way": lambda library: rotated(library, HEADS, *ANGLES)[0, 0, 0] > 0,
    "no sigmoid": lambda library: gated(library, ONES[None], ONES[None])[0, 0] < 0.7,
    "rows read late": lambda library: not all(map(torch.equal, *moved(library))),
    "a sum by the number of rows": lambda library: (
        not torch.equal(*(Case("float32", 97, 130, 33).run(library, rows)[:3] for rows in (3, 33)))
    ),
}
TINY, ONES = torch.full((1, 32), 1e-5), torch.ones(32)
HEADS, ANGLES = torch.ones(1, 1, 2), (torch.tensor([[0.6]]), torch.tensor([[0.8]]))


@pytest.mark.parametrize("rule", WRONG)
def test_a_broken_rule_is_seen_in_a_build_for_neon(rule):
    """Control of the emulated tests above."""
    build = breakable(NEON)
    assert not WRONG[rule](build.library)
    with build.without(rule) as broken:
        assert WRONG[rule](broken)


def test_nothing_to_move_moves_nothing(native):
    tensor = torch.arange(6.0).view(3, 2)
    native.move([tensor], [], [])
    assert tensor.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_reading_sums_what_it_reads(native):
    numbers = torch.arange(64 * 100, dtype=torch.float32) % 7
    for threads in (1, 2, 3):
        total = native.read(numbers.data_ptr(), len(numbers), threads)
        assert total == float(numbers.sum())


def test_a_matrix_describes_tensors_where_they_lie():
    weight, bias = torch.randn(6, 4), torch.randn(6)
    described = matrix(weight, bias)
    assert (described.data, described.bias, described.scale) == (
        *(weight.data_ptr(), bias.data_ptr()),
        None,
    )
    assert (described.out_size, described.in_size, described.format) == (6, 4, 0)
    quantized = quantize_int8(weight)
    described = matrix(quantized)
    assert (described.data, described.scale) == tuple(t.data_ptr() for t in quantized)
    with pytest.raises(ValueError, match="not contiguous"):
        matrix(weight.T)
    with pytest.raises(ValueError, match=r"must be one of .*, got torch\.float64"):
        matrix(weight.double())


def test_a_build_says_itself_what_it_was_built_for():
    assert built_for("x86-64-v3").instructions == "AVX2"
    assert built_for("x86-64").instructions == "no vector instructions in particular"


def test_structs_that_differ_from_the_sources_are_refused(monkeypatch):
    from folospec.kernels import native as module

    require_native()

    class Longer(ctypes.Structure):
        _fields_ = [*module.Pass._fields_, ("more", ctypes.c_int64)]

    monkeypatch.setattr(module, "_STRUCTS", (*module._STRUCTS[:-1], Longer))
    with pytest.raises(AssertionError, match="structs differ"):
        Native()
