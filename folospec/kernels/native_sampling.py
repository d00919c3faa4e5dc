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
from folospec.kernels.sampling_records import (
    FILTERS,
    NOISE,
    TREE,
    PackedTrees,
    VerifiedPath,
    check_packed_sampling,
)

_VERIFIED = struct.Struct("=qqd")
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
        expected = [NOISE.size + FILTERS.size, TREE.size, _VERIFIED.size]
        assert list(sizes) == expected, "structs differ from cpu/sampling.h"
        self._verify, self._log_probs = library.folospec_verify, library.folospec_log_probs
        self._verify.restype = self._log_probs.restype = None
        common = (_POINTER, _COUNT, _POINTER, _POINTER)
        self._verify.argtypes = (*common, _POINTER, _COUNT, _POINTER, _POINTER, _COUNT)
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

    def draw_and_verify(self, logits: Tensor, packed_trees: PackedTrees) -> list[VerifiedPath]:
        """Draw the target's token at the root of every sequence, descend to a child that has it,
        draw there, and so on. A sequence's outcome depends on its own rows and parameter set alone.

        Args:
            logits: [*, vocab_size], such as `takes` says yes to.
            packed_trees: the sequences.

        Raises:
            ValueError: a sequence has rows that there are no logits for, or `takes` says no.
        """
        self._check(logits)
        count, nodes = len(packed_trees), packed_trees.nodes
        if packed_trees.num_rows > logits.shape[0]:
            raise ValueError(
                f"there are {logits.shape[0]} rows of logits, not {packed_trees.num_rows}"
            )
        verified = array("B", bytes(_VERIFIED.size * count))
        paths = array("q", bytes(8 * len(nodes)))
        trees = b"".join(packed_trees.trees)
        self._verify(
            logits.data_ptr(),
            logits.shape[1],
            b"".join(packed_trees.all_params),
            trees,
            nodes.buffer_info()[0],
            count,
            verified.buffer_info()[0],
            paths.buffer_info()[0],
            _num_threads(count * logits.shape[1]),
        )
        ends = zip(_VERIFIED.iter_unpack(verified), TREE.iter_unpack(trees), strict=True)
        return [
            VerifiedPath(paths[begin : begin + length].tolist(), token_id, peak)
            for (token_id, length, peak), (_, _, begin, _) in ends
        ]

    def log_probs(
        self, logits: Tensor, all_params: Sequence[bytes], params_of: Sequence[int]
    ) -> tuple[Tensor, Sequence[float]]:
        """Log-probabilities of the parameter set of every row.

        Args:
            logits: [num_rows, vocab_size], such as `takes` says yes to.
            all_params: from `pack_sampling`; their noise is not looked at.
            params_of: the index of each row's parameter set.

        Returns:
            float32 [num_rows, vocab_size], -inf where a token is impossible; and the largest logit
            of every row.

        Raises:
            ValueError: a parameter set is out of range, or not one is named for every row, or
                `takes` says no.
        """
        self._check(logits)
        check_packed_sampling(all_params)
        count = len(logits)
        out, peaks = torch.empty_like(logits), array("f", bytes(4 * count))
        if len(params_of) != count or any(
            not 0 <= params < len(all_params) for params in params_of
        ):
            raise ValueError(
                f"params_of must name one of {len(all_params)} parameter sets for each of "
                f"{count} rows, got {list(params_of)}"
            )
        params_ids = pack_ids("params_of", params_of)
        self._log_probs(
            logits.data_ptr(),
            logits.shape[1],
            b"".join(all_params),
            params_ids.buffer_info()[0],
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
