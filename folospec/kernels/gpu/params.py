"""Holds what sampling kernels share: the parameters of a row, and the odds of its tokens.

A parameter set is six int64, as `sampling_records.pack_sampling` packs them: seed, sample_index,
then the bits of three float64, temperature (0 is greedy), top_p (1: all) and log min_p (-inf: all),
then top_k (0: all). A draw is four int64: the index of its parameter set (-1: nothing is asked),
its row of logits, the position of its token (-1: without noise), and the bits of a float64, the
scale of a confidence.

Rows are cut in parts of PART tokens, a program each. What parts say of their row is maxima and sums
of integers, which have no order, so that the result is the same however it is cut.
"""

from __future__ import annotations

import triton
import triton.language as tl

MOST = tl.constexpr(2**62)
"""More than any token id or order key."""
NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def temperature_of(params, SOFTENS: tl.constexpr):
    """float64; where SOFTENS, 1 for a greedy parameter set."""
    temperature = tl.load(params + 2).to(tl.float64, bitcast=True)
    return tl.where(SOFTENS & (temperature == 0), 1.0, temperature)


@triton.jit
def filters_of(params):
    """top_p, log min_p (float64) and top_k (int64)."""
    top_p = tl.load(params + 3).to(tl.float64, bitcast=True)
    floor = tl.load(params + 4).to(tl.float64, bitcast=True)
    return top_p, floor, tl.load(params + 5)


@triton.jit
def has_filters(params, vocab):
    """Whether the parameter set keeps less than the row. A greedy one has no use for filters."""
    top_p, floor, top_k = filters_of(params)
    some = (top_p < 1) | (floor > NEG_INF) | ((top_k > 0) & (top_k < vocab))
    return some & (tl.load(params + 2).to(tl.float64, bitcast=True) > 0)


@triton.jit
def peak_of(peaks, num_parts, PARTS: tl.constexpr):
    """The largest logit of a row, float32, from those of its parts; NaN if there is one."""
    part = tl.arange(0, PARTS)
    found = tl.load(peaks + part, mask=part < num_parts, other=NEG_INF)
    is_nan = tl.max((found != found).to(tl.int32), 0) > 0
    peak = tl.max(tl.where(found != found, NEG_INF, found), 0)
    return tl.where(is_nan, float("nan"), peak)


@triton.jit
def is_finite(x):
    return (x > NEG_INF) & (x < float("inf"))


@triton.jit
def total_of(totals, num_parts, PARTS: tl.constexpr):
    """The sum over the parts of a row, int64."""
    part = tl.arange(0, PARTS)
    return tl.sum(tl.load(totals + part, mask=part < num_parts, other=0), 0)


@triton.jit
def scale_down(logits, peak, temperature):
    """(logit - peak) / temperature, float64. The peak goes first: a tiny temperature then makes
    -inf of the others, and never inf - inf."""
    return (logits.to(tl.float64) - peak.to(tl.float64)) / temperature


@triton.jit
def weight_of(scaled, BITS: tl.constexpr):
    """exp as a fixed-point integer with BITS bits of fraction, int64, for sums without an order."""
    odds = tl.exp(scaled) * (2.0**BITS)
    # To the nearest, ties to even; from 2^52 on there are only integers.
    rounded = (odds + 4503599627370496.0) - 4503599627370496.0
    return tl.where(odds < 4503599627370496.0, rounded, odds).to(tl.int64)


@triton.jit
def log_of_weight(weight, BITS: tl.constexpr):
    """The logarithm of what a fixed-point integer stands for, float64."""
    return tl.log(weight.to(tl.float64) * (0.5**BITS))
