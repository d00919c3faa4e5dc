"""Checks the arguments of the native kernels, which read and write wherever they point."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

Shape = Sequence[int | None]
"""The size of every axis; None where any will do."""


def pointer(name: str, tensor: Tensor, dtype: torch.dtype, shape: Shape) -> int:
    """Return the address of a tensor's numbers.

    Raises:
        ValueError: it is not contiguous, on the CPU and of this type and shape.
    """
    if (
        tensor.dtype != dtype
        or not tensor.is_cpu
        or not tensor.is_contiguous()
        or not _fits(tensor.shape, shape)
    ):
        layout = "contiguous" if tensor.is_contiguous() else "not contiguous"
        raise ValueError(
            f"{name} must be {_words(dtype, shape)}, contiguous on the CPU, got "
            f"{_words(tensor.dtype, tensor.shape)}, {layout} on {tensor.device}"
        )
    return tensor.data_ptr()


def array_pointer(name: str, values: NDArray[Any], dtype: DTypeLike, shape: Shape) -> int:
    """Return the address of an array's numbers; see `pointer`."""
    if values.dtype != dtype or not values.flags.c_contiguous or not _fits(values.shape, shape):
        layout = "contiguous" if values.flags.c_contiguous else "not contiguous"
        raise ValueError(
            f"{name} must be {_words(np.dtype(dtype), shape)}, contiguous, got "
            f"{_words(values.dtype, values.shape)}, {layout}"
        )
    address: int = values.__array_interface__["data"][0]  # cheaper than `values.ctypes.data`
    return address


def array_pointers(*arrays: tuple[str, NDArray[Any], DTypeLike, Shape]) -> list[int]:
    """`array_pointer` of each."""
    return [array_pointer(*each) for each in arrays]


def id_pointer(name: str, ids: Tensor, size: int, end: int) -> int:
    """Return the address of int64 [size] in which every number is in 0 .. end - 1.

    Raises:
        ValueError: see `pointer` and `check_ids`.
    """
    address = pointer(name, ids, torch.int64, (size,))
    check_ids(name, ids.numpy(), end)
    return address


def check_all_ids(*checks: tuple[str, NDArray[Any], int]) -> None:
    """`check_ids` of each."""
    for each in checks:
        check_ids(*each)


def check_ids(name: str, ids: NDArray[Any], end: int) -> None:
    """Check that integers are in 0 .. end - 1.

    Raises:
        ValueError: one is not.
    """
    # Seen as unsigned, a negative number is larger than any that is allowed.
    if ids.size and int(ids.view(f"u{ids.itemsize}").max()) >= end:
        wrong = ids[(ids < 0) | (ids >= end)]
        raise ValueError(f"{name} must be in 0 .. {end - 1}, got {wrong[0]}")


def pack_ids(name: str, ids: Iterable[int], code: str = "q") -> array[int]:
    """Return integers as an array of 64 bits each, or with the code "i" of 32.

    Raises:
        ValueError: one is no integer, or has more bits.
    """
    try:
        if isinstance(ids, (bytes, bytearray, str)):
            raise TypeError
        return array(code, ids)
    except (TypeError, OverflowError):
        bits = 8 * array(code).itemsize
        raise ValueError(f"{name} must be integers of {bits} bits, got {ids!r:.200}") from None


def _fits(sizes: Sequence[int], shape: Shape) -> bool:
    if sizes == shape:  # mostly; this runs many times in a step
        return True
    if len(sizes) != len(shape):
        return False
    for size, wanted in zip(sizes, shape, strict=True):
        if wanted is not None and wanted != size:
            return False
    return True


def _words(dtype: Any, shape: Shape) -> str:
    sizes = ", ".join("*" if size is None else str(size) for size in shape)
    return f"{str(dtype).removeprefix('torch.')} [{sizes}]"
