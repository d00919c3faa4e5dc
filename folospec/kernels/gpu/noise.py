"""Computes the keyed noise of `sampling.noise` inside Triton kernels: the same bits.

    key  = 64 bits mixed from (seed, sample_index, position, purpose)
    bits = mix32(mix32(token_id ^ low half) ^ high half), 32 bits
    v    = (bits + 0.5) * 2^-32                in (0, 1), exact in float64
    g    = -log(-log(1 - v))                   standard Gumbel, rounded to float32

`1 - v` is exact too: v is a multiple of 2^-33, so the difference fits 34 bits. Hence its logarithm
has the relative accuracy of log1p(-v), also where v is small, which is where large Gumbels lie.
"""

from __future__ import annotations

import triton
import triton.language as tl

TARGET = tl.constexpr(0)
ACCEPT = tl.constexpr(2)
RESIDUAL = tl.constexpr(3)
"""Of `sampling.noise.Purpose`."""


@triton.jit
def _mix64(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _absorb(state, part):
    return _mix64((state ^ part.to(tl.uint64)) + 0x9E3779B97F4A7C15)


@triton.jit
def key_of(seed, sample_index, position, purpose):
    """`sampling.noise.key` of int64 scalars, uint64."""
    state = _absorb(seed.to(tl.uint64) * 0, seed)
    state = _absorb(state, sample_index)
    state = _absorb(state, position)
    return _absorb(state, purpose)


@triton.jit
def purpose_code(kind, row):
    """`sampling.noise.purpose_code` of a draw that belongs to an int64 row of the step."""
    return 8 * (row + 1) + kind


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 15)) * 0x2C1B3C6D
    x = (x ^ (x >> 12)) * 0x297A2D39
    return x ^ (x >> 15)


@triton.jit
def bits(key, ids):
    """The 32 random bits of token ids, uint32."""
    low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    return _mix32(_mix32(ids.to(tl.uint32) ^ low) ^ high)


@triton.jit
def uniform(key, ids):
    """Uniforms on (0, 1), float64."""
    return (bits(key, ids).to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32


@triton.jit
def gumbel(key, ids):
    """Standard Gumbel noise, float32."""
    return (-tl.log(-tl.log(1.0 - uniform(key, ids)))).to(tl.float32)


@triton.jit
def rough_gumbel(key, ids):
    """`gumbel` within 1e-3, in float32 throughout: to tell what need not be looked at closely.

    log(1 - v) is taken from a series where v is small and from `1 - v`, made of the complementary
    bits, elsewhere.
    """
    random = bits(key, ids)
    v = (random.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest = ((random ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    small = v + v * v * (0.5 + v * 0.33333334)
    return -tl.log(tl.where(v < 0.00390625, small, -tl.log(rest)))
