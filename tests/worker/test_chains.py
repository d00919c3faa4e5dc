"""Chains that move on in place have the logits of rows that are packed anew in every pass."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from sharp_models import save_sharp
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from folospec.attention import native_cpu
from folospec.attention.base import known_backends
from folospec.attention.metadata import AttentionMetadata, pack_tables
from folospec.models.forward import Rows
from folospec.models.loader import load_model
from folospec.spec.draft_runner import RowChains
from folospec.worker.model_runner import ModelRunner, PassChains

VOCAB_SIZE, BLOCK_SIZE = 41, 4
LENGTHS = (7, 1, 12, 4)
STEPS = 9
BACKENDS = ["torch", *(["native"] if known_backends()["native"] is None else [])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("windowed")
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        sliding_window=6,
    )
    return save_sharp(MistralForCausalLM(config), path)


@pytest.fixture(params=BACKENDS)
def runner(request: Any, folder: str) -> ModelRunner:
    model = load_model(folder, dtype=torch.float32, attention=request.param)
    runner = ModelRunner(model, max_num_batched_tokens=64)
    runner.make_kv(40, BLOCK_SIZE, torch.device("cpu"))
    return runner


def tables() -> list[list[int]]:
    blocks = random.Random(0).sample(range(40), 32)
    return [blocks[8 * seq : 8 * seq + 6 + seq % 2] for seq in range(len(LENGTHS))]


def start(runner: ModelRunner) -> None:
    for seq, length in enumerate(LENGTHS):
        runner.forward(
            [Rows([(seq + 3 * t) % VOCAB_SIZE for t in range(length)], 0, tables()[seq])]
        )


def run(chains: Any) -> list[Tensor]:
    """The logits of every pass, whose tokens are all different; two chains end on the way."""
    results, kept = [], list(range(len(LENGTHS)))
    for step in range(STEPS):
        if step in (3, 6):
            chosen = [index for index, seq in enumerate(kept) if seq != step // 3]
            chains.keep(chosen)
            kept = [kept[index] for index in chosen]
        token_ids = [(5 * seq + 7 * step) % VOCAB_SIZE for seq in kept]
        results.append(chains.forward(token_ids))
    return results


def test_chains_in_place_equal_chains_of_rows(runner: ModelRunner) -> None:
    start(runner)
    expected = run(RowChains(runner, LENGTHS, tables()))
    start(runner)
    chains = runner.chains(LENGTHS, tables())
    assert isinstance(chains, PassChains)
    for ours, theirs in zip(run(chains), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert runner.num_passes == 2 * (STEPS + len(LENGTHS))


def test_chains_that_do_not_move_on_are_noticed(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control."""
    start(runner)
    expected = run(RowChains(runner, LENGTHS, tables()))
    start(runner)
    monkeypatch.setattr(AttentionMetadata, "advance", lambda self: None)
    found = run(runner.chains(LENGTHS, tables()))
    assert torch.allclose(found[0], expected[0], atol=1e-4)
    assert all((a - b).abs().max() > 0.1 for a, b in zip(found[1:3], expected[1:3], strict=True))


def test_a_row_without_a_slot_is_refused_before_anything_is_written(runner: ModelRunner) -> None:
    """Behind the end of a shorter table lies another sequence's block."""
    before = [tensor.clone() for layer in runner.kv.layers for tensor in layer]
    full = [6 * BLOCK_SIZE, 3]
    for refused in (
        lambda: runner.forward([Rows([1], s, t) for s, t in zip(full, tables(), strict=False)]),
        lambda: runner.chains(full, tables()[:2]).forward([1, 1]),
    ):
        with pytest.raises(ValueError, match="slots"):
            refused()
    after = [tensor for layer in runner.kv.layers for tensor in layer]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    chains = runner.chains([full[0] - 1, 3], tables()[:2])
    chains.forward([1, 1])
    chains.keep([1])  # the other one has room
    chains.forward([1])


def test_rows_run_one_at_a_time_where_that_is_asked(folder: str) -> None:
    model = load_model(folder, dtype=torch.float32, attention="torch")
    runner = ModelRunner(model, max_num_batched_tokens=64, batch_invariant_reference=True)
    assert isinstance(runner.chains(LENGTHS, tables()), RowChains)


def test_a_plan_that_has_moved_on_is_the_plan_of_the_new_step() -> None:
    positions, packed = np.array(LENGTHS), pack_tables(tables())
    metadata = AttentionMetadata.of_single_rows(positions.copy(), packed, BLOCK_SIZE)
    plan = native_cpu.plan_step(metadata)
    first = native_cpu.first_keys(plan, 5)
    for moved in range(1, 10):
        metadata.advance()
        fresh = AttentionMetadata.of_single_rows(positions + moved, packed, BLOCK_SIZE)
        expected = native_cpu.plan_step(fresh)
        assert native_cpu.plan_step(metadata) is plan
        for name in ("num_keys", "context_lens", "tail_slots", "tail_start", "row_seq"):
            assert np.array_equal(getattr(plan, name), getattr(expected, name)), name
        assert np.array_equal(first, native_cpu.first_keys(expected, 5))
        assert torch.equal(metadata.positions, fresh.positions)
        assert torch.equal(metadata.slot_mapping, fresh.slot_mapping)
