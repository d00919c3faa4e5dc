"""The whole engine on GPU kernels, in Triton's interpreter, with a stand-in for CUDA graphs: the
tokens are those of plain decoding in torch, whatever is recorded and whoever drafts."""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "worker"))

from gpu_models import save_gpu_llama
from graph_stand_in import StandIn
from harness import assert_speculated, perturbed_copy

from folospec import LLM, SamplingParams
from folospec.kernels.gpu import launch, sampling_arrays
from folospec.kernels.sampling_records import VerifiedPath
from folospec.spec.planner.step_planner import StepPlanner
from folospec.spec.proposer import Proposer
from folospec.worker.cuda import capture
from folospec.worker.model_runner import ModelRunner

pytestmark = pytest.mark.skipif(
    not launch.is_interpreted(), reason="python -m gpu_check does it on a card"
)
PROMPTS = [{"prompt_token_ids": ids} for ids in ([5, 6, 7, 8, 5, 6, 7], [10, 20, 30])]
COMMON: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True}
GREEDY = [SamplingParams(temperature=0, **COMMON)] * 2
MIXED = [
    SamplingParams(temperature=0.9, seed=1, **COMMON),
    SamplingParams(temperature=0.7, top_p=0.9, top_k=20, seed=2, **COMMON),
]
SIBLINGS = [
    SamplingParams(temperature=1.0, n=2, seed=3, **COMMON),
    SamplingParams(temperature=0, repetition_penalty=1.4, **COMMON),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    target = save_gpu_llama(tmp_path_factory.mktemp("target"))
    draft = perturbed_copy(target, tmp_path_factory.mktemp("draft"), scale=0.15, seed=1)
    return target, draft


def make(model: str, speculative: Any = None, **options: Any) -> LLM:
    settings = {
        "dtype": "float32",
        "device": "cpu",
        "skip_tokenizer_init": True,
        "num_blocks": 40,
        "block_size": 4,
        "max_num_seqs": 4,
        "strict_drafters": True,
        "multi_step": 1,
    }
    return LLM(model, speculative, **{**settings, **options})


def tokens_of(llm: LLM, params: list[SamplingParams]) -> list[list[list[int]]]:
    outputs = llm.generate(PROMPTS, params)
    return [[list(one.token_ids) for one in output.outputs] for output in outputs]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(capture, "recorder", lambda device: stand_in)
    # Recorded when wanted, which the interpreter takes seconds for, and not all beforehand.
    for name in ("warm_up", "warm_up_chains", "warm_up_multi_step", "freeze_graphs"):
        monkeypatch.setattr(ModelRunner, name, lambda self, *_, **__: None)
    return stand_in


def chain_of(draft: str) -> dict[str, Any]:
    return {"method": "draft_model", "model": draft, "num_speculative_tokens": 3}


def tree_of(draft: str) -> dict[str, Any]:
    return {**chain_of(draft), "tree": "dynamic", "num_speculative_tokens": 5}


@pytest.mark.parametrize("params", [GREEDY, MIXED, SIBLINGS], ids=["greedy", "mixed", "siblings"])
def test_recorded_plain_steps_have_the_tokens_of_torch(
    models: tuple[str, str], recorder: StandIn, params: list[SamplingParams]
) -> None:
    plain = tokens_of(make(models[0], attention_backend="torch", enforce_eager=True), params)
    assert tokens_of(make(models[0], attention_backend="triton"), params) == plain
    assert recorder.num_replayed > recorder.num_recorded


@pytest.mark.parametrize(
    ("shape", "params", "deterministic"),
    [(chain_of, GREEDY, None), (chain_of, MIXED, True), (tree_of, MIXED, None)],
    ids=["greedy chains", "sampled chains, deterministic", "sampled trees"],
)
def test_recorded_speculation_has_the_tokens_of_plain_decoding(
    models: tuple[str, str],
    recorder: StandIn,
    shape: Any,
    params: list[SamplingParams],
    deterministic: bool | None,
) -> None:
    plain = tokens_of(make(models[0], attention_backend="torch", enforce_eager=True), params)
    options = {"attention_backend": "triton", "deterministic": deterministic}
    llm = make(models[0], shape(models[1]), **options)
    assert tokens_of(llm, params) == plain
    assert_speculated(llm.stats(), moved=shape is tree_of)
    assert llm.stats()["lossless"] == ("bitwise" if deterministic else "tokens")
    assert recorder.num_replayed > recorder.num_recorded


def test_tokens_that_are_drawn_ahead_are_those_of_single_steps(
    models: tuple[str, str], recorder: StandIn
) -> None:
    slow = make(models[0], attention_backend="triton", enforce_eager=True)
    plain = tokens_of(slow, MIXED)
    llm = make(models[0], attention_backend="triton", multi_step=4)
    assert tokens_of(llm, MIXED) == plain
    stats = llm.stats()
    assert stats["num_steps"] < slow.stats()["num_steps"] <= stats["num_target_passes"]
    assert stats["num_draft_tokens"] == 0
    assert llm.engine.manager.num_free_blocks == 40


def test_an_output_may_end_among_tokens_that_are_drawn_ahead(
    models: tuple[str, str], recorder: StandIn
) -> None:
    """And one whose logprobs are wanted goes token by token beside it."""
    slow = make(models[0], attention_backend="triton", enforce_eager=True)
    ((first,), _) = tokens_of(slow, GREEDY)
    params = [
        SamplingParams(temperature=0, stop_token_ids=[first[4]], **COMMON),
        SamplingParams(temperature=0.9, seed=1, max_tokens=7, logprobs=1, ignore_eos=True),
    ]
    plain = tokens_of(slow, params)
    llm = make(models[0], attention_backend="triton", multi_step=4)
    assert tokens_of(llm, params) == plain
    assert len(plain[0][0]) == first.index(first[4]) + 1 < 8
    assert llm.stats()["num_target_passes"] > llm.stats()["num_steps"]


def test_where_the_planner_wants_no_drafts_tokens_are_drawn_ahead(
    models: tuple[str, str], recorder: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tokens_of(make(models[0], attention_backend="triton", enforce_eager=True), MIXED)
    monkeypatch.setattr(StepPlanner, "is_idle", True)
    recorded: list[float] = []
    record = Proposer.record_step
    monkeypatch.setattr(
        Proposer, "record_step", lambda self, s: (recorded.append(s), record(self, s))
    )
    speculative = {"method": "suffix", "adaptive": True}
    llm = make(models[0], speculative, attention_backend="triton", multi_step=4)
    ticks = count()  # by whose clock every step takes as long
    monkeypatch.setattr(llm.engine.proposer, "clock", lambda: next(ticks))
    assert tokens_of(llm, MIXED) == plain
    stats = llm.stats()
    assert stats["num_target_passes"] > stats["num_steps"] == len(recorded)
    assert stats["num_draft_tokens"] == 0
    # What the planner is told is the time of a pass.
    assert min(recorded) == max(recorded) / 4


@pytest.mark.parametrize("params", [GREEDY, MIXED], ids=["greedy", "mixed"])
def test_steps_with_drafts_and_steps_that_run_ahead_take_turns(
    models: tuple[str, str],
    recorder: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    params: list[SamplingParams],
) -> None:
    """The slots behind a last token are for the one or the other, never for both."""
    plain = tokens_of(make(models[0], attention_backend="triton", enforce_eager=True), params)
    by_turns = property(lambda self: self.stats.num_steps % 3 == 2)
    monkeypatch.setattr(Proposer, "is_idle", by_turns)
    llm = make(models[0], chain_of(models[1]), attention_backend="triton")
    llm.engine.multi_step.length, llm.engine.worker._lengths = 2, (2, 1)
    assert tokens_of(llm, params) == plain
    stats = llm.stats()
    assert_speculated(stats)
    assert stats["num_target_passes"] > stats["num_steps"]


def test_noise_of_another_position_is_noticed_in_tokens_that_are_drawn_ahead(
    models: tuple[str, str], recorder: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tokens_of(make(models[0], attention_backend="triton", enforce_eager=True), MIXED)
    monkeypatch.setattr("folospec.worker.cuda.chain_graphs.POSITION", 3)  # nothing advances
    llm = make(models[0], attention_backend="triton", multi_step=4)
    assert tokens_of(llm, MIXED) != plain


def test_running_ahead_is_refused_where_it_cannot_be(
    models: tuple[str, str], recorder: StandIn
) -> None:
    with pytest.raises(
        ValueError, match="multi_step must be None or 1 where no CUDA graphs run, got 4"
    ):
        make(models[0], attention_backend="triton", enforce_eager=True, multi_step=4)
    with pytest.raises(ValueError, match="None or 1 with drafters that are asked in every step"):
        make(models[0], chain_of(models[1]), attention_backend="triton", multi_step=4)
    with pytest.raises(ValueError, match="multi_step must be None or an integer in 1..32, got 0"):
        make(models[0], multi_step=0)


@pytest.mark.parametrize(
    ("drafts", "options"),
    [(0, {"multi_step": 2}), (1, {"multi_step": None})],
    ids=["plain", "drafts"],
)
def test_after_the_warm_up_nothing_is_recorded(
    models: tuple[str, str], monkeypatch: pytest.MonkeyPatch, drafts: int, options: dict[str, Any]
) -> None:
    """Not for filters, not for the last tokens of an output, not for a prompt."""
    recorder = StandIn()
    monkeypatch.setattr(capture, "recorder", lambda device: recorder)
    speculative = {**chain_of(models[1]), "num_speculative_tokens": 1} if drafts else None
    llm = make(models[0], speculative, attention_backend="triton", max_num_seqs=1, **options)
    num_recorded = recorder.num_recorded
    assert num_recorded == llm.stats()["num_cuda_graphs"] > 1
    tokens_of(llm, [SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=5)] * 2)
    assert recorder.num_recorded == num_recorded
    assert recorder.num_replayed > 4


def test_eager_steps_have_the_same_tokens_and_record_nothing(
    models: tuple[str, str], recorder: StandIn
) -> None:
    plain = tokens_of(make(models[0], attention_backend="torch", enforce_eager=True), MIXED)
    options = {"attention_backend": "triton", "enforce_eager": True}
    llm = make(models[0], chain_of(models[1]), **options)
    assert tokens_of(llm, MIXED) == plain
    assert_speculated(llm.stats())
    assert recorder.num_recorded == 0


def test_a_verify_that_believes_every_draft_is_noticed(
    models: tuple[str, str], recorder: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tokens_of(make(models[0], attention_backend="torch", enforce_eager=True), GREEDY)
    real = sampling_arrays.read_paths

    def believing(
        result: Any, packed_trees: Any, num_trees: int | None = None
    ) -> list[VerifiedPath]:
        found = real(result, packed_trees, num_trees)
        sizes = [tree[3] for tree in _trees(packed_trees)]
        return [
            VerifiedPath(list(range(size)), one.token_id, one.peak)
            for one, size in zip(found, sizes, strict=True)
        ]

    monkeypatch.setattr(sampling_arrays, "read_paths", believing)
    assert (
        tokens_of(make(models[0], chain_of(models[1]), attention_backend="triton"), GREEDY) != plain
    )


def _trees(packed_trees: Any) -> list[tuple[int, ...]]:
    from folospec.kernels.sampling_records import TREE as _TREE

    return list(_TREE.iter_unpack(b"".join(packed_trees.trees)))
