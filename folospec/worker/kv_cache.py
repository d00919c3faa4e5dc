"""Holds the KV tensors of one model, addressed by the block ids of `core`.

They are sized once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from folospec.attention.base import LayerKV
from folospec.kernels import native
from folospec.kernels.gpu import launch

if TYPE_CHECKING:
    from folospec.core.kv_cache_manager import BlockCopy

KVShapes = Sequence[tuple[int, int]]
"""(num_kv_heads, head_size) of each layer."""


def kv_bytes_per_block(kv_shapes: KVShapes, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes in the tensors of a model, keys and values of all layers."""
    return 2 * block_size * dtype.itemsize * sum(heads * size for heads, size in kv_shapes)


class KVCache:
    """Keys and values of every layer, each [num_blocks * block_size, num_kv_heads, head_size]."""

    def __init__(
        self,
        kv_shapes: KVShapes,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        num_slots = num_blocks * block_size
        self.layers = [
            LayerKV(*(_zeros((num_slots, h, d), dtype, device) for _ in range(2)))
            for h, d in kv_shapes
        ]
        self._tensors = [tensor for layer in self.layers for tensor in layer]
        self._moves_on_device = device.type == "cuda" and launch.runs_on(device)

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer)

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks: what a fork's first write into a shared block asks for."""
        sources: list[int] = []
        targets: list[int] = []
        for copy in copies:
            sources.extend(range(copy.src * self.block_size, (copy.src + 1) * self.block_size))
            targets.extend(range(copy.dst * self.block_size, (copy.dst + 1) * self.block_size))
        self.move_rows(sources, targets)

    def move_rows(self, source_slots: Sequence[int], target_slots: Sequence[int]) -> None:
        """Copy rows to other slots in every layer. All rows are read before any is written, so the
        lists may overlap."""
        if not source_slots:
            return
        device = self.layers[0].key.device
        if device.type == "cpu" and (library := native.load()) is not None:
            library.move(self._tensors, source_slots, target_slots)
            return
        if self._moves_on_device:
            from folospec.kernels.gpu.kv import move_slots

            move_slots(self._tensors, source_slots, target_slots)
            return
        sources = torch.tensor(source_slots, device=device)
        targets = torch.tensor(target_slots, device=device)
        for layer in self.layers:
            for tensor in layer:
                tensor[targets] = tensor[sources]


def _zeros(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, since attention multiplies masked rows by 0 and a stray NaN would survive that. On a
    CPU they come from numpy, which leaves untouched pages unbacked: a pool costs what is used."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(pages).view(dtype).view(shape)
