"""Several drafters in one engine: who drafts for which row, trees merged from all, and one that
fails."""

from __future__ import annotations

from collections import Counter
from typing import Any

import harness
import pytest
from harness import IrregularDrafter, assert_speculated, make_llm, run

from folospec import Drafter, Proposal, SamplingParams, SpeculativeConfig, register_drafter
from folospec.core.token_tree import TokenTree
from folospec.spec.proposer import Proposer

NGRAM = {"method": "ngram", "prompt_lookup_min": 1, "num_speculative_tokens": 3}


class Seconder(Drafter):
    """Proposes one token, the wrong one, for every row; keeps what it is told."""

    told: list[Any] = []

    def propose(self, rows: list[Any]) -> list[Proposal | None]:
        return [Proposal(TokenTree.chain([(row.token_ids[-1] + 1) % 61])) for row in rows]

    def observe(self, outcomes: list[Any]) -> None:
        self.told += outcomes


register_drafter("seconder", Seconder)


@pytest.fixture
def proposals(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, str, Proposal]]:
    """Every verified proposal with its request's parameters and its drafter."""
    seen: list[tuple[Any, str, Proposal]] = []
    real = Proposer.observe

    def watching(self: Any, steps: Any, result: Any) -> None:
        for step in steps:
            if step.proposal is not None:
                seen.append((step.group.params, step.proposal.drafter, step.proposal))
        real(self, steps, result)

    monkeypatch.setattr(Proposer, "observe", watching)
    return seen


def near(models: Any, **settings: Any) -> dict[str, Any]:
    return {"method": "draft_model", "model": models.near, **settings}


def test_the_first_that_has_something_to_say_drafts(
    models: Any, plain: Any, proposals: list[Any]
) -> None:
    result = run(make_llm(models.target, [NGRAM, near(models, num_speculative_tokens=4)]))
    assert result.tokens == plain.tokens
    assert_speculated(result.stats)
    by_drafter = Counter(drafter for _, drafter, _ in proposals)
    assert by_drafter["ngram"] > 0
    assert by_drafter["draft_model"] > 0
    alone = run(make_llm(models.target, NGRAM)).stats["num_drafts"]
    assert by_drafter["ngram"] < alone + by_drafter["draft_model"]


def test_a_request_may_choose_among_the_drafters(models: Any, proposals: list[Any]) -> None:
    settings = [NGRAM, near(models), near(models, model=models.far)]
    prompts = [harness.PROMPTS[0]] * 4
    choices: list[Any] = [["ngram"], ["draft_model"], ["draft_model-2"], []]
    common: dict[str, Any] = {"temperature": 0.7, "seed": 5, "max_tokens": 20, "ignore_eos": True}
    params = [SamplingParams(drafters=names, **common) for names in choices]
    result = run(make_llm(models.target, settings), prompts, params)
    expected = run(make_llm(models.target), prompts[:1], SamplingParams(**common))
    assert result.tokens == expected.tokens * 4
    for chosen, drafter, _ in proposals:
        assert drafter in chosen.drafters
    assert len({drafter for _, drafter, _ in proposals}) == 3
    assert result.outputs[3].metrics.num_drafts == 0


@pytest.mark.parametrize("acceptance", ["coupled", "rejection"])
def test_merged_trees_hold_the_nodes_of_all(
    acceptance: str, models: Any, plain: Any, proposals: list[Any]
) -> None:
    settings = {
        "drafters": [NGRAM, near(models, tree=[2, 1]), near(models, model=models.far, tree=[2])],
        "merge": True,
        "acceptance": acceptance,
    }
    result = run(make_llm(models.target, settings))
    assert_speculated(result.stats, moved=True)
    if acceptance == "coupled":
        assert result.tokens == plain.tokens
    else:  # greedy rows have one answer under every rule
        assert result.tokens[0] == plain.tokens[0]
        assert result.tokens[3] == plain.tokens[3]
    merged = [p for _, drafter, p in proposals if drafter == "ngram+draft_model+draft_model-2"]
    assert merged
    assert {tuple(p.draft_slots) for p in merged} == {("draft_model", "draft_model-2")}
    pairs = [[(p.tree.parents[n], p.tree.token_ids[n]) for n in range(len(p))] for p in merged]
    has_duplicates = any(len(set(pair)) < len(pair) for pair in pairs)
    assert has_duplicates == (acceptance == "rejection")


def test_each_drafter_is_told_where_its_own_nodes_are(models: Any) -> None:
    Seconder.told.clear()
    drafters = [NGRAM, {"method": "seconder", "num_speculative_tokens": 1}]
    run(make_llm(models.target, {"drafters": drafters, "merge": True}))
    own = [outcome for outcome in Seconder.told if outcome.own_nodes]
    for outcome in own:
        (node,) = outcome.own_nodes.values()
        assert outcome.proposal.tree.parents[node] == -1
    assert any(node > 0 for outcome in own for node in outcome.own_nodes.values())
    Seconder.told.clear()
    run(make_llm(models.target, drafters))
    assert any(not outcome.own_nodes for outcome in Seconder.told)


@pytest.mark.usefixtures("oracle")
def test_one_that_fails_does_not_silence_the_others(models: Any, plain: Any) -> None:
    for merge in (False, True):
        IrregularDrafter.asked = 0
        drafters = ["irregular", near(models, num_speculative_tokens=3)]
        llm = make_llm(models.target, {"drafters": drafters, "merge": merge}, strict_drafters=False)
        result = run(llm)
        assert result.tokens == plain.tokens
        assert result.stats["num_drafter_errors"] > 0
        assert result.stats["drafters"]["draft_model"]
        assert_speculated(result.stats)


def test_a_request_that_limits_its_drafts_limits_the_merged_tree(
    models: Any, proposals: list[Any]
) -> None:
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, num_speculative_tokens=2)
    for others in ([near(models, tree=[2, 2])], [near(models, tree="dynamic"), "lookahead"]):
        proposals.clear()
        settings = {"drafters": [NGRAM, *others], "merge": True}
        run(make_llm(models.target, settings), params=params)
        assert max(p.num_draft_tokens for _, _, p in proposals) == 2


@pytest.mark.parametrize("tree", [[3, 2, 1], "dynamic"], ids=str)
def test_a_full_pool_sheds_draft_nodes_first(tree: Any, models: Any, plain: Any) -> None:
    """The pool has just room for the tokens: no slot is ever free for all nodes of a tree."""
    prompt, params = harness.PROMPTS[4], SamplingParams(temperature=0, max_tokens=14, seed=1)
    expected = run(make_llm(models.target), [prompt], params).tokens
    llm = make_llm(models.target, near(models, tree=tree), num_blocks=8, block_size=4)
    result = run(llm, [prompt], params)
    assert result.tokens == expected
    assert result.stats["num_preemptions"] == 0
    assert result.stats["num_drafts"] > 0
    nodes = result.stats["num_draft_tokens"] / result.stats["num_drafts"]
    assert nodes < llm.engine.proposer.limit


def test_a_stop_inside_an_accepted_path_ends_the_output_there(models: Any) -> None:
    plain_run = run(
        make_llm(models.target),
        params=SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
    )
    for tokens, prompt in zip(plain_run.tokens, harness.PROMPTS, strict=True):
        for stop in set(tokens[0][2:12]):
            params = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[stop])
            llm = make_llm(models.target, near(models, model=models.target, tree=[2, 1, 1, 1]))
            found = run(llm, [prompt], params)
            assert found.tokens[0][0] == tokens[0][: tokens[0].index(stop) + 1]
            assert found.outputs[0].outputs[0].stop_reason == stop


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "at least one"),
        ({"drafters": ["ngram"], "num_speculative_tokens": 3}, "set for each of them"),
        ({"drafters": "ngram"}, "a list"),
        ({"drafters": ["ngram"], "merge": 1}, "merge must be True or False"),
        (["ngram", 3], "a name or a mapping"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpeculativeConfig.of(settings)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"drafters": ["suffix"]},
            r"drafters must be among the engine's \['ngram'\], got 'suffix'",
        ),
        ({"prediction": [1, 2]}, "needs a drafter that reads it"),
        ({"num_speculative_tokens": 4}, "at most the engine's 3, got 4"),
    ],
)
def test_a_request_that_no_drafter_can_serve_is_refused(
    params: dict[str, Any], message: str, models: Any
) -> None:
    llm = make_llm(models.target, NGRAM)
    with pytest.raises(ValueError, match=message):
        llm.engine.add_request([1, 2], SamplingParams(**params))


@pytest.mark.parametrize("value", ["suffix", {"suffix": 1}, [1]])
def test_drafters_of_a_request_are_a_list_of_names(value: Any) -> None:
    with pytest.raises(ValueError, match="drafters must be None or a list of names"):
        SamplingParams(drafters=value)


def test_a_drafter_is_found_by_its_name(models: Any) -> None:
    llm = make_llm(models.target, [NGRAM, near(models), near(models)])
    assert llm.drafter("draft_model-2") is llm.engine.components.drafters[2]
    with pytest.raises(ValueError, match=r"one of \['draft_model', .*\], got 'suffix'"):
        llm.drafter("suffix")
