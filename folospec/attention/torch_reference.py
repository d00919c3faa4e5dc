"""Computes attention in torch by gathering keys: the reference for all other backends.

Each step is planned once (`gather_plan`). A step of one row gathers exactly the keys that the row
sees, in logical order, and needs no mask; so such a row's bits depend on its keys alone, not on
whether they came from the context or from slots of a tree.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from folospec.attention.base import AttentionBackend, LayerKV
from folospec.attention.gather_plan import ROW_CLASSES, Group, plan
from folospec.attention.metadata import AttentionMetadata


class TorchAttention(AttentionBackend):
    """Gather the keys, then torch's scaled_dot_product_attention."""

    name = "torch"
    deterministic_alone = True

    def __init__(self) -> None:
        self._scratch: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def supports(self, dtype: torch.dtype, head_size: int, block_size: int) -> str | None:
        """Any floating type, head and block size."""
        return None if dtype.is_floating_point else f"dtype must be a floating type, got {dtype}"

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
        kv.key.index_copy_(0, metadata.slot_mapping, key.to(kv.key.dtype))
        kv.value.index_copy_(0, metadata.slot_mapping, value.to(kv.value.dtype))
        plan_key = (sliding_window, softcap is None, query.dtype)
        groups = metadata.plan.get(plan_key)
        if groups is None:
            groups = metadata.plan[plan_key] = plan(
                metadata, sliding_window, query, softcap is None
            )
        if len(groups) == 1 and groups[0].padded_rows is None:
            gathered = self._gather(kv, groups[0], query.dtype)
            return _attend(query, gathered, groups[0], scale, softcap)
        output = query.new_empty(query.shape[0], query.shape[1], kv.value.shape[2])
        for group in groups:
            rows = query if group.padded_rows is None else query.index_select(0, group.padded_rows)
            gathered = self._gather(kv, group, query.dtype)
            result = _attend(rows, gathered, group, scale, softcap)
            if group.real_places is not None and group.real_rows is not None:
                result = result.index_select(0, group.real_places)
                output.index_copy_(0, group.real_rows, result)
        return output

    def _gather(self, kv: LayerKV, group: Group, dtype: torch.dtype) -> LayerKV:
        """The group's keys and values, each [num_seqs, num_kv_heads, num_keys, head_size], in the
        type of the queries.

        They lie in memory that is kept from call to call: to take and return megabytes in every
        layer costs more than the attention itself, as the system has to map each page anew.
        """
        gathered = []
        for name, cache in zip(kv._fields, kv, strict=True):
            shape = (group.num_seqs * group.num_keys, *cache.shape[1:])
            key = (name, cache.dtype, cache.device)
            scratch = self._scratch.get(key)
            if scratch is None or scratch.numel() < math.prod(shape):
                # Kept beyond this call, so it must be writable whatever mode a later one runs in.
                with torch.inference_mode(False):
                    scratch = self._scratch[key] = cache.new_empty(math.prod(shape))
            place = scratch[: math.prod(shape)].view(shape)
            torch.index_select(cache, 0, group.key_slots, out=place)
            keys = place.to(dtype).unflatten(0, (group.num_seqs, group.num_keys))
            gathered.append(keys.transpose(1, 2))
        return LayerKV(*gathered)


def _attend(
    rows: Tensor, gathered: LayerKV, group: Group, scale: float, softcap: float | None
) -> Tensor:
    """Run one group: rows [num_seqs * num_rows, heads, size] -> the same shape."""
    keys, values = gathered
    num_heads, num_kv_heads = rows.shape[1], keys.shape[1]
    fold = num_heads // num_kv_heads
    rows = rows.view(group.num_seqs, group.num_rows, num_kv_heads, fold, -1)
    mask = group.mask
    if group.num_rows > ROW_CLASSES[-1] and softcap is None:
        # [heads, rows] as they are: a mask that repeats per head would be larger than the keys.
        queries = rows.flatten(2, 3).transpose(1, 2)
        out = functional.scaled_dot_product_attention(
            queries, keys, values, mask, is_causal=group.causal, scale=scale, enable_gqa=fold > 1
        )
        return out.transpose(1, 2).flatten(0, 1)
    # The query heads of one KV head become rows, so that each key is read once for all of them.
    queries = rows.permute(0, 2, 3, 1, 4).flatten(2, 3)
    if mask is not None and group.num_rows > 1:
        mask = mask.expand(-1, fold, -1, -1).reshape(group.num_seqs, 1, fold * group.num_rows, -1)
    if softcap is None:
        out = functional.scaled_dot_product_attention(queries, keys, values, mask, scale=scale)
    else:
        out = _capped(queries, keys, values, mask, scale, softcap)
    out = out.unflatten(2, (fold, group.num_rows)).permute(0, 3, 1, 2, 4)
    return out.reshape(group.num_seqs * group.num_rows, num_heads, -1)


def _capped(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    scores = torch.matmul(queries, keys.transpose(2, 3)) * scale
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return torch.matmul(weights.to(values.dtype), values)
