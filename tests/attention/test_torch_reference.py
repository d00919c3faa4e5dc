"""The gather attention sees exactly the keys that each row may see."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from steps import BLOCK_SIZE, NUM_SLOTS, Step, naive, random_step

from folospec.attention.base import LayerKV, get_backend, known_backends
from folospec.attention.metadata import AttentionMetadata, SequenceRows

MIXES = {
    "decodes": ["decode"] * 5,
    "one decode": ["decode"],
    "equal chains": ["chain"],
    "trees": ["tree"] * 4,
    "one chunk": ["chunk"],
    "prompts": ["prompt", "prompt"],
    "everything": ["decode", "tree", "chunk", "chain", "prompt", "decode", "tree", "chain"],
}
HEADS = [(4, 4), (4, 2), (6, 1)]
BACKEND = get_backend("torch")


def attend(step: Step, *, window: int | None = None, softcap: float | None = None):
    scale = step.query.shape[2] ** -0.5
    return BACKEND.forward(
        step.query,
        step.key,
        step.value,
        LayerKV(*(cache.clone() for cache in step.kv)),
        step.metadata,
        scale=scale,
        sliding_window=window,
        softcap=softcap,
    )


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (None, 2.0), (7, 2.0)])
def test_every_row_equals_dense_attention_over_the_keys_it_may_see(mix, heads, window, softcap):
    for seed in range(2):
        step = random_step(MIXES[mix], heads, seed=seed)
        expected = naive(step, window=window, softcap=softcap)
        result = attend(step, window=window, softcap=softcap)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def test_without_its_ancestor_mask_a_tree_comes_out_wrong():
    step = random_step(["tree", "decode"], (4, 2), seed=1)
    expected = naive(step, window=None, softcap=None)
    assert (attend(step.without_masks()) - expected).abs().max() > 1e-2


def test_a_window_one_too_wide_or_narrow_comes_out_wrong():
    step = random_step(MIXES["everything"], (4, 2), seed=2)
    expected = naive(step, window=5, softcap=None)
    for wrong in (4, 6, None):
        assert (attend(step, window=wrong) - expected).abs().max() > 1e-2


def test_the_step_writes_its_keys_and_values_at_its_slots_and_nowhere_else():
    step = random_step(MIXES["everything"], (4, 2), seed=3)
    before = [cache.clone() for cache in step.kv]
    BACKEND.forward(step.query, step.key, step.value, step.kv, step.metadata, scale=1.0)
    slots = step.metadata.slot_mapping
    for cache, old, new in zip(step.kv, before, (step.key, step.value), strict=True):
        assert torch.equal(cache[slots], new)
        old[slots] = new
        assert torch.equal(cache.nan_to_num(), old.nan_to_num())


@pytest.mark.parametrize("mix", ["one decode", "everything"])
def test_keys_and_values_are_rounded_to_the_type_of_the_kv(mix):
    step = random_step(MIXES[mix], (4, 2), seed=5)
    narrow = LayerKV(*(cache.bfloat16() for cache in step.kv))
    rounded = replace(
        step,
        key=step.key.bfloat16().double(),
        value=step.value.bfloat16().double(),
        kv=LayerKV(*(cache.double() for cache in narrow)),
    )
    result = BACKEND.forward(
        step.query, step.key, step.value, narrow, step.metadata, scale=step.query.shape[2] ** -0.5
    )
    assert narrow.key.dtype == torch.bfloat16
    assert result.dtype == torch.float64
    expected = naive(rounded, window=None, softcap=None)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    assert (result - naive(step, window=None, softcap=None)).abs().max() > 1e-4


def test_one_plan_serves_every_layer_of_a_step():
    step = random_step(MIXES["everything"], (4, 2), seed=4)
    metadata = step.metadata
    for window in (None, 5, None, 5):
        BACKEND.forward(
            step.query, step.key, step.value, step.kv, metadata, scale=1.0, sliding_window=window
        )
    assert len(metadata.plan) == 2


class LonelyRow:
    """One row with `num_keys` keys, the last its own: in blocks, or partly in scattered slots."""

    def __init__(self, num_keys: int, dtype: torch.dtype, seed: int) -> None:
        noise = torch.Generator().manual_seed(seed)
        self.num_keys, self.dtype = num_keys, dtype
        self.keys, self.values = torch.randn(2, num_keys, 2, 16, generator=noise).to(dtype)
        self.query = torch.randn(1, 4, 16, generator=noise).to(dtype)
        self.slots = torch.randperm(NUM_SLOTS // 2, generator=noise)[:num_keys].tolist()
        order = torch.randperm(NUM_SLOTS // 2 // BLOCK_SIZE, generator=noise)
        self.blocks = (order + NUM_SLOTS // 2 // BLOCK_SIZE).tolist()

    def run(self, context_len: int, *, window: int | None = None, order: list[int] | None = None):
        """Attend with keys 0..context_len-1 in blocks and the others in scattered slots.

        `order` is the logical order of the keys, if not that of their numbers.
        """
        slots = [
            self.blocks[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(context_len)
        ] + self.slots[context_len:]
        logical = list(range(self.num_keys)) if order is None else order
        kv = LayerKV(*torch.full((2, NUM_SLOTS, 2, 16), torch.nan, dtype=self.dtype))
        kv.key[slots], kv.value[slots] = self.keys[logical], self.values[logical]
        rows = SequenceRows(
            positions=[self.num_keys - 1],
            slots=[slots[-1]],
            context_len=context_len,
            block_table=self.blocks,
            suffix_slots=slots[context_len:],
            suffix_positions=list(range(context_len, self.num_keys)),
        )
        return BACKEND.forward(
            self.query,
            self.keys[-1:],
            self.values[-1:],
            kv,
            AttentionMetadata.from_rows([rows], BLOCK_SIZE),
            scale=0.25,
            sliding_window=window,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("window", [None, 9])
def test_a_row_alone_has_the_same_bits_wherever_its_ancestors_are(dtype, window):
    for seed, num_keys in enumerate((2, 5, 17, 64, 65, 130, 300)):
        row = LonelyRow(num_keys, dtype, seed)
        plain = row.run(num_keys - 1, window=window)
        for num_ancestors in {1, num_keys // 3, num_keys - 1}:
            scattered = row.run(num_keys - 1 - num_ancestors, window=window)
            assert torch.equal(plain, scattered)


def test_the_bits_of_a_row_do_depend_on_the_order_of_its_keys():
    different = 0
    for seed in range(10):
        row = LonelyRow(64, torch.float32, seed)
        swapped = [1, 0, *range(3, 63), 2, 63]
        different += not torch.equal(row.run(63), row.run(63, order=swapped))
    assert different > 0


def test_metadata_refuses_rows_that_do_not_fit_together():
    fine = {"positions": [0, 1], "slots": [0, 1], "context_len": 0, "block_table": [0]}
    cases = [
        {"positions": [], "slots": []},
        {"slots": [0]},
        {"suffix_slots": [0, 1], "suffix_positions": [0]},
        {"suffix_mask": torch.ones(1, 2, dtype=torch.bool)},
    ]
    for case in cases:
        with pytest.raises(ValueError, match="got"):
            AttentionMetadata.from_rows([SequenceRows(**{**fine, **case})], 4)


def test_backends_are_known_by_name_and_an_unknown_one_is_refused():
    assert known_backends()["torch"] is None
    assert known_backends()[get_backend("auto").name] is None
    assert BACKEND.supports(torch.float16, 80, 16) is None
    assert "int64" in (BACKEND.supports(torch.int64, 80, 16) or "")
    with pytest.raises(ValueError, match="'nonsense'"):
        get_backend("nonsense")
