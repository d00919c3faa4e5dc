"""Computes attention with the split-K kernel of the xformers library, from 0.0.28 on.

Of the library's kernels it is the one that reads pages without a further library. It is written in
Triton, knows neither windows nor soft caps, and takes a causal mask only where all sequences have
as many rows, 16 at most. So of a step's chunks and chains the most frequent length is run by one
causal call, and the others like trees: context, suffix, merged.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from folospec.attention.base import LayerKV
from folospec.attention.two_parts import Part, Scoring, TwoPartBackend

HEAD_SIZES = (32, 64, 128, 256)
MOST_CAUSAL_ROWS = 16


class XformersAttention(TwoPartBackend):
    """Raises ImportError where xformers is missing, RuntimeError where its kernel or Triton cannot
    run."""

    name = "xformers"

    def __init__(self) -> None:
        super().__init__()
        from xformers.ops import fmha
        from xformers.ops.fmha import attn_bias, triton_splitk

        if not _has_block_pointers():
            raise RuntimeError("xformers' kernel needs block pointers, which this Triton lacks")
        self._fmha, self._op = fmha, triton_splitk.FwOp
        self._causal = attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
        self._unmasked = attn_bias.PagedBlockDiagonalPaddedKeysMask

    def _refused_head_size(self, head_size: int) -> str | None:
        if head_size not in HEAD_SIZES:
            return f"head size must be one of {', '.join(map(str, HEAD_SIZES))}, got {head_size}"
        return None

    def _knows(self, scoring: Scoring) -> bool:
        return scoring.sliding_window is None and scoring.softcap is None

    def _joinable(
        self, num_rows: NDArray[np.int32], candidates: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        candidates = candidates & (num_rows <= MOST_CAUSAL_ROWS)
        if not candidates.any():
            return candidates
        return candidates & (num_rows == np.bincount(num_rows[candidates]).argmax())

    def _joined(self, query: Tensor, kv: LayerKV, part: Part, scoring: Scoring) -> Tensor:
        arguments = self._arguments(query, kv, part, self._causal, scoring.scale)
        out = self._fmha.memory_efficient_attention_forward(**arguments)
        return out.reshape(query.shape)

    def _context(
        self, query: Tensor, kv: LayerKV, part: Part, scoring: Scoring
    ) -> tuple[Tensor, Tensor]:
        arguments = self._arguments(query, kv, part, self._unmasked, scoring.scale)
        out, lse = self._fmha.memory_efficient_attention_partial(**arguments)
        # [1, KV heads, heads per KV head, R]
        return out.reshape(query.shape), lse[0].flatten(0, 1).transpose(0, 1)

    def _arguments(
        self, query: Tensor, kv: LayerKV, part: Part, bias: Any, scale: float
    ) -> dict[str, Any]:
        """Heads as [1, rows or slots, KV heads, heads per KV head, size]: keys and values that are
        expanded, not copied, are what the library takes for grouped queries."""
        if part.kept is None:
            part.kept = bias.from_seqlens(
                q_seqlen=part.num_rows.tolist(),
                kv_seqlen=part.num_keys.tolist(),
                block_tables=part.block_table,
                page_size=part.metadata.block_size,
                device=query.device,
            )
        fold = query.shape[1] // kv.key.shape[1]
        key, value = (cache[None, :, :, None].expand(-1, -1, -1, fold, -1) for cache in kv)
        return {
            "query": query.unflatten(1, (-1, fold))[None],
            "key": key,
            "value": value,
            "attn_bias": part.kept,
            "scale": scale,
            "op": self._op,
        }


def _has_block_pointers() -> bool:
    """Whether Triton still compiles what xformers is written in. Where it does not, the function is
    there, and raises."""
    from triton.language import make_block_ptr

    probe: Any = SimpleNamespace(make_block_ptr=lambda *_: None)
    try:
        make_block_ptr(None, (), (), (), (), (), _semantic=probe)
    except NotImplementedError:
        return False
    return True
