"""Computes the operations of a decoder layer in plain torch: the reference for faster forms.

Every op works on one row at a time. Outside the matrix products, whose sums torch may order by the
number of rows, a row's bits do not depend on the rows beside it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale the last axis of `x` to unit root mean square, then by `weight` (Zhang, Sennrich, arXiv
    1910.07467).

    Args:
        x: [..., H] floats.
        weight: [H], of the type of `x`.
        eps: added to the mean square.
    """
    return functional.rms_norm(x, weight.shape[-1:], weight, eps)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head's halves by its row's angles (Su et al., arXiv 2104.09864; the half-split
    layout of Llama).

    Args:
        x: [N, heads, D] floats.
        cos, sin: [N, 1, D / 2], of the type of `x`.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Int8Weight(NamedTuple):
    """The weight of a linear as integers: row o of it is `values[o] * scale[o]`."""

    values: Tensor
    """int8 [out, in], in -127 .. 127."""
    scale: Tensor
    """[out], above 0; float32, or float64 for a float64 weight."""


def quantize_int8(weight: Tensor) -> Int8Weight:
    """Round every output channel to 255 even steps around 0, symmetrically; its largest entry
    becomes +-127. An entry is off by half a step at most: |weight - values * scale| <= scale / 2.

    Args:
        weight: [out, in] floats. A channel of zeros stays one.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scale = (wide.abs().amax(dim=1) / 127).clamp(min=torch.finfo(wide.dtype).tiny)
    return Int8Weight((wide / scale[:, None]).round().to(torch.int8), scale)


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ (weight * scale).T + bias`, with integer weights and float activations. The scale of a
    channel is a factor of its whole sum, so it is applied to the sum. This form widens the whole
    matrix at every call: it saves memory, and on large matrices it is far slower than floats.

    Args:
        x: [..., in] floats.
        weight: int8 [out, in].
        scale: [out] floats.
        bias: [out], of the type of `x`.

    Returns:
        [..., out] of the type of `x`; summed in float32 at least.

    Raises:
        ValueError: `scale` does not have one entry per output channel.
    """
    if scale.shape != weight.shape[:1]:
        raise ValueError(
            f"scale must have the shape [{len(weight)}], one entry per output channel, got "
            f"{list(scale.shape)}"
        )
    # Any float holds the integers; on a GPU the narrow product is the fast one, and sums widely.
    wide = x.dtype if x.is_cuda else torch.promote_types(x.dtype, torch.float32)
    out = functional.linear(x.to(wide), weight.to(wide)) * scale
    return (out if bias is None else out + bias).to(x.dtype)


def linear(x: Tensor, weight: Tensor | Int8Weight, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, whichever way the weight is kept.

    Args:
        x: [..., in] floats.
        weight: [out, in], of the type of `x`, or its int8 form.
        bias: [out], of the type of `x`.
    """
    if isinstance(weight, Int8Weight):
        return linear_int8(x, weight.values, weight.scale, bias)
    return functional.linear(x, weight, bias)
