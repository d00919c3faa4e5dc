"""Allocates memory for weights: on a CPU in pages of 2 MB, where the system has them.

A step reads all weights from end to end. In pages of 4 KB the processor looks five hundred times as
many addresses up, and its prefetching stops at the end of each. numpy asks the system for large
pages for every large array, so the room comes from it; what is never written takes no memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

PAGE = 2 << 20
CHUNK = 32 << 20
"""What is taken from numpy at a time, for tensors of an eighth of that and less."""
_ALIGNMENT = 256


class WeightMemory:
    """Gives room for tensors. Those of one memory may share an array, which lives as long as any of
    them.

    Args:
        device: elsewhere than on a CPU it is torch's own memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._chunk, self._used = torch.empty(0, dtype=torch.uint8, device="cpu"), 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor that nothing was written to."""
        if self._device.type != "cpu":
            return torch.empty(tuple(shape), dtype=dtype, device=self._device)
        size = math.prod(shape) * dtype.itemsize
        if size > CHUNK // 8:
            return _large(size).view(dtype).view(tuple(shape))
        if self._used + size > self._chunk.numel():
            self._chunk, self._used = _large(CHUNK), 0
        room = self._chunk[self._used : self._used + size]
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return room.view(dtype).view(tuple(shape))


def _large(size: int) -> Tensor:
    """Bytes that begin where a page does."""
    array = np.empty(size + PAGE, np.uint8)
    begin = -array.__array_interface__["data"][0] % PAGE
    return torch.from_numpy(array)[begin : begin + size]
