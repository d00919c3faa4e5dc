"""The product of the mended interpreter: right, and the same bits however many rows there are."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import numpy as np
import torch
import triton
import triton.language as tl
import triton_interpreter

SIZES = (16, 32, 64, 128)


def operands(rows: int, inner: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(rows + inner + columns)
    left = rng.standard_normal((rows, inner), np.float32)
    return left, rng.standard_normal((inner, columns), np.float32)


def rows_that_differ(product, left: np.ndarray, right: np.ndarray) -> int:
    """How many rows have other bits when they are computed with fewer rows beside them."""
    whole = product(left, right, np.dtype(np.float32))
    return sum(
        not np.array_equal(product(left[:count], right, np.dtype(np.float32)), whole[:count])
        for count in (1, 2, 3, 8, 16, len(left) - 1)
    )


@pytest.mark.parametrize("inner", SIZES)
@pytest.mark.parametrize("columns", SIZES)
def test_a_row_of_a_product_has_the_same_bits_with_any_number_of_rows(inner: int, columns: int):
    left, right = operands(128, inner, columns)
    assert rows_that_differ(triton_interpreter.product, left, right) == 0


def test_a_product_in_another_order_for_many_rows_is_detected():
    def reordered(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
        if len(a) > 16:
            a, b = a[:, ::-1], b[::-1]
        return triton_interpreter.product(a, b, dtype)

    assert rows_that_differ(reordered, *operands(128, 64, 64)) > 0


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_product_is_that_of_float64_up_to_rounding(is_transposed: bool):
    left, right = operands(16, 64, 32)
    if is_transposed:
        right = np.ascontiguousarray(right.T).T
    exact = left.astype(np.float64) @ right.astype(np.float64)
    found = triton_interpreter.product(left, right, np.dtype(np.float32))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


@triton.jit
def widen_kernel(source, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(source + at).to(tl.float32))


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")
def test_every_bfloat16_is_itself_in_float32():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    source, out = bits.view(torch.bfloat16), torch.empty(2**16)
    widen_kernel[1,](source, out, 2**16)
    assert torch.equal(out.view(torch.int32), bits.int() << 16)
