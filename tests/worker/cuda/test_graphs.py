"""A pass that is replayed computes what the same pass computes when it is launched: logits, KV,
auxiliary hidden states and paths, whatever ran in the bucket before."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton")

from gpu_models import VOCAB_SIZE, save_gpu_llama
from graph_stand_in import StandIn

from folospec.attention.triton_paged import TritonAttention
from folospec.kernels.gpu import launch
from folospec.kernels.gpu.sampling import DeviceSampling
from folospec.kernels.sampling_records import PackedTrees, pack_filters, pack_sampling
from folospec.models.forward import Rows
from folospec.models.loader import load_model
from folospec.worker.cuda import buckets, graphs
from folospec.worker.model_runner import ModelRunner

pytestmark = pytest.mark.skipif(
    not launch.is_interpreted(), reason="a card records graphs of its own"
)
BLOCK_SIZE, NUM_BLOCKS = 4, 40
TABLES = [[3, 9, 17, 4, 6, 1], [8, 2, 30, 31, 5, 0], [11, 12, 13, 20, 21, 22]]
TREE = [-1, 0, 1, 0, 3, 0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_gpu_llama(tmp_path_factory.mktemp("model"))


def make_runner(checkpoint, *, deterministic=False, records=True, verifies=False):
    model = load_model(
        checkpoint, dtype="float32", attention=TritonAttention(deterministic), max_model_len=24
    )
    runner = ModelRunner(model, max_num_batched_tokens=64)
    runner.make_kv(NUM_BLOCKS, BLOCK_SIZE, torch.device("cpu"))
    if records:
        runner.use_graphs(StandIn(), DeviceSampling(part=32), verifies=verifies)
    return runner


def rows_of(rng, seq, start, count, parents=None, num_logits=None):
    token_ids = [rng.randrange(VOCAB_SIZE) for _ in range(count)]
    wanted = count if num_logits is None else num_logits
    return Rows(token_ids, start, TABLES[seq], wanted, parents)


def some_steps(seed=1):
    """Steps of all kinds; most of them share a bucket with one of another kind."""
    rng = random.Random(seed)
    return [
        [rows_of(rng, 0, 0, 7), rows_of(rng, 1, 0, 1)],  # chunks
        [rows_of(rng, 0, 7, 1), rows_of(rng, 1, 1, 1)],  # plain
        [rows_of(rng, 0, 8, 6, TREE), rows_of(rng, 1, 2, 2)],  # a tree, and a chain
        [rows_of(rng, 0, 8, 3), rows_of(rng, 1, 2, 5, TREE[:5])],
        [rows_of(rng, 1, 3, 3, None, 1), rows_of(rng, 0, 9, 2, None, 2)],  # catching up
        [rows_of(rng, 0, 11, 1)],
        [rows_of(rng, 1, 6, 2), rows_of(rng, 0, 12, 6, TREE)],
    ]


def check_same(left, right):
    torch.testing.assert_close(left.logits, right.logits, rtol=1e-5, atol=1e-5)
    for layer, stream in right.aux_hidden_states.items():
        torch.testing.assert_close(left.aux_hidden_states[layer], stream, rtol=1e-5, atol=1e-5)
    assert left.aux_hidden_states.keys() == right.aux_hidden_states.keys()


def check_same_kv(left, right):
    for mine, theirs in zip(left.kv.layers, right.kv.layers, strict=True):
        torch.testing.assert_close(mine.key, theirs.key, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine.value, theirs.value, rtol=1e-5, atol=1e-5)


def check_steps(replaying, launching, aux_layers=()):
    for step in some_steps():
        check_same(replaying.forward(step, aux_layers), launching.forward(step, aux_layers))
    check_same_kv(replaying, launching)


@pytest.mark.parametrize("deterministic", [False, True])
def test_replayed_steps_equal_launched_ones(checkpoint, deterministic):
    replaying = make_runner(checkpoint, deterministic=deterministic)
    launching = make_runner(checkpoint, deterministic=deterministic, records=False)
    check_steps(replaying, launching, (0, 1))
    recorder = replaying.graphs.recorder
    assert recorder.num_recorded < recorder.num_replayed == len(some_steps())


@pytest.mark.parametrize(
    "forgotten", ["context_lens", "block_table", "suffix_slots", "slot_mapping", "mask_words"]
)
def test_an_array_that_is_not_sent_is_noticed(checkpoint, monkeypatch, forgotten):
    real = graphs.GraphShapes.arrays
    sent = []

    def without(self, bucket, inputs):
        arrays = real(self, bucket, inputs)
        if sent:
            arrays.pop(forgotten)
        sent.append(1)
        return arrays

    monkeypatch.setattr(graphs.GraphShapes, "arrays", without)
    replaying, launching = make_runner(checkpoint), make_runner(checkpoint, records=False)
    with pytest.raises(AssertionError):
        check_steps(replaying, launching)


def test_rows_of_padding_write_no_kv(checkpoint):
    runner = make_runner(checkpoint)
    runner.forward([rows_of(random.Random(2), 0, 0, 5)])  # in a bucket of 6 rows
    written = {slot for slot in range(24) if runner.kv.layers[0].key[_slot(0, slot)].any()}
    assert written == set(range(5))
    outside = torch.ones(NUM_BLOCKS * BLOCK_SIZE, dtype=torch.bool)
    outside[[_slot(0, index) for index in range(5)]] = False
    assert not runner.kv.layers[0].key[outside].any()


def _slot(seq, index):
    return TABLES[seq][index // BLOCK_SIZE] * BLOCK_SIZE + index % BLOCK_SIZE


def test_what_is_too_large_for_a_bucket_is_launched(checkpoint, monkeypatch):
    monkeypatch.setattr(buckets, "MAX_ROWS_EACH", 3)
    replaying, launching = make_runner(checkpoint), make_runner(checkpoint, records=False)
    step = [rows_of(random.Random(3), 0, 0, 6, TREE), rows_of(random.Random(4), 1, 0, 2)]
    check_same(replaying.forward(step), launching.forward(step))
    assert replaying.graphs.recorder.num_replayed == 0


def trees_of(step, chains):
    """PackedTrees of steps in which every row has logits; tokens are those of the rows below the
    root."""
    packed_trees, row = PackedTrees(), 0
    for rows, chain in zip(step, chains, strict=True):
        count = len(rows.token_ids)
        parents = rows.parents or list(range(-1, count - 1))
        above = [parent - 1 for parent in parents[1:]]
        packed_trees.add(chain, row, rows.start + 1, rows.token_ids[1:], above)
        row += count
    return packed_trees


def believe(step, tokens):
    """The step, with the target's own tokens at the first rows of every chain of drafts."""
    return [
        Rows([rows.token_ids[0], *told], rows.start, rows.block_table, rows.num_logits)
        for rows, told in zip(step, tokens, strict=True)
    ]


@pytest.mark.parametrize("filters", [(0.0, 0, 1.0, 0.0), (0.9, 0, 1.0, 0.0), (0.9, 5, 0.8, 0.01)])
def test_a_replayed_pass_draws_and_verifies(checkpoint, filters):
    replaying = make_runner(checkpoint, verifies=True)
    launching = make_runner(checkpoint, records=False)
    rng = random.Random(5)
    chains = [pack_sampling(seed, 0, pack_filters(*filters)) for seed in (7, 8)]
    prompts = [rows_of(rng, 0, 0, 5), rows_of(rng, 1, 0, 3)]
    for runner in (replaying, launching):
        runner.forward(prompts)
    accepted, sampling = 0, DeviceSampling(part=32)
    told = [[], []]
    for _ in range(3):
        step = believe([rows_of(rng, 0, 5, 1), rows_of(rng, 1, 3, 1)], told)
        step = [Rows([9, *r.token_ids[1:]], r.start, r.block_table, len(r.token_ids)) for r in step]
        packed_trees = trees_of(step, chains)
        result = replaying.forward(step, (), packed_trees)
        found = result.verified()
        launched = sampling.draw_and_verify(launching.forward(step).logits.float(), packed_trees)
        assert [one[:2] for one in found] == [one[:2] for one in launched]
        # A graph's rows are padded, and a product may round a row differently beside other rows.
        peaks = [one.peak for one in launched]
        assert [one.peak for one in found] == pytest.approx(peaks, abs=1e-4)
        for index, one in enumerate(found):
            accepted += len(one.path)
            told[index] = [*told[index][: len(one.path)], one.token_id]
        told[0] = [*told[0], 1]  # very likely wrong
    assert accepted > 0
    assert replaying.graphs.recorder.num_replayed == 4


def test_of_a_prompt_not_all_logits_are_computed(checkpoint):
    """A graph would compute all: so a target launches it, and leaves the walk to the caller."""
    step = [rows_of(random.Random(6), 0, 0, 4, None, 1)]
    chain = pack_sampling(1, 0, pack_filters(0.0, 0, 1.0, 0.0))
    packed_trees = PackedTrees()
    packed_trees.add(chain, 0, 4)
    runner, draft = make_runner(checkpoint, verifies=True), make_runner(checkpoint)
    result = runner.forward(step, (), packed_trees)
    assert result.verified is None
    assert runner.graphs.num_graphs == 0
    check_same(draft.forward(step), result)
    assert draft.graphs.num_graphs == 1, "a draft model catches up by a row or two"


def test_steps_without_verifies_and_with_them_share_a_graph(checkpoint):
    runner, rng = make_runner(checkpoint, verifies=True), random.Random(8)
    chain = pack_sampling(1, 0, pack_filters(0.0, 0, 1.0, 0.0))
    first, second = [rows_of(rng, 0, 0, 1)], [rows_of(rng, 0, 1, 1)]
    packed_trees = trees_of(first, [chain])
    found = runner.forward(first, (), packed_trees).verified()
    assert found[0].token_id >= 0
    assert runner.forward(second).verified is None
    assert runner.graphs.num_graphs == 1


def test_nothing_is_recorded_once_the_graphs_are_closed(checkpoint):
    runner, rng = make_runner(checkpoint), random.Random(9)
    runner.forward([rows_of(rng, 0, 0, 1)])
    runner.freeze_graphs()
    runner.forward([rows_of(rng, 0, 1, 1)])
    runner.forward([rows_of(rng, 0, 2, 3)])
    assert (runner.graphs.num_graphs, runner.graphs.recorder.num_replayed) == (1, 2)


def test_a_recording_that_fails_is_the_last_and_said(checkpoint, caplog):
    runner, launching = make_runner(checkpoint), make_runner(checkpoint, records=False)
    tries = []

    def failing(fn):
        tries.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    runner.graphs.recorder.record = failing
    rng = random.Random(10)
    for step in ([rows_of(rng, 0, 0, 2)], [rows_of(rng, 0, 2, 1)]):
        check_same(runner.forward(step), launching.forward(step))
    assert tries == [1]
    assert "a recording failed: operation not permitted" in caplog.text


def test_warming_up_leaves_nothing_to_record(checkpoint):
    runner = make_runner(checkpoint)
    runner.warm_up(max_num_seqs=2, max_rows_each=2)
    recorder = runner.graphs.recorder
    assert recorder.num_recorded == runner.graphs.num_graphs == 4
    rng = random.Random(7)
    for step in ([rows_of(rng, 0, 0, 2)], [rows_of(rng, 0, 2, 1), rows_of(rng, 1, 0, 2)]):
        runner.forward(step)
    assert recorder.num_recorded == 4
    assert recorder.num_replayed == 2
    assert not runner.kv.layers[0].key[:, 0, 0].isnan().any()
