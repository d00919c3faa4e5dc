"""Multiplies rows by a matrix so that no row's bits depend on the other rows.

Libraries choose block sizes, and splits of the sum, by the number of rows. Here all of that is
fixed by the type alone. An output element is the dot product of its own row and column, summed by
one program, over K in one order, with one instruction:

    k          0 .. BLOCK | .. 2 BLOCK | ... | .. K, zeros behind it
    element    sum       ->  sum      -> ...  ->  + bias, rounded once

Of a tile's elements, a matrix instruction computes each from its own row and column; which rows of
the tile are others, or zeros, is nothing to it. That the hardware also adds up the same way in each
row of a tile is its own affair: only a run on a card can confirm it.

Every tile of rows reads the whole weight, from the cache at best, so steps of many rows pay.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from folospec.kernels.gpu import launch


class Blocks(NamedTuple):
    """The sizes of a tile, [rows, columns] summed over `inner`, and how it is run."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int


# The fewest rows of a matrix instruction, since most steps have few; the columns are few too, that
# narrow weights busy all processors, and the stages many, that each has enough bytes on their way.
HALF = Blocks(rows=16, columns=32, inner=128, num_warps=4, num_stages=4)
BLOCKS = {
    torch.bfloat16: HALF,
    torch.float16: HALF,
    torch.float32: Blocks(rows=16, columns=32, inner=32, num_warps=4, num_stages=3),
}
"""By type, and by nothing else: bits depend on them."""


@triton.jit(do_not_specialize=["num_rows"])
def _linear(
    x,
    weight,
    bias,
    out,
    num_rows,
    num_columns,
    size,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    is_row, is_column = row < num_rows, column < num_columns
    x += row.to(tl.int64)[:, None] * size + inner[None, :]
    weight += column.to(tl.int64)[None, :] * size + inner[:, None]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, size, INNER):
        is_inner = start + inner < size
        rows = tl.load(x + start, mask=is_row[:, None] & is_inner[None, :], other=0.0)
        columns = tl.load(weight + start, mask=is_inner[:, None] & is_column[None, :], other=0.0)
        total = tl.dot(rows, columns, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    place = out + row.to(tl.int64)[:, None] * num_columns + column[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """`x @ weight.T + bias`, summed in float32, rounded once; a row's bits depend on nothing but
    that row and the weights.

    Args:
        x: [N, K] float32, bfloat16 or float16.
        weight: [out, K] of the type of `x`, contiguous.
        bias: [out] of any float type.
        out_dtype: type of the result; that of `x` if None.

    Returns:
        [N, out].

    Raises:
        ValueError: a type is not served, or the shapes do not fit each other.
    """
    blocks = BLOCKS.get(x.dtype)
    if blocks is None or weight.dtype != x.dtype:
        raise ValueError(
            f"x and weight must be of one type in {', '.join(map(str, BLOCKS))}, got {x.dtype} and "
            f"{weight.dtype}"
        )
    num_rows, size = x.shape
    num_columns = len(weight)
    if weight.shape != (num_columns, size) or not weight.is_contiguous():
        raise ValueError(
            f"weight must be [out, {size}] and contiguous, got {list(weight.shape)} with strides "
            f"{weight.stride()}"
        )
    if bias is not None and bias.shape != (num_columns,):
        raise ValueError(f"bias must have the shape [{num_columns}], got {list(bias.shape)}")
    out = torch.empty(num_rows, num_columns, dtype=out_dtype or x.dtype, device=x.device)
    launch.launch(
        _linear,
        (triton.cdiv(num_rows, blocks.rows), triton.cdiv(num_columns, blocks.columns)),
        *(x.contiguous(), weight, out if bias is None else bias, out),
        *(num_rows, num_columns, size),
        HAS_BIAS=bias is not None,
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        INNER=blocks.inner,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    return out
