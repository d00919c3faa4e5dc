"""Draws the children of draft nodes with the native CPU kernels.

The rows of logits are on the CPU. See `cpu/children.h`; the torch form is
`spec.trees.children.draw_children`.
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
from folospec.kernels.sampling_records import check_packed_sampling

NO_NOISE = -1
"""Instead of a position."""
_WANTED = struct.Struct("=qqqd")
_POINTER, _COUNT, _THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_CELLS_PER_THREAD = 1 << 15
"""Numbers of logits below which a thread more costs more than it saves."""

pack_wanted = _WANTED.pack
"""`pack_wanted(params, position, count, scale)`: what is asked of a row of `NativeChildren.draw`.
The index of its parameter set, the position of the token that is drawn or `NO_NOISE`, how many
tokens, and the factor of scores in the confidence."""


class NativeChildren:
    """The library's function.

    Args:
        library: with `cpu/children.h` in it.

    Raises:
        RuntimeError: the library lays the struct out in another way.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        library.folospec_sizeof_wanted.restype = ctypes.c_int64
        if (size := library.folospec_sizeof_wanted()) != _WANTED.size:
            raise RuntimeError(f"what is wanted must have {_WANTED.size} bytes, got {size}")
        self._draw = library.folospec_children
        self._draw.restype = None
        self._draw.argtypes = [
            _POINTER, _COUNT, _POINTER, _POINTER, _COUNT, _COUNT, *[_POINTER] * 3, _THREADS,
        ]  # fmt: skip

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

    def draw(
        self, logits: Tensor, all_params: Sequence[bytes], wanted: Sequence[bytes], most: int
    ) -> list[tuple[list[int], list[float]]]:
        """The best tokens of every row and the confidence in each, best first.

        Args:
            logits: [num_rows, vocab_size], such as `takes` says yes to.
            all_params: from `sampling_records.pack_sampling`. A greedy parameter set is read as
                temperature 1 without filters.
            wanted: from `pack_wanted`, for each row.
            most: the largest count that is wanted.

        Raises:
            ValueError: `takes` says no, or what is wanted is not one thing for each row, of a
                parameter set and a count that are there.
        """
        if not self.takes(logits):
            raise ValueError(
                f"logits must be contiguous float32 [rows, vocab_size] on the CPU, got "
                f"{logits.dtype} {list(logits.shape)} on {logits.device}"
            )
        rows, size = logits.shape
        check_packed_sampling(all_params)
        packed = b"".join(wanted)
        if len(packed) != rows * _WANTED.size:
            raise ValueError(f"there must be one thing wanted for {rows} rows, got {len(wanted)}")
        for params, _, count, _ in _WANTED.iter_unpack(packed):
            if not (0 <= params < len(all_params) and 0 <= count <= most):
                raise ValueError(
                    f"parameter set and count must be below {len(all_params)} and at most "
                    f"{most}, got {params} and {count}"
                )
        tokens, found = array("q", bytes(8 * rows * most)), array("q", bytes(8 * rows))
        chances = array("f", bytes(4 * rows * most))
        self._draw(
            logits.data_ptr(),
            size,
            b"".join(all_params),
            packed,
            rows,
            most,
            tokens.buffer_info()[0],
            chances.buffer_info()[0],
            found.buffer_info()[0],
            max(1, min(torch.get_num_threads(), logits.numel() // _CELLS_PER_THREAD)),
        )
        ids, likely = tokens.tolist(), chances.tolist()
        ends = zip(range(0, rows * most, most), found, strict=True)
        return [(ids[at : at + count], likely[at : at + count]) for at, count in ends]


@lru_cache(maxsize=1)
def load() -> NativeChildren | None:
    """The function, or None where the native kernels do not run."""
    library = native.load()
    return None if library is None else NativeChildren(library.library)
