"""Computes attention with kernels of the flash-attn library, from 2.6 on (arXiv 2307.08691).

Where all sequences of a call have as many rows it is `flash_attn_with_kvcache`, which splits long
contexts over the card; else `flash_attn_varlen_func`.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from folospec.attention.base import LayerKV
from folospec.attention.two_parts import Part, Scoring, TwoPartBackend

NO_WINDOW = -1, -1
HEAD_STEP, MAX_HEAD_SIZE = 8, 256


class FlashAttention(TwoPartBackend):
    """Raises ImportError where flash-attn cannot be imported, RuntimeError where Triton cannot
    run."""

    name = "flash_attn"

    def __init__(self) -> None:
        super().__init__()
        from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

        self._varlen, self._with_kvcache = flash_attn_varlen_func, flash_attn_with_kvcache

    def _refused_head_size(self, head_size: int) -> str | None:
        if head_size % HEAD_STEP or head_size > MAX_HEAD_SIZE:
            allowed = f"a multiple of {HEAD_STEP} up to {MAX_HEAD_SIZE}"
            return f"head size must be {allowed}, got {head_size}"
        return None

    def _joined(self, query: Tensor, kv: LayerKV, part: Part, scoring: Scoring) -> Tensor:
        # Theirs counts the keys before a row's own, which is the last that it sees.
        window = scoring.sliding_window
        window_size = NO_WINDOW if window is None else (window - 1, 0)
        return self._call(query, kv, part, scoring, causal=True, window_size=window_size)[0]

    def _context(
        self, query: Tensor, kv: LayerKV, part: Part, scoring: Scoring
    ) -> tuple[Tensor, Tensor]:
        out, lse = self._call(query, kv, part, scoring, causal=False, window_size=NO_WINDOW)
        # A row without keys gets zeros, and +inf.
        return out, lse.masked_fill(lse == math.inf, -math.inf)

    def _call(
        self, query: Tensor, kv: LayerKV, part: Part, scoring: Scoring, **how: Any
    ) -> tuple[Tensor, Tensor]:
        """[R, heads, size] and the log-sum-exps [R, heads]."""
        how |= {
            "block_table": part.block_table,
            "softmax_scale": scoring.scale,
            "softcap": scoring.softcap or 0.0,
        }
        pages = [cache.unflatten(0, (-1, part.metadata.block_size)) for cache in kv]
        if (rows := part.common_rows) is not None:
            out, lse = self._with_kvcache(
                query.unflatten(0, (-1, rows)),
                *pages,
                cache_seqlens=part.key_lens,
                return_softmax_lse=True,
                **how,
            )
            return out.flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)
        out, lse, _ = self._varlen(
            query,
            *pages,
            cu_seqlens_q=part.row_starts,
            cu_seqlens_k=part.key_starts,
            max_seqlen_q=int(part.num_rows.max()),
            max_seqlen_k=int(part.num_keys.max()),
            return_attn_probs=True,
            **how,
        )
        return out, lse.transpose(0, 1)
