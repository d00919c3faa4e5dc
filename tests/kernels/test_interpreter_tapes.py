"""What the interpreter remembers of an operation is what it would have found out."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import interpreter_tapes
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")
SIZE = 8


@triton.jit
def arithmetic(x, y, first):
    return x * y - tl.where(x > y, x, -0.0) + first / (x + 0.0)


@triton.jit
def branching(x, y, first):
    if first > 0:
        y = y + x
    return y


@triton.jit
def looping(x, y, first):
    for _ in range(0, first.to(tl.int32)):
        y += x
    return y


@triton.jit
def squaring(x, y, first):
    """Its operations are replayed one by one, for it looks at a value."""
    if first > 100:
        x = y
    return x * x + x * y


@triton.jit
def reducing(x, y, first):
    return x * tl.max(y, 0) - tl.sum(y)


@triton.jit
def both(x, y):
    return tl.minimum(x, y), tl.maximum(x, y)


@triton.jit
def joined(x, y, first):
    low, high = both(x, y)
    return low * 2 + high


@triton.jit
def apply_kernel(left, right, out, FUNCTION: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    found = FUNCTION(tl.load(left + at), tl.load(right + at), tl.load(left))
    tl.store(out + at, found)


FUNCTIONS = [arithmetic, branching, looping, squaring, reducing, joined]


def applied(function, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    out = torch.full((SIZE,), torch.nan)
    apply_kernel[1,](left, right, out, function, SIZE)
    return out


def operands() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Their first elements are of both signs; the first pair is one tensor twice."""
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(SIZE, generator=generator) * 2 + shift for shift in (-4, 3, 0, -1, 5)]
    return [(draws[0], draws[0]), *((x, y) for x in draws for y in draws if x is not y)]


def wrong_replays(function, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many results differ from those of an interpreter that remembers nothing."""
    tapes: dict = {}
    wrong = 0
    for left, right in operands():
        monkeypatch.setattr(interpreter_tapes, "_TAPES", {})
        expected = applied(function, left, right)
        monkeypatch.setattr(interpreter_tapes, "_TAPES", tapes)
        wrong += not torch.equal(applied(function, left, right), expected)
    assert any(tape is not None for tape in tapes.values())
    return wrong


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_replayed_operation_computes_what_a_new_one_does(function, monkeypatch):
    assert wrong_replays(function, monkeypatch) == 0


def test_operations_are_those_of_torch():
    for left, right in operands():
        assert torch.equal(applied(branching, left, right), right + left * (left[0] > 0))
        assert torch.equal(applied(squaring, left, right), left * left + left * right)


@pytest.mark.parametrize("function", [branching, looping], ids=["branching", "looping"])
def test_a_recorder_that_does_not_notice_values_is_detected(function, monkeypatch):
    monkeypatch.setattr("quick_interpreter.look_at_a_value", lambda: None)
    assert wrong_replays(function, monkeypatch) > 0


def test_constants_are_known_by_type_and_value():
    handles: list = []
    values = [0, 1, 2, False, True, 0.0, -0.0, 1.0, "1", None, (1,), [1], tl.constexpr(1)]
    keys = {interpreter_tapes._key_of(value, handles) for value in values}
    assert len(keys) == len(values)
    assert handles == []
    with pytest.raises(TypeError):
        interpreter_tapes._key_of(object(), handles)
