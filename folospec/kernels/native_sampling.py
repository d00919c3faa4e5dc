"""The native form of drawing and of coupled verification: one call for all sequences of a step. See
`cpu/sampling.h`; the torch form is `sampling.pipeline`, `sampling.sampler` and `spec.verify`."""

from __future__ import annotations

import ctypes
import math
import struct
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from folospec.kernels import native
from folospec.kernels.checked import pack_ids

_NOISE = struct.Struct("=QQ")
_FILTERS = struct.Struct("=dddq")
_TREE = struct.Struct("=qqqq")
_WALKED = struct.Struct("=qqd")
_POINTER, _COUNT = ctypes.c_void_p, ctypes.c_int64
_MASK64 = 0xFFFFFFFFFFFFFFFF
_CELLS_PER_THREAD = 1 << 15
"""Numbers of logits below which a thread more costs more than it saves."""


_MOST_TOP_K = 2**62
"""More than any vocabulary, and within 64 bits."""


def pack_filters(temperature: float, top_k: int, top_p: float, min_p: float) -> bytes:
    """What a law filters by, for `pack_law`; the values are those of `SamplingParams`.

    Raises:
        ValueError: a number is out of its range, or none.
    """
    if not (0 <= temperature < math.inf and 0 < top_p <= 1 and 0 <= min_p <= 1):
        raise ValueError(
            f"temperature must be finite and at least 0, top_p above 0 and at most 1, min_p in "
            f"0 .. 1, got {temperature}, {top_p} and {min_p}"
        )
    log_min_p = math.log(min_p) if min_p > 0 else -math.inf
    return _FILTERS.pack(temperature, top_p, log_min_p, min(max(top_k, 0), _MOST_TOP_K))


def pack_law(seed: int, sample_index: int, filters: bytes) -> bytes:
    """A law with its noise, as the library reads it: `filters` is from `pack_filters`, the integers
    are those of `noise.key`."""
    return _NOISE.pack(seed & _MASK64, sample_index & _MASK64) + filters


def check_laws(laws: Sequence[bytes]) -> None:
    """Raise ValueError unless each is of the size that `pack_law` packs."""
    size = _NOISE.size + _FILTERS.size
    for law in laws:
        if len(law) != size:
            raise ValueError(f"a law must have {size} bytes, got {len(law)}")


def check_filters(law: bytes) -> None:
    """Raise ValueError unless a law has the size that `pack_law` packs, and filters in the ranges
    of `pack_filters`."""
    check_laws([law])
    temperature, top_p, log_min_p, top_k = _FILTERS.unpack_from(law, _NOISE.size)
    in_range = 0 <= temperature < math.inf and 0 < top_p <= 1 and 0 <= top_k <= _MOST_TOP_K
    if not (in_range and log_min_p <= 0):
        raise ValueError(
            f"a law must have the filters of pack_filters, got temperature {temperature}, top_p "
            f"{top_p}, log min_p {log_min_p} and top_k {top_k}"
        )


class Walk(NamedTuple):
    """What `NativeSampling.walk` found for a sequence."""

    path: list[int]
    """Accepted nodes, from the root's child downwards."""
    token_id: int
    """The target's token after the path; -1 where none is possible."""
    peak: float
    """The largest logit of the row at the end of the path. It says why there is no token: -inf, or
    NaN or +inf."""


class Walks:
    """The sequences of a step, to be walked in one call."""

    def __init__(self) -> None:
        self._laws: list[bytes] = []
        self._trees: list[bytes] = []
        self._nodes = array("q")
        self._num_rows = 0

    def __len__(self) -> int:
        return len(self._laws)

    def add(
        self,
        law: bytes,
        root_row: int,
        position: int,
        token_ids: Sequence[int] = (),
        parents: Sequence[int] = (),
    ) -> None:
        """Add a sequence.

        Args:
            law: from `pack_law`.
            root_row: its row of logits; node i of its tree has the row i + 1 behind it.
            position: of the token that follows the root.
            token_ids: of the nodes; -1 for one that is not to be accepted.
            parents: an earlier node or -1, the root, for each.

        Raises:
            ValueError: the root is no row, the lists differ in length or have other things than
                integers, or the law is not from `pack_law`.
        """
        size = len(token_ids)
        check_laws([law])
        if root_row < 0 or size != len(parents):
            raise ValueError(
                f"root_row must be at least 0 and nodes must have a token and a parent each, got "
                f"{root_row}, {size} tokens and {len(parents)} parents"
            )
        nodes = pack_ids("token ids", token_ids) + pack_ids("parents", parents)
        self._trees.append(_TREE.pack(root_row, position, len(self._nodes), size))
        self._laws.append(law)
        self._nodes.extend(nodes)
        self._num_rows = max(self._num_rows, root_row + 1 + size)


class NativeSampling:
    """The library's functions for rows of float32 logits on the CPU.

    Args:
        library: with `cpu/sampling.h` in it.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        sizes = (_COUNT * 3)()
        library.folospec_sampling_sizes(sizes)
        expected = [_NOISE.size + _FILTERS.size, _TREE.size, _WALKED.size]
        assert list(sizes) == expected, "structs differ from cpu/sampling.h"
        self._walk, self._log_probs = library.folospec_walk, library.folospec_log_probs
        self._walk.restype = self._log_probs.restype = None
        common = (_POINTER, _COUNT, _POINTER, _POINTER)
        self._walk.argtypes = (*common, _POINTER, _COUNT, _POINTER, _POINTER, _COUNT)
        self._log_probs.argtypes = (*common, _COUNT, _POINTER, _POINTER, _COUNT)

    @staticmethod
    def takes(logits: Tensor) -> bool:
        """Whether the rows are of the kind that the library reads."""
        return (
            logits.dtype == torch.float32
            and logits.device.type == "cpu"
            and logits.dim() == 2
            and logits.is_contiguous()
            and logits.shape[1] > 0
        )

    def _check(self, logits: Tensor) -> None:
        if not self.takes(logits):
            raise ValueError(
                f"logits must be contiguous float32 [rows, vocab_size] on the CPU, got "
                f"{logits.dtype} {list(logits.shape)} on {logits.device}"
            )

    def walk(self, logits: Tensor, walks: Walks) -> list[Walk]:
        """Draw the target's token at the root of every sequence, descend to a child that has it,
        draw there, and so on. A sequence's outcome depends on its own rows and law alone.

        Args:
            logits: [*, vocab_size], such as `takes` says yes to.
            walks: the sequences.

        Raises:
            ValueError: a sequence has rows that there are no logits for, or `takes` says no.
        """
        self._check(logits)
        count, nodes = len(walks), walks._nodes
        if walks._num_rows > logits.shape[0]:
            raise ValueError(f"there are {logits.shape[0]} rows of logits, not {walks._num_rows}")
        walked = array("B", bytes(_WALKED.size * count))
        paths = array("q", bytes(8 * len(nodes)))
        trees = b"".join(walks._trees)
        self._walk(
            logits.data_ptr(),
            logits.shape[1],
            b"".join(walks._laws),
            trees,
            nodes.buffer_info()[0],
            count,
            walked.buffer_info()[0],
            paths.buffer_info()[0],
            _num_threads(count * logits.shape[1]),
        )
        ends = zip(_WALKED.iter_unpack(walked), _TREE.iter_unpack(trees), strict=True)
        return [
            Walk(paths[begin : begin + length].tolist(), token_id, peak)
            for (token_id, length, peak), (_, _, begin, _) in ends
        ]

    def log_probs(
        self, logits: Tensor, laws: Sequence[bytes], law_of: Sequence[int]
    ) -> tuple[Tensor, Sequence[float]]:
        """Log-probabilities of the law of every row.

        Args:
            logits: [num_rows, vocab_size], such as `takes` says yes to.
            laws: from `pack_law`; their noise is not looked at.
            law_of: the index of each row's law.

        Returns:
            float32 [num_rows, vocab_size], -inf where a token is impossible; and the largest logit
            of every row.

        Raises:
            ValueError: a law is out of range, or not one is named for every row, or `takes` says
                no.
        """
        self._check(logits)
        check_laws(laws)
        count = len(logits)
        out, peaks = torch.empty_like(logits), array("f", bytes(4 * count))
        if len(law_of) != count or any(not 0 <= law < len(laws) for law in law_of):
            raise ValueError(
                f"law_of must name one of {len(laws)} laws for each of {count} rows, "
                f"got {list(law_of)}"
            )
        law_ids = pack_ids("law_of", law_of)
        self._log_probs(
            logits.data_ptr(),
            logits.shape[1],
            b"".join(laws),
            law_ids.buffer_info()[0],
            count,
            out.data_ptr(),
            peaks.buffer_info()[0],
            _num_threads(out.numel()),
        )
        return out, peaks


def load() -> NativeSampling | None:
    """The library's functions; None where `native.load` has no library."""
    library = native.load()
    return None if library is None else _wrap(library)


@lru_cache(maxsize=1)
def _wrap(library: native.Native) -> NativeSampling:
    return NativeSampling(library.library)


def _num_threads(num_cells: int) -> int:
    return max(1, min(torch.get_num_threads(), num_cells // _CELLS_PER_THREAD))
