"""Stand-ins for the paged kernels of flash-attn and xformers, which run on no CPU.

They have the libraries' signatures, demand of every argument what the libraries demand or rely on,
and compute the answer in float64. This is what the two have in common.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)


@dataclass
class Mask:
    """Which keys a row sees, of those of its sequence."""

    causal: bool
    window: tuple[int, int] = (-1, -1)
    from_bottom_right: bool = True

    def seen(self, num_rows: int, num_keys: int) -> Tensor:
        offset = num_keys - num_rows if self.from_bottom_right else 0
        place = torch.arange(num_rows)[:, None] + offset
        key = torch.arange(num_keys)[None, :]
        left, right = self.window
        seen = torch.ones(num_rows, num_keys, dtype=torch.bool)
        if self.causal:
            right = 0
        if left >= 0:
            seen &= key >= place - left
        if right >= 0:
            seen &= key <= place + right
        return seen


def attend(
    query: Tensor,
    pages: tuple[Tensor, Tensor],
    num_rows: list[int],
    num_keys: list[int],
    block_table: Tensor,
    *,
    scale: float,
    mask: Mask,
    softcap: float,
    empty: float,
) -> tuple[Tensor, Tensor]:
    """float64 [rows, heads, size], zeros without keys, and [heads, rows], then `empty`."""
    block_size = pages[0].shape[1]
    fold = query.shape[1] // pages[0].shape[2]
    outs, lses, at = [], [], 0
    for seq, (rows, keys) in enumerate(zip(num_rows, num_keys, strict=True)):
        places = torch.arange(keys)
        found = block_table[seq, places // block_size].long(), places % block_size
        key, value = (page[found].double().repeat_interleave(fold, 1) for page in pages)
        scores = torch.einsum("rhd,khd->hrk", query[at : at + rows].double(), key) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~mask.seen(rows, keys), -math.inf)
        lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None]).exp().nan_to_num(0.0)
        outs.append(torch.einsum("hrk,khd->rhd", weights, value))
        lses.append(lse.masked_fill(lse == -math.inf, empty))
        at += rows
    assert at == len(query)
    return torch.cat(outs), torch.cat(lses, 1)


def check_table(table: Tensor, num_keys: list[int], num_blocks: int, block_size: int) -> None:
    assert table.dtype == torch.int32
    assert table.is_contiguous()
    assert table.shape[0] == len(num_keys)
    assert ((table >= 0) & (table < num_blocks)).all()
    assert all(0 <= keys <= table.shape[1] * block_size for keys in num_keys)


def check_heads(query: Tensor, key: Tensor, value: Tensor) -> None:
    assert query.dtype in HALVES
    assert query.dtype == key.dtype == value.dtype
    assert key.shape == value.shape
    assert query.shape[-1] == key.shape[-1]
    assert query.shape[-1] % 8 == 0
    assert query.shape[-1] <= 256
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1


def parameters(function: Callable) -> str:
    """Names and defaults, without what they are annotated with."""
    signature = inspect.signature(function)
    bare = [
        p.replace(annotation=inspect.Parameter.empty)
        for name, p in signature.parameters.items()
        if name not in ("self", "cls")
    ]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))[1:-1]
