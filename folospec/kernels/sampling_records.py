"""Packs what the kernels that draw and verify read, and holds what they return.

The native kernels and those of a GPU read the same bytes. See `cpu/sampling.h`.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from folospec.kernels.checked import pack_ids

NOISE = struct.Struct("=QQ")
FILTERS = struct.Struct("=dddq")
TREE = struct.Struct("=qqqq")
_MASK64 = 0xFFFFFFFFFFFFFFFF
_MOST_TOP_K = 2**62
"""More than any vocabulary, and within 64 bits."""


def pack_filters(temperature: float, top_k: int, top_p: float, min_p: float) -> bytes:
    """What a parameter set filters by, for `pack_sampling`; the values are those of
    `SamplingParams`.

    Raises:
        ValueError: a number is out of its range, or none.
    """
    if not (0 <= temperature < math.inf and 0 < top_p <= 1 and 0 <= min_p <= 1):
        raise ValueError(
            f"temperature must be finite and at least 0, top_p above 0 and at most 1, min_p in "
            f"0 .. 1, got {temperature}, {top_p} and {min_p}"
        )
    log_min_p = math.log(min_p) if min_p > 0 else -math.inf
    return FILTERS.pack(temperature, top_p, log_min_p, min(max(top_k, 0), _MOST_TOP_K))


def pack_sampling(seed: int, sample_index: int, filters: bytes) -> bytes:
    """A parameter set with its noise, as the library reads it: `filters` is from `pack_filters`,
    the integers are those of `noise.key`."""
    return NOISE.pack(seed & _MASK64, sample_index & _MASK64) + filters


def check_packed_sampling(all_params: Sequence[bytes]) -> None:
    """Raise ValueError unless each is of the size that `pack_sampling` packs."""
    size = NOISE.size + FILTERS.size
    for params in all_params:
        if len(params) != size:
            raise ValueError(f"a parameter set must have {size} bytes, got {len(params)}")


def check_filters(params: bytes) -> None:
    """Raise ValueError unless a parameter set has the size that `pack_sampling` packs, and filters
    in the ranges of `pack_filters`."""
    check_packed_sampling([params])
    temperature, top_p, log_min_p, top_k = FILTERS.unpack_from(params, NOISE.size)
    in_range = 0 <= temperature < math.inf and 0 < top_p <= 1 and 0 <= top_k <= _MOST_TOP_K
    if not (in_range and log_min_p <= 0):
        raise ValueError(
            f"a parameter set must have the filters of pack_filters, got temperature "
            f"{temperature}, top_p {top_p}, log min_p {log_min_p} and top_k {top_k}"
        )


class VerifiedPath(NamedTuple):
    """What `NativeSampling.draw_and_verify` found for a sequence."""

    path: list[int]
    """Accepted nodes, from the root's child downwards."""
    token_id: int
    """The target's token after the path; -1 where none is possible."""
    peak: float
    """The largest logit of the row at the end of the path. It says why there is no token: -inf, or
    NaN or +inf."""


class PackedTrees:
    """The sequences of a step, to be verified in one call."""

    def __init__(self) -> None:
        self.all_params: list[bytes] = []
        self.trees: list[bytes] = []
        self.nodes = array("q")
        self.num_rows = 0
        """Of logits that there must be."""

    def __len__(self) -> int:
        return len(self.all_params)

    def add(
        self,
        params: bytes,
        root_row: int,
        position: int,
        token_ids: Sequence[int] = (),
        parents: Sequence[int] = (),
    ) -> None:
        """Add a sequence.

        Args:
            params: from `pack_sampling`.
            root_row: its row of logits; node i of its tree has the row i + 1 behind it.
            position: of the token that follows the root.
            token_ids: of the nodes; -1 for one that is not to be accepted.
            parents: an earlier node or -1, the root, for each.

        Raises:
            ValueError: the root is no row, the lists differ in length or have other things than
                integers, or the parameter set is not from `pack_sampling`.
        """
        size = len(token_ids)
        check_packed_sampling([params])
        if root_row < 0 or size != len(parents):
            raise ValueError(
                f"root_row must be at least 0 and nodes must have a token and a parent each, got "
                f"{root_row}, {size} tokens and {len(parents)} parents"
            )
        nodes = pack_ids("token ids", token_ids) + pack_ids("parents", parents) if size else ()
        self.trees.append(TREE.pack(root_row, position, len(self.nodes), size))
        self.all_params.append(params)
        self.nodes.extend(nodes)
        self.num_rows = max(self.num_rows, root_row + 1 + size)
