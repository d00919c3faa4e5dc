"""Holds what the attention backends over paged KV on a GPU have in common."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from folospec.attention import paged_rows
from folospec.attention.base import AttentionBackend, LayerKV
from folospec.attention.metadata import AttentionMetadata
from folospec.attention.paged_rows import PagedRows


class PagedBackend(AttentionBackend):
    """Writing the keys and values of a step and looking at keys are apart here: a decoder that has
    written them already, with the rotary embedding, calls `attend` alone."""

    devices: tuple[str, ...] = ("cuda",)
    supports_cuda_graphs: bool = False
    """Whether `attend` may be part of a CUDA graph."""
    expands: bool = False
    """Whether `PagedRows` must have the rows of trees as sequences of their own."""

    def rows_per_tile(self, num_rows: int, num_seqs: int, fold: int) -> int:
        """Rows of a tile of `PagedRows` for a step of such a shape; `fold` is the number of query
        heads per KV head."""
        return paged_rows.rows_per_tile(num_rows, num_seqs, fold)

    def rows_of(self, query: Tensor, kv: LayerKV, metadata: AttentionMetadata) -> PagedRows:
        """The step's rows on the device. Those in `metadata.plan["paged"]` are used as they are,
        and then nothing of `metadata` is read on the host."""
        rows: PagedRows | None = metadata.plan.get(paged_rows.PLAN_KEY)
        if rows is None:
            fold = query.shape[1] // kv.key.shape[1]
            in_tile = self.rows_per_tile(query.shape[0], metadata.num_seqs, fold)
            rows = paged_rows.on_device(
                metadata, query.device, rows_per_tile=in_tile, expands=self.expands
            )
        return rows

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv: LayerKV,
        metadata: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """See `AttentionBackend.forward`."""
        # Here, since it imports triton: who asks what a backend is need not have it.
        from folospec.kernels.gpu.kv import write_kv

        write_kv(key, value, metadata.slot_mapping, kv)
        return self.attend(
            query, kv, metadata, scale=scale, sliding_window=sliding_window, softcap=softcap
        )

    @abstractmethod
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
        """Let every row see its keys, which lie in `kv` already; see `AttentionBackend.forward`.

        Rows of padding, which no tile of `metadata.plan["paged"]` has, are not written.

        Returns:
            [num_tokens, num_heads, head_size], of the query's type.
        """
