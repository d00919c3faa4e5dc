"""A stand-in for xformers (`paged_libraries`); `SIGNATURES` is what the library itself says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import torch
from paged_libraries import Mask, attend, check_heads, check_table
from torch import Tensor

SIGNATURES = {
    # xformers 0.0.35, xformers/ops/fmha/__init__.py and attn_bias.py; 0.0.28 has the same.
    "memory_efficient_attention_forward": (
        "query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None"
    ),
    "memory_efficient_attention_partial": (
        "query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None"
    ),
    "from_seqlens": "q_seqlen, kv_seqlen, block_tables, page_size, *, device=None",
}
PAGE = 64


@dataclass
class Bias:
    """One of xformers' masks of paged keys."""

    causal: bool
    num_rows: list[int]
    num_keys: list[int]
    block_tables: Tensor
    page_size: int


class Xformers:
    """Functions and classes of xformers.ops.fmha, for its split-K kernel."""

    def __init__(self, *, from_bottom_right: bool = True) -> None:
        self.from_bottom_right = from_bottom_right
        self.op = object()
        self.calls: list[str] = []

    def modules(self) -> dict[str, ModuleType]:
        """What `sys.modules` has of it."""
        names = ("xformers", "ops", "fmha", "attn_bias")
        made = {}
        for depth in range(1, 5):
            made[".".join(names[:depth])] = ModuleType(names[depth - 1])
        made["xformers.ops.fmha.triton_splitk"] = ModuleType("triton_splitk")
        for path, module in made.items():
            parent, _, name = path.rpartition(".")
            if parent:
                setattr(made[parent], name, module)
        fmha = made["xformers.ops.fmha"]
        fmha.memory_efficient_attention_forward = self.memory_efficient_attention_forward
        fmha.memory_efficient_attention_partial = self.memory_efficient_attention_partial
        fmha.triton_splitk.FwOp = self.op
        fmha.attn_bias.PagedBlockDiagonalPaddedKeysMask = bias_class(causal=False)
        fmha.attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask = bias_class(causal=True)
        return made

    def memory_efficient_attention_forward(
        self, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
    ):
        self.calls.append("forward")
        out, _ = self._run(query, key, value, attn_bias, p, scale, op, output_dtype)
        return out.to(query.dtype)

    def memory_efficient_attention_partial(
        self, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
    ):
        """float32, and float64 log-sum-exps [1, KV heads, heads per KV head, rows]."""
        self.calls.append("partial")
        out, lse = self._run(query, key, value, attn_bias, p, scale, op, output_dtype)
        return out.float(), lse.unflatten(0, query.shape[2:4])[None]

    def _run(self, query, key, value, bias, p, scale, op, output_dtype):
        assert op is self.op
        assert isinstance(scale, float)
        assert (p, output_dtype) == (0.0, None)
        check_heads(query, key, value)
        assert query.dim() == key.dim() == 5
        assert query.shape[0] == key.shape[0] == 1
        assert query.shape[2:] == key.shape[2:]  # KV heads, heads per KV head, size
        assert key.stride(3) == 0 or key.shape[3] == 1  # expanded, not copied
        assert query.shape[-1] in (16, 32, 64, 128, 256, 512)
        assert query.stride(-2) % 8 == key.stride(-3) % 8 == 0
        assert bias.page_size % PAGE == 0
        assert key.shape[1] % bias.page_size == 0
        assert sum(bias.num_rows) == query.shape[1]
        if bias.causal:
            assert len(set(bias.num_rows)) == 1
            assert bias.num_rows[0] <= 16
        pages = tuple(t[0, :, :, 0].unflatten(0, (-1, bias.page_size)) for t in (key, value))
        check_table(bias.block_tables, bias.num_keys, len(pages[0]), bias.page_size)
        mask = Mask(bias.causal, from_bottom_right=self.from_bottom_right)
        out, lse = attend(
            *(query[0].flatten(1, 2), pages, bias.num_rows, bias.num_keys, bias.block_tables),
            **{"scale": scale, "mask": mask, "softcap": 0.0, "empty": -math.inf},
        )
        return out.view(query.shape), lse


def bias_class(*, causal: bool) -> SimpleNamespace:
    def from_seqlens(
        q_seqlen: list[int],
        kv_seqlen: list[int],
        block_tables: Tensor,
        page_size: int,
        *,
        device: torch.device | None = None,
    ) -> Bias:
        assert all(type(n) is int and n > 0 for n in q_seqlen)
        assert all(type(n) is int and n >= 0 for n in kv_seqlen)
        assert len(q_seqlen) == len(kv_seqlen)
        assert device == block_tables.device
        return Bias(causal, q_seqlen, kv_seqlen, block_tables, page_size)

    return SimpleNamespace(from_seqlens=from_seqlens)
