"""Computes attention with one Triton kernel for prompts, chains and trees.

The kernel is in `kernels/gpu/attention.py`.

Fast, it cuts long contexts into as many parts as keep the card busy, and reads a tree's keys once
for all of its rows, by mask. Deterministic, it cuts them at fixed places, and every row of a tree
runs as a sequence of its own, with its keys in logical order: then a row's bits depend on its keys
alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from folospec.attention.base import LayerKV
from folospec.attention.metadata import AttentionMetadata
from folospec.attention.paged import PagedBackend
from folospec.kernels.gpu import launch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_HEAD_SIZE, MAX_HEAD_SIZE = 32, 256
ORDERED_QUERIES = 32
"""Rows of a tile times heads per KV head where the shape of a step must not matter."""


class TritonAttention(PagedBackend):
    """Raises RuntimeError where Triton cannot run.

    Args:
        deterministic: a row's bits do not depend on the rows beside it.
    """

    name = "triton"
    supports_cuda_graphs = True

    def __init__(self, deterministic: bool = False) -> None:
        if (reason := launch.why_not()) is not None:
            raise RuntimeError(reason)
        self.devices = ("cuda", "cpu") if launch.is_interpreted() else ("cuda",)
        self.deterministic = self.expands = deterministic

    def supports(self, dtype: torch.dtype, head_size: int, block_size: int) -> str | None:
        """float16, bfloat16 and float32, head sizes from 32 to 256, any block size."""
        if dtype not in DTYPES:
            return f"dtype must be float16, bfloat16 or float32, got {dtype}"
        if head_size % 8 or not MIN_HEAD_SIZE <= head_size <= MAX_HEAD_SIZE:
            allowed = f"a multiple of 8 from {MIN_HEAD_SIZE} to {MAX_HEAD_SIZE}"
            return f"head size must be {allowed}, got {head_size}"
        return None

    def rows_per_tile(self, num_rows: int, num_seqs: int, fold: int) -> int:
        """See `PagedBackend.rows_per_tile`."""
        if self.deterministic:
            return max(1, ORDERED_QUERIES // fold)
        return super().rows_per_tile(num_rows, num_seqs, fold)

    def attend(
        self,
        query: Tensor,
        kv: LayerKV,
        metadata: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """See `PagedBackend.attend`."""
        from folospec.kernels.gpu import attention

        return attention.attend(
            query,
            kv,
            self.rows_of(query, kv, metadata),
            metadata.positions,
            block_size=metadata.block_size,
            scale=scale,
            window=sliding_window,
            softcap=softcap,
            ordered=self.deterministic,
        )
