"""Computes what a decoder does to each row between its matrix products: norms and gates.

A program has a whole row, or a part of one, whatever rows run with it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from folospec.kernels.gpu import launch

GATE_BLOCK = 1024
"""Columns of a program of `silu_mul`."""
COLUMNS_PER_WARP = 512
"""Columns of the norm that a warp has, 16 a thread."""


@triton.jit
def _add_rms_norm(
    stream,
    delta,
    weight,
    normed,
    eps,
    HAS_DELTA: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    place = tl.program_id(0).to(tl.int64) * SIZE + column
    x = tl.load(stream + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        x += tl.load(delta + place, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(stream.dtype.element_ty)
        tl.store(stream + place, rounded, mask=inside)
        x = rounded.to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / SIZE + eps)
    x = x * factor * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + place, x.to(normed.dtype.element_ty), mask=inside)


def add_rms_norm(stream: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Add to the residual stream, and norm what it is then (`torch_ops.rms_norm`).

    The sum is rounded to the stream's type before the norm reads it, as torch would; the norm is
    computed in float32 and rounded once.

    Args:
        stream: [N, H] floats, contiguous; `delta` is added in place.
        delta: [N, H] of the stream's type, contiguous; None adds nothing.
        weight: [H].
        eps: added to the mean square.

    Returns:
        [N, H] of the stream's type.

    Raises:
        ValueError: the shapes do not fit each other, or are strided.
    """
    num_rows, size = stream.shape
    if weight.shape != (size,):
        raise ValueError(f"weight must have the shape [{size}], got {list(weight.shape)}")
    if not stream.is_contiguous() or (
        delta is not None and (delta.shape != stream.shape or not delta.is_contiguous())
    ):
        raise ValueError(
            f"stream and delta must be contiguous and alike, got {list(stream.shape)} and "
            f"{None if delta is None else list(delta.shape)}"
        )
    normed = torch.empty(num_rows, size, dtype=stream.dtype, device=stream.device)
    block = triton.next_power_of_2(size)
    launch.launch(
        _add_rms_norm,
        (num_rows,),
        *(stream, stream if delta is None else delta, weight, normed, eps),
        HAS_DELTA=delta is not None,
        SIZE=size,
        BLOCK=block,
        num_warps=min(max(block // COLUMNS_PER_WARP, 1), 16),
    )
    return normed


@triton.jit
def _silu_mul(gate_up, product, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    source = gate_up + row * (2 * SIZE) + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + SIZE, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(product + row * SIZE + column, result.to(product.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, in float32, rounded once.

    Args:
        gate_up: [N, 2 I] floats, gate first, contiguous.

    Returns:
        [N, I] of the type of `gate_up`.

    Raises:
        ValueError: the width is odd, or rows are strided.
    """
    num_rows, width = gate_up.shape
    if width % 2 or not gate_up.is_contiguous():
        raise ValueError(
            f"gate_up must be [N, 2 I] and contiguous, got {list(gate_up.shape)} with strides "
            f"{gate_up.stride()}"
        )
    size = width // 2
    product = torch.empty(num_rows, size, dtype=gate_up.dtype, device=gate_up.device)
    launch.launch(
        _silu_mul,
        (num_rows, triton.cdiv(size, GATE_BLOCK)),
        *(gate_up, product),
        SIZE=size,
        BLOCK=GATE_BLOCK,
        num_warps=4,
    )
    return product
