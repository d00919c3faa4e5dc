"""Drafters that look up what was said or guessed before, in the real engine: output unchanged
through every disturbance, and the edge cases that break such drafters elsewhere."""

from __future__ import annotations

from typing import Any

import harness
import pytest
from harness import assert_speculated, make_llm, run

from folospec import SamplingParams
from folospec.engine import commit
from folospec.spec import verify_rows
from folospec.spec.drafters import ngram
from folospec.spec.drafters.nasd import NasdDrafter
from folospec.spec.drafters.token_recycling import TokenRecyclingDrafter

NASD = {"method": "nasd", "n": 3, "num_speculative_tokens": 4}
RECYCLING = {"method": "token_recycling", "num_speculative_tokens": 12}
SETTINGS: dict[str, dict[str, Any]] = {
    "ngram tree": {"method": "ngram", "prompt_lookup_min": 1, "num_matches": 3},
    "nasd": {**NASD, "filler_top_k": 3},
    "nasd without filler": {**NASD, "filler_top_k": 0},
    "nasd bigrams": {**NASD, "n": 2, "store": "one_level"},
    "nasd shared": {**NASD, "shared": True, "max_entries": 200},
    "nasd gated": {**NASD, "egag": True, "ema": 0.5},
    "nasd guessing": {**NASD, "stop_if_unknown": False},
    "token recycling": RECYCLING,
}
TREES = ("ngram tree", "token recycling")
SITUATIONS: dict[str, dict[str, Any]] = {
    "blocks of one token": {"block_size": 1},
    "a pool that forces preemption": {"num_blocks": 16, "block_size": 4},
    "chunked prefill": {"max_num_batched_tokens": 7, "max_num_seqs": 5},
}


PROMPTS = harness.PROMPTS[:5]
EACH_KIND = ("ngram tree", "nasd", "token recycling")


def few_tokens() -> list[SamplingParams]:
    """For each prompt. Draws from few tokens repeat their contexts, and go on otherwise."""
    common: dict[str, Any] = {"max_tokens": 30, "ignore_eos": True}
    drawn: dict[str, Any] = {**common, "allowed_token_ids": [3, 8, 17, 40]}
    return [
        SamplingParams(temperature=0, logprobs=1, **common),
        SamplingParams(temperature=0.8, top_k=3, seed=3, **drawn),
        SamplingParams(temperature=1.0, n=3, seed=4, logprobs=0, **drawn),
        SamplingParams(temperature=0, repetition_penalty=1.2, **drawn),
        SamplingParams(temperature=1.2, top_p=0.9, presence_penalty=0.5, **drawn),
    ]


@pytest.fixture(scope="module")
def repetitive(models: Any) -> harness.Run:
    """The plain tokens that the drafters have to reproduce."""
    return run(make_llm(models.target), PROMPTS, few_tokens())


@pytest.mark.parametrize(
    ("name", "situation"),
    [
        *((name, "a pool that forces preemption") for name in SETTINGS),
        *((name, "blocks of one token") for name in EACH_KIND),
        *((name, "chunked prefill") for name in EACH_KIND),
    ],
)
def test_speculative_tokens_equal_plain_tokens(
    name: str, situation: str, models: Any, repetitive: harness.Run
) -> None:
    """Greedy and sampled, with penalties, filters and siblings of n > 1."""
    llm = make_llm(models.target, SETTINGS[name], **SITUATIONS[situation])
    result = run(llm, PROMPTS, few_tokens())
    assert result.tokens == repetitive.tokens
    assert result.logprobs == pytest.approx(repetitive.logprobs, abs=1e-9)
    assert_speculated(result.stats, moved=name in TREES)
    if "preemption" in situation:
        assert result.stats["num_preemptions"] > 0


@pytest.mark.parametrize("name", ["ngram tree", "nasd", "nasd shared", "token recycling"])
def test_a_prefix_hit_changes_nothing(name: str, models: Any) -> None:
    prompts = [list(range(1, 30)), [*range(1, 30), 31], [*range(1, 20), 40]]
    params = SamplingParams(temperature=0.5, seed=5, max_tokens=16, ignore_eos=True, n=2)
    expected = run(make_llm(models.target, enable_prefix_caching=False), prompts, params)
    llm = make_llm(models.target, SETTINGS[name], block_size=4)
    first, second = run(llm, prompts, params), run(llm, prompts, params)
    assert first.tokens == second.tokens == expected.tokens
    assert second.stats["prefix_cache_hits"] > 0
    assert_speculated(second.stats)


def test_merged_into_one_tree_they_change_nothing_and_know_their_own_nodes(
    models: Any, repetitive: harness.Run
) -> None:
    drafters = [SETTINGS[name] for name in EACH_KIND]
    llm = make_llm(models.target, {"drafters": drafters, "merge": True})
    result = run(llm, PROMPTS, few_tokens())
    assert result.tokens == repetitive.tokens
    assert_speculated(result.stats, moved=True)
    for drafter in llm.engine.components.drafters:
        assert len(drafter._acceptance) > 1


@pytest.mark.parametrize("acceptance", ["rejection", "block"])
@pytest.mark.parametrize("name", EACH_KIND)
def test_greedy_output_is_the_plain_one_under_the_ratio_rules(
    name: str, acceptance: str, models: Any
) -> None:
    if acceptance == "block" and "num_matches" in SETTINGS[name]:
        with pytest.raises(ValueError, match="num_matches must be 1"):
            make_llm(models.target, {**SETTINGS[name], "acceptance": acceptance})
        return
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    result = run(
        make_llm(models.target, {**SETTINGS[name], "acceptance": acceptance}), None, params
    )
    assert result.tokens == run(make_llm(models.target), None, params).tokens
    assert_speculated(result.stats)


@pytest.mark.parametrize("name", EACH_KIND)
def test_accepting_a_draft_unseen_is_noticed(
    name: str, models: Any, repetitive: harness.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control of the tests above."""

    monkeypatch.setattr(verify_rows, "verify_coupled", harness.trusting)
    result = run(make_llm(models.target, SETTINGS[name]), PROMPTS, few_tokens())
    assert result.tokens != repetitive.tokens


@pytest.mark.parametrize("name", TREES)
def test_kv_rows_that_are_not_moved_are_noticed(
    name: str, models: Any, repetitive: harness.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: the trees that these drafters make do rely on it."""
    monkeypatch.setattr(commit.Committer, "_move_accepted", lambda *_: None)
    result = run(make_llm(models.target, SETTINGS[name]), PROMPTS, few_tokens())
    assert result.tokens != repetitive.tokens


@pytest.mark.parametrize("name", ["ngram tree", "nasd guessing", "token recycling"])
def test_confidences_are_chances(name: str, models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In [0, 1], and siblings share at most 1."""
    seen = 0

    def checking(propose: Any) -> Any:
        def wrapped(self: Any, rows: Any) -> Any:
            nonlocal seen
            proposals = propose(self, rows)
            for proposal in filter(None, proposals):
                for node in (-1, *range(len(proposal))):
                    chances = [proposal.confidence[c] for c in proposal.tree.children(node)]
                    assert all(0.0 <= chance <= 1.0 for chance in chances)
                    assert sum(chances) <= 1.0 + 1e-9
                    seen += len(chances)
            return proposals

        return wrapped

    for drafter in (ngram.NgramDrafter, NasdDrafter, TokenRecyclingDrafter):
        monkeypatch.setattr(drafter, "propose", checking(drafter.propose))
    run(make_llm(models.target, SETTINGS[name]), PROMPTS, few_tokens())
    assert seen > 100


# Edge cases.


@pytest.mark.parametrize("max_tokens", [1, 2])
@pytest.mark.parametrize("name", EACH_KIND)
def test_an_output_too_short_for_drafts_is_no_error(
    name: str, max_tokens: int, models: Any
) -> None:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    result = run(make_llm(models.target, SETTINGS[name]), None, params)
    assert result.tokens == run(make_llm(models.target), None, params).tokens
    if max_tokens == 1:
        assert result.stats["num_drafts"] == 0
    assert 0.0 <= result.stats["acceptance_rate"] <= 1.0
    assert result.stats["acceptance_length"] >= 1.0


@pytest.mark.parametrize("name", EACH_KIND)
def test_of_several_stop_tokens_the_first_one_met_ends_the_output(name: str, models: Any) -> None:
    """A stop inside an accepted draft too, and one that is the very first token."""
    common: dict[str, Any] = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
    prompt = harness.PROMPTS[0]
    free = SamplingParams(**common)
    tokens = run(make_llm(models.target), [prompt], free).tokens[0][0]
    places = sorted({tokens.index(token) for token in tokens})
    params = [free]
    for place in places:
        later = [token for token in set(tokens) if tokens.index(token) > place]
        stops = [*sorted(later, reverse=True), tokens[place]]
        params.append(SamplingParams(stop_token_ids=stops, **common))
    result = run(make_llm(models.target, SETTINGS[name]), [prompt] * len(params), params)
    expected = [tokens, *(tokens[: place + 1] for place in places)]
    assert [completions[0] for completions in result.tokens] == expected
    assert 0 in places
    assert_speculated(result.stats)


@pytest.mark.parametrize("name", EACH_KIND)
def test_a_step_runs_the_root_and_the_drafts_and_never_the_prefix_again(
    name: str, models: Any
) -> None:
    prompt = harness.PROMPTS[4]
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    result = run(make_llm(models.target, SETTINGS[name]), [prompt], params)
    stats = result.stats
    num_roots = stats["num_steps"] - 1
    assert stats["num_scheduled_tokens"] == len(prompt) + num_roots + stats["num_draft_tokens"]
    assert stats["num_output_tokens"] == len(result.tokens[0][0]) == 30
    assert_speculated(stats)


@pytest.mark.parametrize("name", [*EACH_KIND, "nasd shared"])
def test_finished_sequences_leave_nothing_but_what_is_shared(name: str, models: Any) -> None:
    llm = make_llm(models.target, SETTINGS[name], **SITUATIONS["a pool that forces preemption"])
    run(llm, PROMPTS, few_tokens())
    (drafter,) = llm.engine.components.drafters
    for figure, value in drafter.stats().items():
        assert (value == 0) == (figure in ("num_ngrams", "num_own_rows") or name == "nasd")
    for field in ("_states", "_num_counted", "_roots", "_kinds", "_own", "_indexes", "_evidence"):
        assert not vars(drafter).get(field), field


# What a drafter learns cannot be seen in the output: these look at the acceptance.


def accepted(models: Any, settings: dict[str, Any], params: Any = None) -> int:
    return run(make_llm(models.target, settings), None, params).stats["num_accepted_tokens"]


def test_rows_that_are_filed_under_the_wrong_token_are_noticed(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    right = accepted(models, RECYCLING, params)
    real = TokenRecyclingDrafter._recycle

    def one_row_late(self: Any, outcome: Any) -> None:
        outcome.top_token_ids = outcome.top_token_ids.roll(1, 0)
        real(self, outcome)

    monkeypatch.setattr(TokenRecyclingDrafter, "_recycle", one_row_late)
    assert accepted(models, RECYCLING, params) < 0.8 * right


def test_a_batch_that_shares_one_matrix_accepts_less(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why a sequence follows its own rows."""
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    right = accepted(models, RECYCLING, params)
    real = TokenRecyclingDrafter._fill_shape

    def sharing(self: Any, row: Any) -> Any:
        self._own.clear()
        return real(self, row)

    monkeypatch.setattr(TokenRecyclingDrafter, "_fill_shape", sharing)
    assert accepted(models, RECYCLING, params) < right
