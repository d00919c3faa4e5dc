"""Holds all that a pass reads in one block of memory: one copy to the device per step.

A CUDA graph reads the same addresses at every replay, so the arrays have fixed places and sizes,
and what a step leaves free is padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import gt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 16

Fields = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name -> type and shape of an array."""


class StepBuffers:
    """Arrays of one block of memory, on the host and on the device.

    Args:
        fields: the arrays. Of the last one only the part that is in use is sent: it should be the
            largest.
        padding: what free places of an array hold. Of an array that is not named they hold what
            they held before, and nothing may depend on it.
    """

    def __init__(self, fields: Fields, device: torch.device, padding: Mapping[str, int]) -> None:
        self._padding = padding
        places: dict[str, tuple[int, int]] = {}
        size = 0
        for name, (dtype, shape) in fields.items():
            num_bytes = dtype.itemsize * int(np.prod(shape))
            places[name] = size, size + num_bytes
            size += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        is_cuda = device.type == "cuda"
        self._host = torch.zeros(size, dtype=torch.uint8, pin_memory=is_cuda)
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self._copied = torch.cuda.Event() if is_cuda else None
        self._arrays: dict[str, NDArray[Any]] = {}
        self._last, (self._last_begin, self._end) = next(reversed(places.items()))
        self.device: dict[str, Tensor] = {}
        """The arrays as kernels read them; they stay where they are."""
        for name, (dtype, shape) in fields.items():
            begin, end = places[name]
            self._arrays[name] = self._host[begin:end].view(dtype).view(shape).numpy()
            self._arrays[name].fill(padding.get(name, 0))
            self.device[name] = self._device[begin:end].view(dtype).view(shape)
        self._device.copy_(self._host)

    def fill(self, arrays: Mapping[str, NDArray[Any]]) -> bool:
        """Write the arrays of a step, padded, and send them on their way to the device. False if
        one of them has no room; then nothing is written."""
        for name, array in arrays.items():
            room = self._arrays[name].shape
            if any(map(gt, array.shape, room)) or array.ndim != len(room):
                return False
        if self._copied is not None:
            self._copied.synchronize()  # the copy of the step before reads the same memory
        for name, array in arrays.items():
            place = self._arrays[name]
            if name in self._padding and array.shape != place.shape:
                place.fill(self._padding[name])
            place[tuple(map(slice, array.shape))] = array
        end = self._used_end(arrays)
        self._device[:end].copy_(self._host[:end], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        return True

    def _used_end(self, arrays: Mapping[str, NDArray[Any]]) -> int:
        """Where the used part of the memory ends."""
        place, array = self._arrays[self._last], arrays.get(self._last)
        if array is None or self._last in self._padding:
            return self._end
        if array.size == 0:
            return self._last_begin
        at = np.ravel_multi_index([size - 1 for size in array.shape], place.shape)
        return self._last_begin + (int(at) + 1) * place.itemsize


class Result:
    """What a pass tells the host: a device tensor, and the copy of it that the host reads.

    The copy runs while the host goes on; only `read` waits for it.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self.device = torch.zeros(size, dtype=torch.int64, device=device)
        self._host = torch.zeros(size, dtype=torch.int64, pin_memory=is_cuda)
        self._copied = torch.cuda.Event() if is_cuda else None

    def send(self) -> None:
        """Let the copy begin, behind what the device has been given to do."""
        self._host.copy_(self.device, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def read(self) -> Tensor:
        """Wait for the copy, int64 [size] on the host; the next one overwrites it."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host
