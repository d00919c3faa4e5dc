"""Chains that are drawn in one graph are those that are drawn token by token."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from gpu_models import VOCAB_SIZE, save_gpu_llama
from graph_stand_in import StandIn

from folospec.attention.triton_paged import TritonAttention
from folospec.kernels.gpu import launch
from folospec.kernels.gpu.sampling import DeviceSampling
from folospec.kernels.native_children import NO_NOISE, pack_wanted
from folospec.kernels.sampling_records import pack_filters, pack_sampling
from folospec.models.forward import Rows
from folospec.models.loader import load_model
from folospec.spec.draft_runner import ChainSampling
from folospec.worker.cuda import chain_graphs
from folospec.worker.model_runner import ModelRunner

pytestmark = pytest.mark.skipif(
    not launch.is_interpreted(), reason="a card records graphs of its own"
)
BLOCK_SIZE = 4
TABLES = [[3, 9, 17], [8, 2, 14], [11, 12, 13]]
STARTS = [5, 2, 7]
GREEDY, WARM, FILTERED = (0.0, 0, 1.0, 0.0), (0.9, 0, 1.0, 0.0), (1.1, 9, 0.9, 0.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_gpu_llama(tmp_path_factory.mktemp("draft"))


def make_runner(checkpoint, records=True):
    model = load_model(checkpoint, dtype="float32", attention=TritonAttention(), max_model_len=24)
    runner = ModelRunner(model, max_num_batched_tokens=64)
    runner.make_kv(20, BLOCK_SIZE, torch.device("cpu"))
    rng = random.Random(0)
    prompts = [
        Rows([rng.randrange(VOCAB_SIZE) for _ in range(start)], 0, table)
        for start, table in zip(STARTS, TABLES, strict=True)
    ]
    logits = runner.forward(prompts).logits.clone()
    if records:
        runner.use_graphs(StandIn(), DeviceSampling(part=32), verifies=False)
    return runner, logits


def params_of(filters, start, length, seed=3):
    position = start if filters[0] > 0 else NO_NOISE
    return ChainSampling(pack_sampling(seed, 0, pack_filters(*filters)), position, 1.3, length)


def drawn_one_by_one(runner, logits, chains):
    """The same chains, each drawn and run alone."""
    sampling = DeviceSampling(part=32)
    tokens, chances = [], []
    for seq, chain in enumerate(chains):
        row, token_ids, confidence = logits[seq : seq + 1], [], []
        for depth in range(chain.length):
            position = chain.position if chain.position < 0 else chain.position + depth
            ((found, chance),) = sampling.draw(
                row, [chain.packed], [pack_wanted(0, position, 1, chain.scale)], 1
            )
            if not found:
                break
            token_ids += found
            confidence += chance
            if depth < chain.length - 1:
                row = runner.forward([Rows(found, STARTS[seq] + depth, TABLES[seq])]).logits
        tokens.append(token_ids)
        chances.append(confidence)
    return tokens, chances


@pytest.mark.parametrize(
    ("filters", "lengths"),
    [
        ((GREEDY,) * 3, (3, 3, 3)),
        ((GREEDY, WARM, WARM), (1, 4, 2)),
        ((FILTERED, WARM, GREEDY), (3, 2, 1)),
    ],
)
def test_tokens_confidence_and_kv_are_the_same(checkpoint, filters, lengths):
    chains = [params_of(*parts) for parts in zip(filters, STARTS, lengths, strict=True)]
    runner, logits = make_runner(checkpoint)
    slow, _ = make_runner(checkpoint, records=False)
    for _ in range(2):  # the second time is a replay alone
        drawn = runner.draw_chains(logits, STARTS, TABLES, chains)
        tokens, chances = drawn_one_by_one(slow, logits, chains)
        assert drawn.token_ids == tokens
        for mine, theirs in zip(drawn.confidence, chances, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-3)
    torch.testing.assert_close(runner.kv.layers[0].key, slow.kv.layers[0].key)
    assert [len(ids) for ids in tokens] == list(lengths)


def test_noise_is_that_of_each_position(checkpoint, monkeypatch):
    """Without `advance` all tokens of a chain would be drawn with the noise of the first."""
    chains = [params_of(WARM, start, 4) for start in STARTS]
    real = DeviceSampling.draw_next

    def stuck(self, *args, advance, **options):
        real(self, *args, advance=0, **options)

    monkeypatch.setattr(DeviceSampling, "draw_next", stuck)
    runner, logits = make_runner(checkpoint)
    drawn = runner.draw_chains(logits, STARTS, TABLES, chains)
    monkeypatch.undo()
    slow, _ = make_runner(checkpoint, records=False)
    tokens, _ = drawn_one_by_one(slow, logits, chains)
    assert drawn.token_ids != tokens


def test_a_chain_ends_where_nothing_is_possible(checkpoint):
    runner, logits = make_runner(checkpoint)
    logits[1] = -torch.inf
    chains = [params_of(GREEDY, start, 3) for start in STARTS]
    drawn = runner.draw_chains(logits, STARTS, TABLES, chains)
    assert [len(ids) for ids in drawn.token_ids] == [3, 0, 3]


def test_a_chain_without_slots_is_refused(checkpoint):
    runner, logits = make_runner(checkpoint)
    chains = [params_of(GREEDY, start, 8) for start in STARTS]  # the third one has room for 5 more
    with pytest.raises(ValueError, match="rows must be within the 12 slots, got a row 13"):
        runner.draw_chains(logits, STARTS, TABLES, chains)


def test_what_no_graph_is_made_for_is_left_to_the_caller(checkpoint):
    runner, logits = make_runner(checkpoint, records=False)
    chains = [params_of(GREEDY, start, 2) for start in STARTS]
    assert runner.draw_chains(logits, STARTS, TABLES, chains) is None
    runner.use_graphs(StandIn(), DeviceSampling(part=32), verifies=False)
    long = [params_of(GREEDY, start, chain_graphs.MAX_LENGTH + 1) for start in STARTS]
    assert runner.draw_chains(logits, STARTS, TABLES, long) is None
