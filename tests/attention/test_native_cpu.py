"""Native attention equals the gather attention in float64 on every shape, and its bits depend on a
row's keys alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from native_builds import BUILDS, NEON, REORDERED, RULES, breakable, built_for, require_native
from steps import BLOCK_SIZE, NUM_SLOTS, Step, random_step
from torch import Tensor

from folospec.attention.base import LayerKV, choose_backend, get_backend
from folospec.attention.metadata import AttentionMetadata, SequenceRows
from folospec.attention.native_cpu import NativeAttention
from folospec.kernels.native import Native

MIX = ["decode", "tree", "chunk", "chain", "prompt", "decode", "tree", "chain"]
CONTEXTS = (63, 64, 65, 127, 0, 128, 200, 1)
SETTINGS = [(None, None), (1, None), (9, None), (70, None), (None, 2.0), (70, 2.0)]
"""Window and soft cap."""
TOLERANCE = 5e-6
"""Values are averages of standard normals, summed in float32 over up to 260 keys."""
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def backend() -> NativeAttention:
    require_native()
    return NativeAttention()


@contextmanager
def running_on(backend: NativeAttention, library: Native) -> Iterator[None]:
    """The backend with another build of the kernels, while the context lasts."""
    own, backend.library = backend.library, library
    try:
        yield
    finally:
        backend.library = own


def attend(
    backend, step: Step, window: int | None = None, softcap: float | None = None, kv=None
) -> Tensor:
    """The step's output in float32 (or float64), whatever type its KV has."""
    wide = torch.promote_types(step.query.dtype, torch.float32)
    return backend.forward(
        *(t.to(wide if kv is None else t.dtype) for t in (step.query, step.key, step.value)),
        kv or LayerKV(*(cache.clone() for cache in step.kv)),
        step.metadata,
        scale=step.query.shape[2] ** -0.5,
        sliding_window=window,
        softcap=softcap,
    )


def exact(step: Step, window: int | None = None, softcap: float | None = None) -> Tensor:
    """What the oracle makes of the same numbers in float64."""
    wide = replace(
        step,
        query=step.query.double(),
        key=step.key.double(),
        value=step.value.double(),
        kv=LayerKV(*(cache.double() for cache in step.kv)),
    )
    return attend(get_backend("torch"), wide, window, softcap)


def error(backend, step: Step, window: int | None = None, softcap: float | None = None) -> float:
    """The largest difference to the oracle; infinite where anything is not a number."""
    difference = attend(backend, step, window, softcap).double() - exact(step, window, softcap)
    return float(difference.abs().nan_to_num(nan=torch.inf).max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("window", "softcap"), SETTINGS)
def test_every_kind_of_row_agrees_with_the_oracle(backend, dtype, window, softcap):
    for seed in range(2):
        step = random_step(
            MIX, (4, 2), seed=seed, dtype=dtype, head_size=32, contexts=CONTEXTS[seed:]
        )
        assert error(backend, step, window, softcap) < TOLERANCE


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fold", [1, 2, 3, 4, 5, 6, 7, 8, 32, 33, 71])
def test_any_number_of_query_heads_shares_a_kv_head(backend, dtype, fold):
    heads = (2 * fold, 2)
    step = random_step(MIX, heads, seed=fold, dtype=dtype, head_size=32, contexts=CONTEXTS)
    assert error(backend, step) < TOLERANCE


@pytest.mark.parametrize("kv_heads", range(1, 13))
def test_any_number_of_rows_beside_any_number_of_heads(backend, kv_heads):
    """However the heads are dealt out, none gets lost, and no room is overrun."""
    for fold, num_rows in [(1, n) for n in range(1, 34)] + [(4, n) for n in range(1, 10)]:
        step = random_step(
            ["chain"], (fold * kv_heads, kv_heads), seed=num_rows, dtype=torch.float32,
            head_size=32, contexts=(70,), num_rows=num_rows, num_slots=256,
        )  # fmt: skip
        assert error(backend, step) < TOLERANCE


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", range(32, 257, 32))
def test_any_head_size_that_is_supported(backend, dtype, head_size):
    step = random_step(
        ["decode", "tree", "chain"], (4, 2), seed=1, dtype=dtype, head_size=head_size,
        contexts=(65, 130, 60),
    )  # fmt: skip
    assert error(backend, step) < TOLERANCE


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_length_around_the_tiles(backend, dtype):
    for context in (*range(0, 8), *range(58, 70), *range(124, 131), 191, 192, 193):
        step = random_step(
            ["decode", "tree"], (2, 1), seed=context, dtype=dtype, head_size=32,
            contexts=(context, context),
        )  # fmt: skip
        assert error(backend, step) < TOLERANCE


@pytest.mark.parametrize("target", BUILDS)
def test_builds_for_lesser_machines_agree_with_the_oracle(backend, target):
    with running_on(backend, built_for(target)):
        for dtype in DTYPES:
            for window, softcap in ((None, None), (70, 2.0)):
                step = random_step(
                    MIX, (6, 2), seed=3, dtype=dtype, head_size=64, contexts=CONTEXTS
                )
                assert error(backend, step, window, softcap) < TOLERANCE


ATTENTION_RULES = {
    name: (70 if "window" in name else None, 2.0 if "cap" in name else None)
    for name, rule in RULES.items()
    if rule.file == "attention.h" and name not in REORDERED
}


@pytest.mark.parametrize("target", [None, NEON])
@pytest.mark.parametrize("rule", ATTENTION_RULES)
def test_a_broken_rule_is_seen(backend, rule, target):
    """Control of the tests above: each rule broken, in every kind of row that can show it."""
    step = random_step(MIX, (4, 2), seed=0, dtype=torch.float32, head_size=32, contexts=CONTEXTS)
    window, softcap = ATTENTION_RULES[rule]
    with running_on(backend, breakable(target).library):
        assert error(backend, step, window, softcap) < TOLERANCE
    with breakable(target).without(rule) as library, running_on(backend, library):
        assert error(backend, step, window, softcap) > 1000 * TOLERANCE


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_step_writes_its_keys_and_values_at_its_slots_and_nowhere_else(backend, dtype):
    step = random_step(MIX, (4, 2), seed=3, dtype=dtype, head_size=32, contexts=CONTEXTS)
    kv = LayerKV(*(cache.clone() for cache in step.kv))
    attend(backend, step, kv=kv)
    slots = step.metadata.slot_mapping
    for cache, old, new in zip(kv, step.kv, (step.key, step.value), strict=True):
        assert torch.equal(cache[slots], new)
        expected = old.clone()
        expected[slots] = new
        assert torch.equal(cache.nan_to_num(), expected.nan_to_num())


def test_what_is_not_a_number_stays_so(backend):
    """Nothing that a broken model makes may come out as plausible values."""
    step = random_step(["chain", "decode"], (4, 2), seed=5, dtype=torch.float32, head_size=32)
    for tensor in (step.query, step.key):
        spoilt = tensor[-1, 0, 0].clone()
        tensor[-1, 0, 0] = torch.nan
        out = attend(backend, step)
        assert out[-1, 0].isnan().all()
        assert not out[:-1].isnan().any()
        tensor[-1, 0, 0] = spoilt


class OneRow:
    """A row with the same keys in every surrounding: alone, in a chunk, in a tree, in company.

    Its keys are in blocks up to a context, the others at slots of their own.
    """

    def __init__(self, num_keys: int, dtype: torch.dtype, seed: int) -> None:
        self.noise = torch.Generator().manual_seed(seed)
        self.num_keys, self.dtype = num_keys, dtype
        self.keys, self.values = self.normal(num_keys, 2, 32), self.normal(num_keys, 2, 32)
        self.queries = self.normal(num_keys, 6, 32)
        self.blocks = torch.randperm(NUM_SLOTS // BLOCK_SIZE, generator=self.noise).tolist()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.noise).to(self.dtype)

    def run(
        self, backend, num_rows: int, *, lies: int = 0, company: int = 0, window=None
    ) -> Tensor:
        """The output of the last key's row, as the last of `num_rows` rows of its path. With
        `lies` other children beside each node of the path they are a shuffled tree; `company` is
        how many sequences run before it, and as many after."""
        context = self.num_keys - num_rows
        path, masks = self._tree(num_rows, lies)
        slots = [self._slot(context + row) for row in range(len(masks))]
        kv = LayerKV(*torch.full((2, NUM_SLOTS, 2, 32), torch.nan, dtype=self.dtype))
        before = [self._slot(index) for index in range(context)]
        kv.key[before], kv.value[before] = self.keys[:context], self.values[:context]
        shape = len(masks), *self.keys.shape[1:]
        rows = [self.normal(len(masks), 6, 32), self.normal(*shape), self.normal(*shape)]
        for tensor, own in zip(rows, (self.queries, self.keys, self.values), strict=True):
            tensor[path] = own[context:]
        mine = SequenceRows(
            positions=[context + int(mask.sum()) - 1 for mask in masks],
            slots=slots,
            context_len=context,
            block_table=self.blocks[:128],
            suffix_mask=torch.stack(masks) if lies else None,
        )
        sequences, tensors, at = [], [[], [], []], 0
        for number in range(2 * company + 1):
            if number == company:
                at = sum(len(s.positions) for s in sequences) + path[-1]
                sequences.append(mine)
                parts = rows
            else:
                others, parts = self._other(number, kv)
                sequences.append(others)
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.append(part)
        return backend.forward(
            *(torch.cat(parts) for parts in tensors),
            kv,
            AttentionMetadata.from_rows(sequences, BLOCK_SIZE),
            scale=0.25,
            sliding_window=window,
        )[at]

    def _slot(self, index: int) -> int:
        return self.blocks[index // BLOCK_SIZE] * BLOCK_SIZE + index % BLOCK_SIZE

    def _tree(self, depth: int, lies: int) -> tuple[list[int], list[Tensor]]:
        """Rows of the path, and every row's mask."""
        parents, path = [-1], [0]
        for _ in range(depth - 1):
            parents += [path[-1]] * lies
            parents.append(path[-1])
            path.append(len(parents) - 1)
        masks = []
        for row, parent in enumerate(parents):
            mask = masks[parent].clone() if row else torch.zeros(len(parents), dtype=torch.bool)
            mask[row] = True
            masks.append(mask)
        return path, masks

    def _other(self, number: int, kv: LayerKV) -> tuple[SequenceRows, list[Tensor]]:
        """A sequence in blocks of its own: short or long, of one row or several."""
        table = self.blocks[128 + 20 * number :]
        context, num_rows = 7 + 31 * (number % 3), 1 + number * 2 % 5
        slots = [table[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(80)]
        for cache in kv:
            cache[slots[:context]] = self.normal(context, 2, 32)
        rows = SequenceRows(
            positions=list(range(context, context + num_rows)),
            slots=slots[context : context + num_rows],
            context_len=context,
            block_table=table[:20],
        )
        return rows, [self.normal(num_rows, heads, 32) for heads in (6, 2, 2)]


LENGTHS = (2, 9, 63, 64, 65, 66, 100, 127, 128, 129, 150)


def differing(backend, dtype: torch.dtype, window: int | None) -> int:
    """In how many surroundings a row has other bits than alone."""
    count = 0
    for num_keys in LENGTHS:
        row = OneRow(num_keys, dtype, seed=num_keys)
        alone = row.run(backend, 1, window=window)
        for num_rows in sorted({2, 5, min(17, num_keys), num_keys} & set(range(num_keys + 1))):
            surroundings = [{}, {"company": 2}]
            if num_rows < 20:
                surroundings += [{"lies": 1}, {"lies": 2, "company": 1}]
            for options in surroundings:
                result = row.run(backend, num_rows, window=window, **options)
                torch.testing.assert_close(result, alone, rtol=0.02, atol=0.02)
                count += not torch.equal(result, alone)
        count += not torch.equal(row.run(backend, 1, company=3, window=window), alone)
    return count


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 60])
def test_a_row_has_the_same_bits_alone_in_a_chunk_in_a_tree_and_in_company(backend, dtype, window):
    assert differing(backend, dtype, window) == 0


@pytest.mark.parametrize("target", BUILDS)
def test_builds_for_lesser_machines_keep_the_bits(backend, target):
    with running_on(backend, built_for(target)):
        assert differing(backend, torch.bfloat16, None) == 0


@pytest.mark.parametrize("target", [None, NEON])
def test_tiles_that_end_with_the_context_break_the_bits(backend, target):
    """Control of the test above: sums that are as good, in an order that depends on the context."""
    step = random_step(MIX, (4, 2), seed=0, dtype=torch.float32, head_size=32, contexts=CONTEXTS)
    broken = breakable(target).without("tiles up to the context")
    with broken as library, running_on(backend, library):
        assert error(backend, step) < TOLERANCE
        assert differing(backend, torch.float32, None) > 0
    with running_on(backend, breakable(target).library):
        assert differing(backend, torch.float32, None) == 0


def test_what_it_cannot_serve_is_left_to_another(backend):
    cpu = torch.device("cpu")
    assert backend.supports(torch.float32, 64, 16) is None
    assert "float64" in (backend.supports(torch.float64, 64, 16) or "")
    for size in (16, 48, 288):
        assert f"got {size}" in (backend.supports(torch.float32, size, 16) or "")
    assert choose_backend("auto", torch.bfloat16, [64, 128], 16, cpu).name == "native"
    assert choose_backend("auto", torch.float32, [64, 80], 16, cpu).name == "torch"
    assert choose_backend("auto", torch.float64, [64], 16, cpu).name == "torch"
    with pytest.raises(ValueError, match="multiple of 32 up to 256, got 80"):
        choose_backend("native", torch.float32, [80], 16, cpu)


@pytest.mark.parametrize(
    ("field", "change", "reason"),
    [
        ("block_table", lambda x: x + NUM_SLOTS, "block ids must be in 0 .. 511"),
        ("block_table", lambda x: x - NUM_SLOTS, "block ids must be in 0 .. 511"),
        ("block_table", lambda x: x.astype(np.int64), "block_table must be"),
        ("block_table", lambda x: x[:, :1].copy(), "context lengths must be in 0 .. 4"),
        ("block_table", lambda x: x[:-1].copy(), "must have a block table each"),
        ("context_lens", lambda x: -x, "context lengths must be"),
        ("suffix_slots", lambda x: x + NUM_SLOTS, "slots of a suffix must be in 0 .. 2047"),
        ("suffix_slots", lambda x: x[:-1].copy(), "ends of suffixes must be"),
        ("slot_mapping", lambda x: x + NUM_SLOTS, "slot_mapping must be in 0 .. 2047"),
        ("slot_mapping", lambda x: -1 - x, "slot_mapping must be in 0 .. 2047"),
        ("slot_mapping", lambda x: x.double(), "slot_mapping must be int64"),
        ("slot_mapping", lambda x: x[1:].contiguous(), "slot_mapping must be int64"),
    ],
)
def test_a_step_that_points_at_kv_that_is_not_there_is_refused(backend, field, change, reason):
    step = random_step(
        ["decode", "decode"], (4, 2), seed=1, dtype=torch.float32, head_size=32, contexts=(70, 9)
    )
    metadata = step.metadata
    tensors = (step.query, step.key, step.value)
    backend.forward(*tensors, step.kv, metadata, scale=1.0)
    wrong = replace(metadata, **{field: change(getattr(metadata, field))}, plan={})
    with pytest.raises(ValueError, match=re.escape(reason)):
        backend.forward(*tensors, step.kv, wrong, scale=1.0)


@pytest.mark.parametrize("name", ["query", "key", "value", "keys of the KV", "values of the KV"])
def test_heads_of_another_size_are_refused(backend, name):
    step = random_step(["decode"], (4, 2), seed=1, dtype=torch.float32, head_size=32)
    given = {"query": step.query, "key": step.key, "value": step.value}
    given |= {"keys of the KV": step.kv.key, "values of the KV": step.kv.value}
    given[name] = given[name][..., :-1]
    query, key, value, *kv = given.values()
    with pytest.raises(ValueError, match="must be"):
        backend.forward(query, key, value, LayerKV(*kv), step.metadata, scale=1.0)
