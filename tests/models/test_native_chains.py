"""Chains that are drawn in one call of the native kernels are, to the bit, those that are drawn and
run token by token."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from native_builds import X86, breakable, built_for, require_native
from sharp_models import save_sharp
from transformers import MistralConfig, MistralForCausalLM

from folospec.attention.native_cpu import NativeAttention
from folospec.kernels.native_children import NO_NOISE, NativeChildren, pack_wanted
from folospec.kernels.sampling_records import pack_filters, pack_sampling
from folospec.models.forward import Rows
from folospec.models.loader import load_model
from folospec.models.native_chains import ChainBatch, draw_chains
from folospec.spec.draft_runner import ChainSampling
from folospec.worker.model_runner import ModelRunner

VOCAB_SIZE, BLOCK_SIZE = 41, 4
TABLES = [[3, 9, 17, 1, 30], [8, 2, 14, 31, 4], [11, 12, 13, 5, 6], [20, 21, 22, 23, 24]]
STARTS = [5, 2, 11, 8]
GREEDY, WARM, FILTERED = (0.0, 0, 1.0, 0.0), (0.9, 0, 1.0, 0.0), (1.1, 9, 0.9, 0.0)
CASES = {
    "alone": ((WARM,), (7,), (0.0,)),
    "greedy": ((GREEDY,) * 4, (6, 6, 6, 6), (0.0,) * 4),
    "of different lengths": ((GREEDY, WARM, FILTERED, WARM), (1, 7, 3, 5), (0.0,) * 4),
    "some unlikely": ((WARM, FILTERED, GREEDY, WARM), (7, 7, 7, 7), (0.3, 0.0, 0.2, 0.6)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    require_native()
    path = tmp_path_factory.mktemp("draft")
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


def make_runner(folder, dtype="float32", library=None):
    """A runner whose model has seen the prompts, and the logits after each."""
    attention = NativeAttention()
    attention.library = library or attention.library
    model = load_model(folder, dtype=dtype, attention=attention)
    runner = ModelRunner(model, max_num_batched_tokens=64)
    runner.make_kv(40, BLOCK_SIZE, torch.device("cpu"))
    rng = random.Random(0)
    prompts = [
        Rows([rng.randrange(VOCAB_SIZE) for _ in range(start)], 0, table)
        for start, table in zip(STARTS, TABLES, strict=True)
    ]
    return runner, runner.forward(prompts).logits.clone()


def params_of(filters, lengths, min_probability):
    return [
        ChainSampling(
            pack_sampling(3, 0, pack_filters(*each)),
            start if each[0] else NO_NOISE,
            1.3,
            length,
            low,
        )
        for each, start, length, low in zip(filters, STARTS, lengths, min_probability, strict=False)
    ]


def drawn_one_by_one(runner, logits, all_params, advance=1):
    """The same chains, each drawn and run alone; a control does not advance the noise."""
    sampling = NativeChildren(runner.model.attention.library.library)
    tokens, chances = [], []
    for seq, params in enumerate(all_params):
        row, token_ids, confidence, joint = logits[seq : seq + 1], [], [], 1.0
        chains = runner.chains([STARTS[seq]], [TABLES[seq]])
        for depth in range(params.length):
            position = params.position if params.position < 0 else params.position + advance * depth
            wanted = pack_wanted(0, position, 1, params.scale)
            ((found, chance),) = sampling.draw(row, [params.packed], [wanted], 1)
            token_ids, confidence = token_ids + found, confidence + chance
            joint *= chance[0] if chance else 0.0
            if not found or depth == params.length - 1 or joint < params.min_probability:
                break
            row = chains.forward(found)
        tokens.append(token_ids)
        chances.append(confidence)
    return tokens, chances


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_tokens_confidence_and_kv_are_the_same_bits(folder, threads, dtype, case):
    all_params = params_of(*CASES[case])
    runner, logits = make_runner(folder, dtype)
    slow, same = make_runner(folder, dtype)
    before = runner.num_passes
    drawn = runner.draw_chains(
        logits[: len(all_params)], STARTS[: len(all_params)], TABLES[: len(all_params)], all_params
    )
    tokens, chances = drawn_one_by_one(slow, same, all_params)
    assert drawn.token_ids == tokens
    assert drawn.confidence == chances
    for mine, theirs in zip(runner.kv.layers, slow.kv.layers, strict=True):
        assert torch.equal(mine.key, theirs.key)
        assert torch.equal(mine.value, theirs.value)
    assert runner.num_passes - before == max(map(len, tokens)) - 1
    if case == "some unlikely":
        assert min(map(len, tokens)) < 7


@pytest.mark.parametrize("target", X86)
def test_it_is_so_with_every_instruction_set_that_runs_here(folder, target):
    library = built_for(target)
    all_params = params_of(*CASES["of different lengths"])
    runner, logits = make_runner(folder, library=library)
    slow, same = make_runner(folder, library=library)
    drawn = runner.draw_chains(logits, STARTS, TABLES, all_params)
    assert drawn == drawn_one_by_one(slow, same, all_params)


@pytest.mark.parametrize("num_threads", [2, 5])
def test_threads_that_are_late_and_sleep_draw_the_same(folder, num_threads):
    """Without spinning every thread waits for others asleep, and wakes up behind them."""
    library, before = breakable().library, torch.get_num_threads()
    all_params = params_of(*CASES["some unlikely"])
    expected = None
    try:
        for threads in (1, *[num_threads] * 30):
            torch.set_num_threads(threads)
            runner, logits = make_runner(folder, library=library)
            drawn = runner.draw_chains(logits, STARTS, TABLES, all_params)
            expected = expected or drawn
            assert drawn == expected
    finally:
        torch.set_num_threads(before)


def test_control_noise_that_stays_at_the_first_position_draws_others(folder):
    all_params = params_of((WARM,) * 4, (6,) * 4, (0.0,) * 4)
    runner, logits = make_runner(folder)
    slow, same = make_runner(folder)
    drawn = runner.draw_chains(logits, STARTS, TABLES, all_params)
    assert drawn.token_ids != drawn_one_by_one(slow, same, all_params, advance=0)[0]


def test_a_chain_ends_where_nothing_is_possible(folder):
    runner, logits = make_runner(folder)
    logits[1] = -torch.inf
    drawn = runner.draw_chains(logits, STARTS, TABLES, params_of(*CASES["greedy"]))
    assert [len(ids) for ids in drawn.token_ids] == [6, 0, 6, 6]


def test_a_chain_without_slots_is_refused(folder):
    runner, logits = make_runner(folder)
    all_params = params_of((GREEDY,) * 4, (3, 3, 11, 3), (0.0,) * 4)
    with pytest.raises(ValueError, match="rows must be within the 20 slots, got a row 20"):
        runner.draw_chains(logits, STARTS, TABLES, all_params)


def test_logits_of_another_vocabulary_are_left_to_the_caller(folder):
    runner, _ = make_runner(folder)
    all_params = params_of(*CASES["greedy"])
    assert runner.draw_chains(torch.zeros(4, 50), STARTS, TABLES, all_params) is None


def batch_of(runner, given, **changes):
    """What `draw_chains` takes, with something changed."""
    params = pack_sampling(0, 0, pack_filters(*GREEDY))
    batch = ChainBatch(
        starts=[STARTS[0]],
        block_table=torch.tensor(TABLES[:1], dtype=torch.int32).numpy(),
        block_size=BLOCK_SIZE,
        all_params=[params],
        positions=[NO_NOISE],
        scales=[1.0],
        lengths=[3],
        min_probability=[0.0],
    )
    rows = changes.pop("logits", given[:1])
    return runner.model.native_for(1), rows, runner.kv.layers, replace(batch, **changes)


WRONG = {
    "starts": ({"starts": [-1]}, "starts must be in"),
    "an end behind the table": ({"lengths": [99]}, "ends of chains must be in"),
    "a block that is not there": (
        {"block_table": torch.full((1, 5), 40, dtype=torch.int32).numpy()},
        "block ids must be in",
    ),
    "no tokens": ({"lengths": [0]}, "length of at least 1"),
    "a parameter set too few": ({"all_params": []}, "there must be a parameter set"),
    "a short parameter set": ({"all_params": [b"abc"]}, "a parameter set must have"),
    "logits of another size": ({"logits": torch.zeros(1, 7)}, "logits must be"),
    "logits of doubles": ({"logits": torch.zeros(1, VOCAB_SIZE).double()}, "logits must be"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_the_kernels_must_not_be_given_is_refused(folder, name):
    changes, message = WRONG[name]
    runner, logits = make_runner(folder)
    with pytest.raises(ValueError, match=message):
        draw_chains(*batch_of(runner, logits, **changes))
    assert draw_chains(*batch_of(runner, logits)).num_passes == 2
