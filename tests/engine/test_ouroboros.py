"""Ouroboros in the engine: the chain is the draft model's own, in fewer passes; its KV is right;
the phrases behind it are verified like any draft."""

from __future__ import annotations

from collections import Counter
from typing import Any

import harness
import pytest
import torch
from harness import assert_speculated, make_llm, run
from test_kv_after_commit import Checker

from folospec import SamplingParams
from folospec.core.token_tree import TokenTree
from folospec.engine import commit
from folospec.engine.commit import Committer
from folospec.spec.drafters.base import StepResult
from folospec.spec.drafters.draft_model import DraftModelDrafter
from folospec.spec.drafters.ouroboros import OuroborosDrafter, _Drafted
from folospec.spec.proposal import Proposal
from folospec.spec.trees.children import Children
from folospec.spec.verify import Verdict

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)

SITUATIONS: dict[str, dict[str, Any]] = {
    "a roomy pool": {},
    "blocks of one token": {"block_size": 1},
    "a pool that forces preemption": {"num_blocks": 18, "block_size": 4},
    "chunked prefill": {"max_num_batched_tokens": 20, "max_num_seqs": 5},
}


def settings(model: str, **options: Any) -> dict[str, Any]:
    return {"method": "ouroboros", "model": model, "draft_length": 5, **options}


@pytest.fixture(scope="module")
def plain_twice(models: Any) -> list[harness.Run]:
    llm = make_llm(models.target)
    return [run(llm), run(llm)]


@pytest.fixture(scope="module")
def plain_greedy(models: Any) -> harness.Run:
    return run(make_llm(models.target), params=GREEDY)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_tokens_are_those_of_plain_decoding(
    situation: str, models: Any, plain_twice: list[harness.Run]
) -> None:
    llm = make_llm(models.target, settings(models.near), **SITUATIONS[situation])
    for plain in plain_twice:  # the second run meets cached prefixes and a filled pool
        result = run(llm)
        assert result.tokens == plain.tokens
        assert result.logprobs == pytest.approx(plain.logprobs, abs=1e-9)
    assert_speculated(result.stats)
    assert result.stats["prefix_cache_hits"] > 0
    if "preemption" in situation:
        assert result.stats["num_preemptions"] > 0


@pytest.mark.parametrize("acceptance", ["rejection", "block"])
def test_greedy_tokens_are_those_of_plain_decoding_under_every_rule(
    acceptance: str, models: Any, plain_greedy: harness.Run
) -> None:
    llm = make_llm(models.target, {**settings(models.near), "acceptance": acceptance})
    result = run(llm, params=GREEDY)
    assert result.tokens == plain_greedy.tokens
    assert_speculated(result.stats)


def test_merged_with_another_drafter_tokens_stay_the_same(models: Any, plain: harness.Run) -> None:
    ngram = {"method": "ngram", "prompt_lookup_min": 1}
    for drafters in ([settings(models.near), ngram], [ngram, settings(models.near)]):
        result = run(make_llm(models.target, {"drafters": drafters, "merge": True}))
        assert result.tokens == plain.tokens
        assert_speculated(result.stats, moved=True)


def test_rows_of_accepted_phrases_that_are_not_moved_are_noticed(
    models: Any, plain_greedy: harness.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    speculative = settings(models.near, draft_length=1)
    result = run(make_llm(models.target, speculative), params=GREEDY)
    assert result.tokens == plain_greedy.tokens
    assert_speculated(result.stats, moved=True)
    monkeypatch.setattr(commit.Committer, "_move_accepted", lambda *_: None)
    assert run(make_llm(models.target, speculative), params=GREEDY).tokens != plain_greedy.tokens


class Recorded:
    """Every proposal of a run, by sequence and committed tokens."""

    def __init__(self, drafter: type, monkeypatch: pytest.MonkeyPatch) -> None:
        self.proposals: dict[tuple[str, int], Proposal] = {}
        real = drafter.propose

        def recording(drafter: Any, rows: Any) -> Any:
            proposals = real(drafter, rows)
            for row, proposal in zip(rows, proposals, strict=True):
                self.proposals[row.seq_id, len(row.token_ids)] = proposal
            return proposals

        monkeypatch.setattr(drafter, "propose", recording)


def chain_run(
    method: str, model: str, acceptance: str, models: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[harness.Run, dict[tuple[str, int], Proposal], int]:
    """A run whose proposals are chains of five: the result, the proposals, the draft passes."""
    drafter = OuroborosDrafter if method == "ouroboros" else DraftModelDrafter
    options = {"draft_length": 5, "phrases": 0} if method == "ouroboros" else {}
    speculative = {
        "method": method,
        "model": model,
        "num_speculative_tokens": 5,
        "acceptance": acceptance,
        **options,
    }
    with monkeypatch.context() as patch:
        recorded = Recorded(drafter, patch)
        llm = make_llm(models.target, speculative, max_num_seqs=1)
        params = [p for p in harness.mixed_params(30) if p.n == 1][:3]
        result = run(llm, harness.PROMPTS[:3], params)
    return result, recorded.proposals, llm.engine.components.runners[method].num_passes


@pytest.mark.parametrize("acceptance", ["coupled", "rejection", "block"])
def test_the_chain_is_the_draft_models_own_in_fewer_passes(
    acceptance: str, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, chains, passes_alone = chain_run(
        "draft_model", models.near, acceptance, models, monkeypatch
    )
    result, phrased, passes = chain_run("ouroboros", models.near, acceptance, models, monkeypatch)
    assert result.tokens == expected.tokens
    assert phrased.keys() == chains.keys()
    for place, chain in chains.items():
        mine = phrased[place]
        assert mine.tree == chain.tree
        assert (mine.draft_probs is None) == (chain.draft_probs is None)
        if chain.draft_probs is not None and mine.draft_probs is not None:
            assert torch.allclose(mine.draft_probs, chain.draft_probs, atol=1e-12)
        if acceptance == "coupled":
            assert mine.confidence == pytest.approx(chain.confidence, abs=1e-9)
    assert_speculated(result.stats)
    assert passes < 0.95 * passes_alone


def test_a_phrase_that_is_estimated_unseen_is_noticed(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, chains, _ = chain_run("draft_model", models.near, "coupled", models, monkeypatch)
    real = OuroborosDrafter._keep_agreeing

    def believing(self: Any, draft: Any, drawn: list[Children]) -> None:
        estimated = [Children([token_id], [0.5]) for token_id in draft.phrase]
        real(self, draft, [*estimated, drawn[-1]])

    monkeypatch.setattr(OuroborosDrafter, "_keep_agreeing", believing)
    _, phrased, _ = chain_run("ouroboros", models.near, "coupled", models, monkeypatch)
    trees = [(phrased[place].tree, chains[place].tree) for place in phrased.keys() & chains.keys()]
    assert any(mine != alone for mine, alone in trees)


def all_accepted(models: Any, **options: Any) -> bool:
    """Whether the target, as its own draft model, has every draft token of two runs accepted."""
    llm = make_llm(models.target, settings(models.target, phrases=0), **options)
    for _ in range(2):
        stats = run(llm).stats
    assert stats["num_drafts"] > 0
    assert stats["drafters"]["ouroboros"]["draft_tokens_per_pass"] > 1.05
    return stats["num_accepted_tokens"] == stats["num_draft_tokens"]


@pytest.mark.parametrize("situation", SITUATIONS)
def test_the_drafts_of_a_perfect_model_are_all_accepted(situation: str, models: Any) -> None:
    """One row of a rejected phrase that is not run again, one wrong noise key, and one is not."""
    assert all_accepted(models, **SITUATIONS[situation])


def test_rows_of_a_draft_pass_that_failed_are_run_again(models: Any) -> None:
    """A pass over several prompts fails before it computes anything; rows that are then taken for
    computed make a perfect model's drafts wrong."""
    llm = make_llm(models.target, settings(models.target, phrases=0), strict_drafters=False)
    runner = llm.engine.components.drafters[0].runner
    forward, num_failed = runner.forward, 0

    def failing(batch: Any) -> Any:
        nonlocal num_failed
        if num_failed == 0 and len(batch) > 1:
            num_failed += 1
            raise RuntimeError("out of memory")
        return forward(batch)

    runner.forward = failing
    stats = run(llm).stats
    assert num_failed == 1
    assert stats["num_drafts"] > 0
    assert stats["num_accepted_tokens"] == stats["num_draft_tokens"]


def test_kv_of_a_draft_token_that_was_never_fed_is_noticed(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = OuroborosDrafter._keep_agreeing

    def claiming(self: Any, draft: Any, *rest: Any) -> None:
        real(self, draft, *rest)
        draft.num_fed = len(draft.token_ids)

    monkeypatch.setattr(OuroborosDrafter, "_keep_agreeing", claiming)
    assert not all_accepted(models)


def test_the_draft_goes_on_with_phrases_and_the_target_takes_some(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: Counter[str] = Counter()
    real = OuroborosDrafter.observe

    def watching(self: Any, outcomes: list[StepResult]) -> None:
        for outcome in outcomes:
            if outcome.seq_id in self._drafted and outcome.verdict is not None:
                length = self._drafted[outcome.seq_id].length
                counts["proposed"] += len(outcome.proposal) - length
                counts["accepted"] += max(0, outcome.verdict.num_accepted - length)
        real(self, outcomes)

    monkeypatch.setattr(OuroborosDrafter, "observe", watching)
    run(make_llm(models.target, settings(models.near)), params=GREEDY)
    assert 0 < counts["accepted"] < counts["proposed"]


def test_phrases_save_passes_of_the_target(models: Any, plain_greedy: harness.Run) -> None:
    num_passes = {}
    for phrases in (0, 3):
        speculative = settings(models.near, draft_length=3, phrases=phrases)
        llm = make_llm(models.target, speculative, max_num_seqs=1)
        result = run(llm, harness.PROMPTS[:3], GREEDY)
        assert result.tokens == plain_greedy.tokens[:3]
        num_passes[phrases] = result.stats["num_target_passes"]
    assert num_passes[3] < num_passes[0]


@pytest.mark.parametrize("options", [{}, SITUATIONS["a pool that forces preemption"]])
def test_both_caches_equal_a_cache_computed_from_scratch(
    options: dict[str, int], models: Any
) -> None:
    checker = Checker(every=5)
    checker.num_rows = Counter()
    llm = make_llm(models.target, settings(models.near), **options)
    for _ in range(2):
        run(llm, on_step=checker)
    assert min(checker.num_rows["target"], checker.num_rows["ouroboros"]) > 200
    assert checker.worst < 1e-9


def test_draft_rows_that_are_not_committed_are_noticed(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rejected phrase rows stand where the next tokens will."""
    real = Committer._move_draft_kv

    def claiming(
        self: Any, seq: Any, proposal: Any, path: list[int], root: int, moves: Any
    ) -> None:
        real(self, seq, proposal, path, root, moves)
        self.manager.mark_draft(seq, "ouroboros", root + 1 + len(path))

    monkeypatch.setattr(Committer, "_move_draft_kv", claiming)
    checker = Checker(every=5)
    checker.num_rows = Counter()
    run(make_llm(models.target, settings(models.near)), on_step=checker)
    assert checker.worst > 1e-3


def test_rejected_drafts_become_phrases_as_the_target_goes_on(models: Any) -> None:
    """root -- 5 -- 6 -- 7 -- 8      5 is accepted, then 9 comes. After 6 the target says 7, after
    |    `- 20            7 it says 11, after 8 it says 12, after 20 it says 13"""
    llm = make_llm(models.target, settings(models.near))
    drafter = llm.engine.components.drafters[0]
    assert isinstance(drafter, OuroborosDrafter)
    tree = TokenTree([5, 6, 7, 8, 20], [-1, 0, 1, 2, 0])
    drafter._drafted["a"] = _Drafted(tree, 4, [(0, 1)], [])
    top = torch.tensor([5, 9, 7, 11, 12, 13])[:, None]
    outcome = StepResult("a", Proposal(tree), Verdict([0], 9), [5, 9], {n: n for n in range(5)})
    outcome.top_token_ids = top
    drafter.observe([outcome])
    assert {t: drafter._pool.lookup(t) for t in (5, 6, 7, 8, 9, 20)} == {
        5: [],
        6: [(7, 11)],
        7: [(11,)],
        8: [(12,)],
        9: [],
        20: [(13,)],
    }


def test_the_chain_comes_first_where_the_budget_is_small(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded(OuroborosDrafter, monkeypatch)
    llm = make_llm(models.target, settings(models.near, num_speculative_tokens=7))
    run(llm, params=GREEDY)
    proposals = [proposal for proposal in recorded.proposals.values() if proposal is not None]
    assert max(len(proposal) for proposal in proposals) == 7
    for proposal in proposals:
        tree, confidence = proposal.tree, proposal.confidence or []
        assert TokenTree(tree.token_ids[:5], tree.parents[:5]).is_chain
        assert all(parent >= 4 for parent in tree.parents[5:])
        assert all(0.0 <= chance <= 1.0 for chance in confidence)
        for node in range(len(tree)):
            assert sum(confidence[child] for child in tree.children(node)) <= 1.0 + 1e-12


@pytest.mark.parametrize(
    "options",
    [
        {"draft_length": 0},
        {"phrase_length": 1},
        {"phrases": -1},
        {"phrases": 1.5},
        {"phrases_per_token": 0},
        {"max_first_tokens": 0},
        {"children": "some"},
        {"tree": [2, 2]},
        {"phrases": 2, "acceptance": "block"},
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], models: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        make_llm(models.target, {**settings(models.near), **options})


def test_a_model_is_needed(models: Any) -> None:
    with pytest.raises(ValueError, match="needs the draft model's path"):
        make_llm(models.target, "ouroboros")
