"""Steps for backends that see context and suffix through different kernels, and what they should
make of them."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import steps
import torch
from steps import Step, random_step
from torch import Tensor

from folospec.attention.base import AttentionBackend, LayerKV, get_backend, known_backends
from folospec.attention.metadata import AttentionMetadata, SequenceRows
from folospec.attention.paged_rows import PagedRows

HEAD_SIZE = 32
NUM_BLOCKS = 30
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}
ROUGH = 0.05
"""Errors of wrong masks, tables and weights are far beyond the rounding of a result."""

STEPS: dict[str, tuple[list[str], dict[str, object]]] = {
    "decode": (["decode"] * 4, {"contexts": (0, 1, 255, 300)}),
    "one decode": (["decode"], {"contexts": (77,)}),
    "prompts": (["prompt", "chunk"], {"contexts": (0, 300)}),
    "chains of one length": (["chain"] * 3, {"contexts": (256, 0, 9), "num_rows": 5}),
    "chains": (["chain"] * 4, {"contexts": (256, 255, 0, 31)}),
    "long chains": (["chain"] * 2, {"contexts": (3, 290), "num_rows": 17}),
    "a node": (["tree"], {"contexts": (260,), "num_rows": 1}),
    "trees": (["tree"] * 3, {"contexts": (270, 0, 5)}),
    "a tree of 33": (["tree"], {"contexts": (13,), "num_rows": 33}),
    "trees of 64": (["tree"] * 2, {"contexts": (280, 40), "num_rows": 64}),
    "trees without context": (["tree"] * 2, {"contexts": (0, 0)}),
    "mixed": (["decode", "tree", "chunk", "chain", "tree"], {"contexts": (300, 6, 2, 0, 257)}),
    "mixed the other way": (["tree", "decode", "decode", "prompt"], {"contexts": (0, 17, 256)}),
}


def make_step(
    name: str, block_size: int, heads: tuple[int, int] = (6, 2), dtype: torch.dtype = torch.float16
) -> Step:
    """A step of `STEPS`, over pages of `block_size`. NaN where nobody may read."""
    kinds, options = STEPS[name]
    return _over_pages(block_size, kinds, heads, seed=len(name), dtype=dtype, **options)


def random_kinds(seed: int, block_size: int) -> Step:
    """A step of whatever comes, contexts up to the second page of 256 and beyond."""
    rng = random.Random(seed)
    kinds = [
        rng.choice(["decode", "chain", "chunk", "prompt", "tree"]) for _ in range(1 + seed % 4)
    ]
    contexts = tuple(rng.choice([0, 1, rng.randrange(300)]) for _ in kinds)
    return _over_pages(block_size, kinds, (6, 3), seed=seed, contexts=contexts)


def _over_pages(
    block_size: int,
    kinds: list[str],
    heads: tuple[int, int],
    dtype: torch.dtype = torch.float16,
    **options: Any,
) -> Step:
    held = steps.BLOCK_SIZE, steps.NUM_SLOTS
    steps.BLOCK_SIZE, steps.NUM_SLOTS = block_size, block_size * NUM_BLOCKS
    try:
        return random_step(kinds, heads, dtype=dtype, head_size=HEAD_SIZE, **options)
    finally:
        steps.BLOCK_SIZE, steps.NUM_SLOTS = held


def on(device: str, step: Step) -> Step:
    return replace(
        step,
        query=step.query.to(device),
        key=step.key.to(device),
        value=step.value.to(device),
        kv=LayerKV(*(cache.to(device) for cache in step.kv)),
    )


def metadata_of(step: Step, block_size: int) -> AttentionMetadata:
    return AttentionMetadata.from_rows(step.sequences, block_size, step.query.device)


def run(
    backend: AttentionBackend,
    step: Step,
    block_size: int,
    *,
    window: int | None = None,
    softcap: float | None = None,
    metadata: AttentionMetadata | None = None,
) -> Tensor:
    """What a backend makes of a step, whose KV it does not change."""
    return backend.forward(
        *(step.query, step.key, step.value, LayerKV(*(cache.clone() for cache in step.kv))),
        metadata or metadata_of(step, block_size),
        scale=HEAD_SIZE**-0.5,
        sliding_window=window,
        softcap=softcap,
    )


def expected(step: Step, block_size: int, **masks: float | None) -> Tensor:
    """In float64, by the reference."""
    wide = replace(
        step,
        query=step.query.double(),
        key=step.key.double(),
        value=step.value.double(),
        kv=LayerKV(*(cache.double() for cache in step.kv)),
    )
    return run(get_backend("torch"), wide, block_size, **masks)


def installed(name: str) -> AttentionBackend:
    """The backend over the library itself; skips where it cannot run."""
    if (reason := known_backends()[name]) is not None:
        pytest.skip(reason)
    return get_backend(name)


def error(backend: AttentionBackend, step: Step, block_size: int, **masks: float | None) -> float:
    """The largest; infinite where there is NaN."""
    got = run(backend, step, block_size, **masks)
    assert got.dtype == step.query.dtype
    difference = (got.double() - expected(step, block_size, **masks)).abs()
    return float(difference.nan_to_num(torch.inf).max())


def agrees(backend: AttentionBackend, step: Step, block_size: int, **masks: float | None) -> None:
    limit = TOLERANCE[step.query.dtype]
    found = error(backend, step, block_size, **masks)
    assert found < limit, f"off by {found}, allowed is {limit}"


def chain_elsewhere(block_size: int) -> Step:
    """A row that runs alone, with two ancestors in slots that are not in order: what a step by step
    pass over a tree makes."""
    step = make_step("a tree of 33", block_size)
    rows = step.sequences[0]
    path = [0, 5, 9]
    slots = [rows.slots[node] for node in path]
    single = SequenceRows(
        positions=[rows.context_len + 2],
        slots=slots[-1:],
        context_len=rows.context_len,
        block_table=rows.block_table,
        suffix_slots=slots,
        suffix_positions=range(rows.context_len, rows.context_len + 3),
    )
    for cache, new in zip(step.kv, (step.key, step.value), strict=True):
        cache[slots[:-1]] = new[path[:-1]]
    return replace(
        step,
        sequences=[single],
        query=step.query[9:10],
        key=step.key[9:10],
        value=step.value[9:10],
    )


def end_of_chains(block_size: int) -> Step:
    """The last two rows of chains of five, whose first three have run before."""
    step = make_step("chains of one length", block_size)
    sequences, rows = [], []
    for seq, chain in enumerate(step.sequences):
        first = 5 * seq
        for cache, new in zip(step.kv, (step.key, step.value), strict=True):
            cache[chain.slots[:3]] = new[first : first + 3]
        rows += [first + 3, first + 4]
        sequences.append(
            replace(
                chain,
                positions=chain.positions[3:],
                slots=chain.slots[3:],
                suffix_slots=chain.slots,
                suffix_positions=chain.positions,
            )
        )
    return replace(
        step,
        sequences=sequences,
        query=step.query[rows],
        key=step.key[rows],
        value=step.value[rows],
    )


def attend_suffix(
    query: Tensor,
    kv: tuple[Tensor, Tensor],
    rows: PagedRows,
    positions: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernel of that name, in float64 loops: it costs less than to interpret it."""
    assert window is None
    assert positions.shape == (len(query),)
    fold = query.shape[1] // kv[0].shape[1]
    out = torch.zeros(query.shape, dtype=torch.float32)
    lse = torch.zeros(query.shape[:2], dtype=torch.float32)
    for seq, start in enumerate(rows.suffix_start_loc[:-1].tolist()):
        end = int(rows.suffix_start_loc[seq + 1])
        slots = rows.suffix_slots[start:end].long()
        first, last = rows.query_start_loc[seq : seq + 2].tolist()
        num_words = -(-(end - start) // 32)
        key, value = (cache[slots].double().repeat_interleave(fold, 1) for cache in kv)
        for row in range(first, last):
            seen = torch.arange(end - start) < end - start - (last - 1 - row)
            if (word := int(rows.mask_start[seq])) >= 0:
                word += (row - first) * num_words
                words = rows.mask_words.reshape(-1)[word : word + num_words].tolist()
                bits = [(words[i // 32] >> (i % 32)) & 1 for i in range(end - start)]
                seen = torch.tensor(bits, dtype=torch.bool)
            scores = torch.einsum("hd,khd->hk", query[row].double(), key[seen]) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[row] = torch.einsum("hk,khd->hd", scores.softmax(-1), value[seen])
            lse[row] = scores.logsumexp(-1)
    return out, lse
