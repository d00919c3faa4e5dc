"""The planner decides what is drafted, and never what is said."""

from __future__ import annotations

from collections import Counter
from typing import Any

import harness
import pytest
from fixed_costs import fix_costs, planner_of
from harness import assert_speculated, make_llm, run

from folospec import SamplingParams, SpeculativeConfig
from folospec.engine import commit
from folospec.spec import verify_rows
from folospec.spec.planner import planner
from folospec.spec.planner.plan_terms import REASONS
from folospec.trace.records import StepTrace


def auto(models: Any, draft: str = "near", **settings: Any) -> dict[str, Any]:
    return {"method": "auto", "model": getattr(models, draft), **settings}


def lookup_and_model(models: Any, **settings: Any) -> dict[str, Any]:
    lookup = {"method": "ngram", "prompt_lookup_min": 1}
    model = {"method": "draft_model", "model": models.near}
    return {"drafters": [lookup, model], "adaptive": True, **settings}


SPECULATIVE = {
    "auto": auto,
    "a list": lookup_and_model,
    "merged": lambda models: lookup_and_model(models, merge=True),
    "trees": lambda models: {
        "method": "draft_model",
        "model": models.near,
        "tree": "dynamic",
        "adaptive": True,
    },
    "scratch rows": lambda models: {"method": "lookahead", "adaptive": True},
}


@pytest.mark.parametrize("options", [{}, {"num_blocks": 16, "block_size": 4}, {"max_num_seqs": 3}])
@pytest.mark.parametrize("name", SPECULATIVE)
def test_planned_tokens_equal_plain_tokens(
    name: str, options: dict[str, Any], models: Any, plain: harness.Run
) -> None:
    llm = fix_costs(make_llm(models.target, SPECULATIVE[name](models), **options))
    result = run(llm)
    assert result.tokens == plain.tokens
    assert result.logprobs == pytest.approx(plain.logprobs, abs=1e-9)
    if name != "scratch rows":  # of lookahead's few drafts on so short texts none need be accepted
        assert_speculated(result.stats)
    assert result.stats["num_drafts"] > 0


@pytest.mark.parametrize("count", [1, 4])
def test_auto_tokens_equal_plain_tokens_with_measured_costs(count: int, models: Any) -> None:
    """Whatever this machine makes the planner decide."""
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=40, ignore_eos=True)
    prompts = harness.PROMPTS[:count]
    expected = run(make_llm(models.target), prompts, params)
    assert run(make_llm(models.target, auto(models)), prompts, params).tokens == expected.tokens


def test_control_a_verifier_that_believes_drafts_is_noticed(
    models: Any, plain: harness.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_rows, "verify_coupled", harness.trusting)
    llm = fix_costs(make_llm(models.target, auto(models)))
    assert run(llm).tokens != plain.tokens


def test_control_a_pruned_tree_whose_rows_are_not_moved_is_noticed(
    models: Any, plain: harness.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit.Committer, "_move_accepted", lambda *_: None)
    llm = fix_costs(make_llm(models.target, SPECULATIVE["trees"](models)))
    assert run(llm).tokens != plain.tokens


def test_where_nothing_pays_a_step_is_a_plain_step(models: Any, plain: harness.Run) -> None:
    llm = fix_costs(make_llm(models.target, auto(models)), row=1.0, drafting=10.0)
    planner_of(llm).probing.spend(1e9)
    result = run(llm)
    assert result.tokens == plain.tokens
    assert result.stats["num_drafts"] == 0
    assert result.stats["num_scheduled_tokens"] == plain.stats["num_scheduled_tokens"]
    assert result.stats["num_steps"] == plain.stats["num_steps"]


def test_control_where_drafts_are_cheap_fewer_steps_are_taken(
    models: Any, plain: harness.Run
) -> None:
    llm = fix_costs(make_llm(models.target, auto(models)))
    assert run(llm).stats["num_steps"] < plain.stats["num_steps"]


def test_drafts_of_a_model_that_knows_nothing_are_given_up(models: Any) -> None:
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    settings = {"method": "draft_model", "model": models.far, "adaptive": True}
    llm = fix_costs(make_llm(models.target, settings), row=0.2, drafting=0.2)
    first, second = (run(llm, harness.PROMPTS[:1], params) for _ in range(2))
    drafts = second.stats["num_draft_tokens"] - first.stats["num_draft_tokens"]
    assert first.stats["num_draft_tokens"] > 0
    assert drafts < 0.5 * first.stats["num_draft_tokens"]
    assert second.stats["num_undrafted"]["rejected"] > 0, second.stats["num_undrafted"]


def test_an_offline_batch_drafts_little_while_it_is_full_and_much_in_its_tail(
    models: Any,
) -> None:
    params = [
        SamplingParams(temperature=0, max_tokens=140 if i == 0 else 12, ignore_eos=True)
        for i in range(24)
    ]
    prompts = [[5 + i, 6, 7, 8, 5 + i, 6, 7] for i in range(24)]
    settings = {"method": "draft_model", "model": models.near, "adaptive": True}
    llm = fix_costs(make_llm(models.target, settings), row=0.06, drafting=0.05)
    steps: list[StepTrace] = []
    llm.engine.on_step = steps.append
    result = run(llm, prompts, params)
    drafted: dict[bool, list[int]] = {True: [], False: []}
    for step in steps:
        for seq in step.sequences:
            if seq.num_tokens == 1:
                nodes = len(seq.proposal.nodes) if seq.proposal else 0
                drafted[len(step.sequences) > 12].append(nodes)
    full, tail = (sum(drafted[key]) / len(drafted[key]) for key in (True, False))
    assert tail > 1.0
    assert full < 0.5 * tail
    assert result.tokens == run(make_llm(models.target), prompts, params).tokens
    assert_speculated(result.stats)


def test_the_last_nodes_of_a_draft_that_is_unlikely_are_left_out(models: Any) -> None:
    settings = {"method": "draft_model", "model": models.near, "tree": [2, 2], "adaptive": True}
    llm = fix_costs(make_llm(models.target, settings), row=0.03)
    steps: list[StepTrace] = []
    llm.engine.on_step = steps.append
    run(llm)
    sizes = Counter(
        len(seq.proposal.nodes) for step in steps for seq in step.sequences if seq.proposal
    )
    # Unpruned it is two children, or two with two each.
    assert sizes[1] > 0
    assert max(sizes) > 1


def test_every_step_without_a_draft_has_a_reason(models: Any) -> None:
    llm = fix_costs(make_llm(models.target, auto(models)))
    steps: list[StepTrace] = []
    llm.engine.on_step = steps.append
    params = [
        SamplingParams(temperature=0, max_tokens=16, num_speculative_tokens=0, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=16, ignore_eos=True),
    ]
    off, on = run(llm, harness.PROMPTS[:2], params).outputs
    assert off.metrics.num_undrafted == {"not_wanted": 14, "no_room": 1}
    assert off.metrics.undrafted_reason == "no_room"
    assert on.metrics.num_drafts > 0
    counted: Counter[str] = Counter()
    for step in steps:
        for seq in step.sequences:
            ready = seq.num_tokens == 1 and seq.root is not None
            assert (seq.undrafted_reason is None) == (seq.proposal is not None or not ready)
            if seq.undrafted_reason is not None:
                assert seq.undrafted_reason in REASONS
                counted[seq.undrafted_reason] += 1
    assert llm.stats()["num_undrafted"] == counted


def test_auto_takes_suffix_and_the_draft_model_that_is_there(models: Any) -> None:
    names = list(make_llm(models.target, auto(models)).stats()["drafters"])
    assert names == ["suffix", "draft_model"]
    alone = make_llm(models.target, "auto").stats()
    assert list(alone["drafters"]) == ["suffix"]
    assert set(alone["planner"]["sources"]) == {"suffix"}
    assert make_llm(models.target).stats()["planner"] is None


@pytest.mark.parametrize(
    ("speculative", "words"),
    [
        ({"drafters": ["auto", "ngram"]}, "'auto' alone"),
        ({"method": "auto", "adaptive": False}, "'auto' alone, with adaptive=None or True"),
        ({"method": "auto", "tree": "dynamic"}, "options must be empty with method='auto'"),
        ({"method": "ngram", "adaptive": "yes"}, "adaptive must be None, True or False"),
    ],
)
def test_what_auto_does_not_take_is_refused(speculative: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SpeculativeConfig.of(speculative)


def test_drafters_of_the_users_choice_are_not_planned_unless_asked(models: Any) -> None:
    assert make_llm(models.target, "ngram").engine.proposer.step_planner is None
    adaptive = {"method": "ngram", "adaptive": True}
    assert make_llm(models.target, adaptive).engine.proposer.step_planner is not None


def test_under_a_ratio_rule_the_confidence_in_drawn_tokens_decides_nothing(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    original = planner.Planner.score

    def recording(self: Any, name: str, seq_id: str, *rest: Any, **flags: Any) -> Any:
        seen.append((seq_id, rest[2]))
        return original(self, name, seq_id, *rest, **flags)

    monkeypatch.setattr(planner.Planner, "score", recording)
    settings = {"method": "draft_model", "model": models.near, "adaptive": True}
    for acceptance, is_told in (("rejection", False), ("coupled", True)):
        seen.clear()
        llm = fix_costs(make_llm(models.target, {**settings, "acceptance": acceptance}))
        params = SamplingParams(temperature=1.0, seed=1, max_tokens=24, ignore_eos=True)
        run(llm, params=params)
        assert seen
        assert {confidence is not None for _, confidence in seen} == {is_told}


def test_the_engine_tells_the_planner_how_long_steps_took(models: Any) -> None:
    llm = make_llm(models.target, {"method": "ngram", "adaptive": True})
    run(llm)
    assert planner_of(llm).estimates.cost.num_seen > 0
    assert llm.stats()["planner"]["step_seconds"][1] > 0


def test_merged_drafters_are_asked_only_for_requests_that_take_them(models: Any) -> None:
    speculative = {"drafters": ["ngram", "suffix"], "merge": True, "adaptive": True}
    llm = fix_costs(make_llm(models.target, speculative))
    asked: Counter[str] = Counter()
    for drafter in llm.engine.components.drafters:

        def recording(rows: Any, name: str = drafter.name, propose: Any = drafter.propose) -> Any:
            asked[name] += len(rows)
            return propose(rows)

        drafter.propose = recording  # type: ignore[method-assign]
    for names, expected in ((["ngram"], {"ngram"}), (None, {"ngram", "suffix"})):
        asked.clear()
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, drafters=names)
        run(llm, [[5, 6, 7, 8] * 4], params)
        assert set(asked) == expected


def test_under_a_ratio_rule_phrases_behind_drawn_tokens_are_kept_whole(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[tuple[int, int]] = []
    original = planner.Planner.prune

    def recording(self: Any, offers: Any, *rest: Any) -> None:
        original(self, offers, *rest)
        left.extend((len(offer.parents), len(offer.kept)) for offer in offers)

    monkeypatch.setattr(planner.Planner, "prune", recording)
    settings = {"method": "ouroboros", "model": models.near, "draft_length": 2, "adaptive": True}
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=60, ignore_eos=True)
    for acceptance, is_indivisible in (("rejection", True), ("coupled", False)):
        left.clear()
        llm = fix_costs(make_llm(models.target, {**settings, "acceptance": acceptance}), row=0.05)
        run(llm, harness.PROMPTS[:2], params)
        assert len({size for size, _ in left}) > 1
        assert all(size == kept for size, kept in left) == is_indivisible


def test_a_step_whose_drafter_failed_leaves_no_unpaid_drafts(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = fix_costs(make_llm(models.target, {"method": "ngram", "adaptive": True}))
    engine, plan = llm.engine, planner_of(llm)
    (drafter,) = engine.components.drafters

    def failing(outcomes: Any) -> None:
        raise RuntimeError("observe")

    def run_to_end() -> None:
        while engine.has_unfinished_requests:
            engine.step()

    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    engine.add_request([5, 6, 7, 8] * 4, params)
    with monkeypatch.context() as patch:
        patch.setattr(drafter, "observe", failing)
        with pytest.raises(RuntimeError, match="observe"):
            run_to_end()
    assert plan._learning.calls
    engine.proposer.plan(engine.scheduler.running, engine.scheduler.candidates)
    assert not plan._learning.calls
