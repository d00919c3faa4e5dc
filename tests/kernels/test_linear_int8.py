"""Int8 weights are the nearest of their grid, and the int8 linear is the float one on that grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from folospec.kernels.torch_ops import Int8Weight, linear, linear_int8, quantize_int8

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCES = [1e-12, 1e-4, 0.1, 0.02]


def random_weight(out: int, inner: int, dtype: torch.dtype) -> Tensor:
    """Channels of very different size, the third of them zero."""
    draws = torch.Generator().manual_seed(out)
    weight = torch.randn(out, inner, generator=draws, dtype=torch.float64)
    weight *= torch.logspace(-3, 1, out, dtype=torch.float64)[:, None]
    weight[2] = 0
    return weight.to(dtype)


def worst_error(weight: Tensor, quantized: Int8Weight) -> float:
    """The largest error of an entry, in steps of its channel."""
    values, scale = quantized.values.double(), quantized.scale.double()[:, None]
    return float(((weight.double() - values * scale) / scale).abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_entry_is_off_by_half_a_step_at_most(dtype):
    weight = random_weight(24, 40, dtype)
    quantized = quantize_int8(weight)
    assert quantized.values.dtype == torch.int8
    assert 0.25 < worst_error(weight, quantized) <= 0.5 + 1e-4


@pytest.mark.parametrize("spoil", ["scale of the inputs", "one scale", "rounding down"])
def test_another_grid_breaks_the_bound(spoil):
    """Control of the test above."""
    weight = random_weight(24, 24, torch.float64)
    values, scale = quantize_int8(weight)
    if spoil == "scale of the inputs":
        scale = quantize_int8(weight.T).scale
    elif spoil == "one scale":
        scale = scale.max().expand_as(scale)
    else:
        values = (weight / scale[:, None]).floor().to(torch.int8)
    assert worst_error(weight, Int8Weight(values, scale)) > 0.6


def test_the_largest_entry_of_a_channel_is_127_either_way():
    weight = random_weight(24, 40, torch.float32)
    largest = quantize_int8(weight).values.int().abs().amax(dim=1)
    assert largest.tolist() == [127] * 2 + [0] + [127] * 21
    assert quantize_int8(torch.tensor([[-3.0, 1.5]])).values.tolist() == [[-127, 64]]


def test_a_channel_of_zeros_stays_one():
    quantized = quantize_int8(torch.zeros(3, 5))
    assert quantized.values.count_nonzero() == 0
    assert (quantized.scale > 0).all()
    out = linear_int8(torch.randn(2, 5), *quantized, torch.tensor([1.0, 2.0, 3.0]))
    assert out.tolist() == [[1.0, 2.0, 3.0]] * 2


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), list(zip(DTYPES, TOLERANCES, strict=True)))
def test_the_product_is_that_of_the_floats_on_the_grid(dtype, tolerance, with_bias):
    quantized = quantize_int8(random_weight(24, 40, dtype))
    x, bias = torch.randn(5, 40).to(dtype), torch.randn(24).to(dtype) if with_bias else None
    weight = quantized.values.double() * quantized.scale.double()[:, None]
    expected = x.double() @ weight.T + (0 if bias is None else bias.double())
    out = linear_int8(x, *quantized, bias)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_a_scale_along_the_inputs_gives_another_product():
    """Control of the test above, and a scale that does not even fit is refused."""
    weight = random_weight(24, 24, torch.float64)
    x = torch.randn(5, 24, dtype=torch.float64)
    values, scale = quantize_int8(weight)
    wrong = linear_int8(x, values, quantize_int8(weight.T).scale)
    assert not torch.allclose(wrong, linear_int8(x, values, scale), rtol=0.1)
    with pytest.raises(ValueError, match=r"shape \[24\], one entry per output channel, got \[40\]"):
        linear_int8(torch.randn(5, 40), random_weight(24, 40, torch.float32).char(), scale.new(40))


def test_sums_in_half_precision_do_not_overflow():
    x, weight = torch.full((1, 64), 50.0).half(), torch.full((1, 64), 0.5).half()
    assert float(x @ quantize_int8(weight).values.half().T) == float("inf")
    assert float(linear_int8(x, *quantize_int8(weight))) == 1600.0


def test_linear_takes_either_kind_of_weight():
    weight, x, bias = random_weight(24, 40, torch.float32), torch.randn(5, 40), torch.randn(24)
    assert torch.equal(linear(x, weight, bias), functional.linear(x, weight, bias))
    quantized = quantize_int8(weight)
    assert torch.equal(linear(x, quantized, bias), linear_int8(x, *quantized, bias))
