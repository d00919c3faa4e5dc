"""Draws tokens and verifies under `coupled` in one native call for all sequences of a step.

See `cpu/sampling.h`; the torch form is `sampling.pipeline`, `sampling.sampler` and `spec.verify`.
"""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from folospec.kernels import native
from folospec.kernels.checked import pack_ids
from folospec.kernels.sampling_records import FILTERS, NOISE, TREE, Walk, Walks, check_laws

_WALKED = struct.Struct("=qqd")
_POINTER, _COUNT = ctypes.c_void_p, ctypes.c_int64
_CELLS_PER_THREAD = 1 << 15
"""Numbers of logits below which a thread more costs more than it saves."""


class NativeSampling:
    """The library's functions for rows of float32 logits on the CPU.

    Args:
        library: with `cpu/sampling.h` in it.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        sizes = (_COUNT * 3)()
        library.folospec_sampling_sizes(sizes)
        expected = [NOISE.size + FILTERS.size, TREE.size, _WALKED.size]
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
        count, nodes = len(walks), walks.nodes
        if walks.num_rows > logits.shape[0]:
            raise ValueError(f"there are {logits.shape[0]} rows of logits, not {walks.num_rows}")
        walked = array("B", bytes(_WALKED.size * count))
        paths = array("q", bytes(8 * len(nodes)))
        trees = b"".join(walks.trees)
        self._walk(
            logits.data_ptr(),
            logits.shape[1],
            b"".join(walks.laws),
            trees,
            nodes.buffer_info()[0],
            count,
            walked.buffer_info()[0],
            paths.buffer_info()[0],
            _num_threads(count * logits.shape[1]),
        )
        ends = zip(_WALKED.iter_unpack(walked), TREE.iter_unpack(trees), strict=True)
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
