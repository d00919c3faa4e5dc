"""A stand-in for flash-attn (`paged_libraries`); `SIGNATURES` is what the library itself says."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from paged_libraries import Mask, attend, check_heads, check_table

SIGNATURES = {
    # flash-attn 2.8.3.post2, flash_attn/flash_attn_interface.py; 2.6.0.post1 has the same but for
    # `cache_leftpad`.
    "flash_attn_varlen_func": (
        "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, "
        "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
        "deterministic=False, return_attn_probs=False, block_table=None"
    ),
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
        "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, "
        "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False"
    ),
}
PAGE = 256


class FlashAttn:
    """The two functions of flash_attn; `from_bottom_right` False is the alignment that it had until
    2.0, and `calls` names what was called."""

    def __init__(self, *, from_bottom_right: bool = True) -> None:
        self.from_bottom_right = from_bottom_right
        self.calls: list[str] = []

    def module(self) -> ModuleType:
        module = ModuleType("flash_attn")
        module.flash_attn_varlen_func = self.flash_attn_varlen_func
        module.flash_attn_with_kvcache = self.flash_attn_with_kvcache
        return module

    def flash_attn_varlen_func(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        assert (dropout_p, alibi_slopes, deterministic) == (0.0, None, False)
        for starts in cu_seqlens_q, cu_seqlens_k:
            assert starts.dtype == torch.int32
            assert starts.is_contiguous()
            assert starts.shape == (len(block_table) + 1,)
            assert starts[0] == 0
            assert (starts.diff() >= 0).all()
        assert cu_seqlens_q[-1] == len(q)
        num_rows, num_keys = (s.diff().tolist() for s in (cu_seqlens_q, cu_seqlens_k))
        assert type(max_seqlen_q) is type(max_seqlen_k) is int
        assert (max_seqlen_q, max_seqlen_k) == (max(num_rows), max(num_keys))
        out, lse = self._run(
            q, k, v, num_rows, num_keys, block_table, softmax_scale, causal, window_size, softcap
        )
        self.calls.append("varlen")
        return (out, lse.float(), None) if return_attn_probs else out

    def flash_attn_with_kvcache(
        self,
        q,
        k_cache,
        v_cache,
        k=None,
        v=None,
        rotary_cos=None,
        rotary_sin=None,
        cache_seqlens=None,
        cache_batch_idx=None,
        cache_leftpad=None,
        block_table=None,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        rotary_interleaved=True,
        alibi_slopes=None,
        num_splits=0,
        return_softmax_lse=False,
    ):
        unused = (k, v, rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad, alibi_slopes)
        assert unused == (None,) * 7
        assert (rotary_interleaved, num_splits) == (True, 0)
        assert q.dim() == 4
        assert cache_seqlens.dtype == torch.int32
        assert cache_seqlens.is_contiguous()
        assert cache_seqlens.shape == (len(q),)
        num_seqs, rows = q.shape[:2]
        out, lse = self._run(
            q.flatten(0, 1),
            k_cache,
            v_cache,
            [rows] * num_seqs,
            cache_seqlens.tolist(),
            block_table,
            softmax_scale,
            causal,
            window_size,
            softcap,
        )
        self.calls.append("with_kvcache")
        out = out.unflatten(0, (num_seqs, rows))
        lse = lse.unflatten(1, (num_seqs, rows)).transpose(0, 1).float()
        return (out, lse) if return_softmax_lse else out

    def _run(self, q, k, v, num_rows, num_keys, table, scale, causal, window, softcap):
        check_heads(q, k, v)
        assert q.dim() == 3
        assert k.dim() == 4
        assert k.shape[1] % PAGE == 0
        assert q.shape[1] % k.shape[2] == 0
        assert isinstance(scale, float)
        assert isinstance(causal, bool)
        assert isinstance(softcap, float)
        assert softcap >= 0
        assert len(window) == 2
        check_table(table, num_keys, *k.shape[:2])
        mask = Mask(causal, window, self.from_bottom_right)
        out, lse = attend(
            *(q, (k, v), num_rows, num_keys, table),
            **{"scale": scale, "mask": mask, "softcap": softcap, "empty": math.inf},
        )
        return out.to(q.dtype), lse
