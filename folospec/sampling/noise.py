"""Computes keyed noise: one number per key and token id, the same on every device.

It is the same in every batch, too.

    key  = 64 bits mixed on the host from (seed, sample_index, position, purpose)
    bits = mix32(mix32(token_id ^ low half) ^ high half), 32 bits
    v    = (bits + 0.5) * 2^-32                in (0, 1), exact in float64
    g    = -log(-log1p(-v))                    standard Gumbel, in [-3.2, 22.9], rounded to float32

Nothing here has state or order: a drafter with a reduced vocabulary looks up the very numbers that
the target's full row has. `mix32` is a bijection, so two tokens of one row never share their bits.
The Gumbel is taken in float64 because the large values, which decide who wins, come from small `v`:
in float32 the uniforms near an end collide.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MASK64 = 0xFFFFFFFFFFFFFFFF
_MASK32 = 0xFFFFFFFF
_GOLDEN64 = 0x9E3779B97F4A7C15
# Both below 2^31, so that the product with 32 bits fits a signed 64-bit integer on every device.
_MULTIPLIER_1 = 0x2C1B3C6D
_MULTIPLIER_2 = 0x297A2D39


class Purpose(IntEnum):
    """What a draw is for; draws of different purposes are independent."""

    TARGET = 0
    """The token itself; keyed by its absolute position."""
    DRAFT = 1
    """A drafter's own sampling, for the rules that need it independent of the target's."""
    ACCEPT = 2
    """The coin of an acceptance test."""
    RESIDUAL = 3
    """The token drawn after a rejection."""


def purpose_code(kind: Purpose, row: int | None = None, stream: int = 0) -> int:
    """The purpose of a draw, as `key` takes it.

    Args:
        kind: what the draw is for.
        row: for noise keyed by the position of the root, the row of the step (0 is the root) that
            the draw belongs to.
        stream: which of several independent sources draws, of those keyed by the root.
    """
    return int(kind) if row is None else int(kind) + 8 * (row + 1) + (stream << 40)


def key(seed: int, sample_index: int, position: int, purpose: int) -> int:
    """Mix four integers to the key of one row of noise.

    Each is taken modulo 2^64. `position` is the absolute position of the token being drawn,
    `purpose` a `Purpose` or a `purpose_code`.

    Returns:
        A signed 64-bit integer, ready for `key_tensor`.
    """
    state = 0
    for part in (seed, sample_index, position, purpose):
        state = _mix64(((state ^ part) + _GOLDEN64) & _MASK64)
    return state - ((state >> 63) << 64)


def derived_seed(engine_seed: int, ordinal: int) -> int:
    """The seed of the engine's request number `ordinal` when it brought none: 64 bits, unsigned."""
    state = _mix64(((engine_seed & _MASK64) + _GOLDEN64) & _MASK64)
    return _mix64(((state ^ ordinal) + _GOLDEN64) & _MASK64)


def key_tensor(keys: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Keys of `key` as int64 [num_rows]."""
    return torch.tensor(keys, dtype=torch.int64, device=device)


def bits(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Look up the 32 random bits of every token id in every row.

    Args:
        keys: int64 [num_rows].
        token_ids: int64 [num_ids] or [1, num_ids], the same ids for every row, or [num_rows,
            num_ids].

    Returns:
        int64 [num_rows, num_ids], in [0, 2^32).
    """
    return elementwise_bits(keys[:, None], token_ids)


def elementwise_bits(keys: Tensor, token_ids: Tensor) -> Tensor:
    """`bits` for keys and token ids (int64) that broadcast against each other."""
    if keys.device.type == "cpu":
        return torch.from_numpy(_host_bits(keys.numpy(), token_ids.numpy()))
    return _device_bits(keys, token_ids)


def _device_bits(keys: Tensor, token_ids: Tensor) -> Tensor:
    low, high = keys & _MASK32, (keys >> 32) & _MASK32
    return _mix32_(_mix32_(token_ids ^ low).bitwise_xor_(high))


def _host_bits(keys: NDArray[np.int64], token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same in numpy, whose 32-bit integers wrap around by themselves: several times as fast."""
    low, high = keys.astype(np.uint32), (keys >> 32).astype(np.uint32)
    mixed = np.asarray(token_ids.astype(np.uint32) ^ low)  # of no dimension, it would be a number
    for other in (high, 0):
        mixed ^= mixed >> 15
        mixed *= _MULTIPLIER_1
        mixed ^= mixed >> 12
        mixed *= _MULTIPLIER_2
        mixed ^= mixed >> 15
        mixed ^= other
    return mixed.astype(np.int64)


def uniform(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Uniforms on (0, 1), float64, of the shape of `bits`; no two ids of a row share one."""
    return _to_uniform(bits(keys, token_ids))


def uniform_number(key: int, token_id: int = 0) -> float:
    """The number that `uniform` has for one key and token id: a coin is not worth a tensor."""
    low, high = key & _MASK32, (key >> 32) & _MASK32
    return (_mix32(_mix32(token_id ^ low) ^ high) + 0.5) * 2.0**-32


def gumbel(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, of the shape of `bits`."""
    return _to_gumbel(bits(keys, token_ids))


def elementwise_gumbel(keys: Tensor, token_ids: Tensor) -> Tensor:
    """`gumbel` for keys and token ids that broadcast against each other."""
    return _to_gumbel(elementwise_bits(keys, token_ids))


def _to_uniform(random_bits: Tensor) -> Tensor:
    return random_bits.double().add_(0.5).mul_(2.0**-32)


def _to_gumbel(random_bits: Tensor) -> Tensor:
    # -log1p(-v) is an exponential variable; small v, the large Gumbels, keep all their bits.
    exponential = _to_uniform(random_bits).neg_().log1p_().neg_()
    return exponential.log_().neg_().float()


def _mix32_(x: Tensor) -> Tensor:
    """Mix 32 bits held in int64, in place.

    Xorshift and multiply, twice; the constants are from C. Wellons' hash prospector.
    """
    x.bitwise_xor_(x >> 15).mul_(_MULTIPLIER_1).bitwise_and_(_MASK32)
    x.bitwise_xor_(x >> 12).mul_(_MULTIPLIER_2).bitwise_and_(_MASK32)
    return x.bitwise_xor_(x >> 15)


def _mix32(x: int) -> int:
    """`_mix32_` of one number."""
    x = ((x ^ (x >> 15)) * _MULTIPLIER_1) & _MASK32
    x = ((x ^ (x >> 12)) * _MULTIPLIER_2) & _MASK32
    return x ^ (x >> 15)


def _mix64(x: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)
