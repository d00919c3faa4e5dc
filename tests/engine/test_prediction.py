"""The prediction drafter in the engine: a text that callers expect makes requests fast, and never
different."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import harness
import pytest
from harness import VOCAB_SIZE, assert_speculated, make_llm, run

from folospec import SamplingParams
from folospec.spec import verify_rows
from folospec.spec.stores.alignment import Alignment

PREDICTION = {"method": "prediction", "num_speculative_tokens": 8}

SITUATIONS: dict[str, dict[str, Any]] = {
    "a roomy pool": {},
    "a pool that forces preemption": {"num_blocks": 16, "block_size": 4},
    "chunked prefill": {"max_num_batched_tokens": 7, "max_num_seqs": 5},
}


def edited(tokens: list[int]) -> list[int]:
    """A text that the output departs from, by other tokens, fewer and more of them."""
    text = [(t + 1) % VOCAB_SIZE if place % 7 == 3 else t for place, t in enumerate(tokens)]
    return [1, *text[:9], *text[10:]]


def expecting(plain: harness.Run, edit: Any = edited) -> list[SamplingParams]:
    """The mixed batch, each request with its own output, edited, as its prediction."""
    return [
        replace(params, prediction=edit(tokens[0]))
        for params, tokens in zip(harness.mixed_params(), plain.tokens, strict=True)
    ]


@pytest.mark.parametrize("tree", [True, False])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_predicted_tokens_equal_plain_tokens(
    situation: str, tree: bool, models: Any, plain: harness.Run
) -> None:
    llm = make_llm(models.target, {**PREDICTION, "tree": tree}, **SITUATIONS[situation])
    result = run(llm, params=expecting(plain))
    assert result.tokens == plain.tokens
    assert result.logprobs == pytest.approx(plain.logprobs, abs=1e-9)
    assert_speculated(result.stats)
    if "preemption" in situation:
        assert result.stats["num_preemptions"] > 0
    assert result.stats["drafters"]["prediction"]["num_sequences"] == 0


def test_a_prediction_that_is_right_is_accepted_whole(models: Any, plain: harness.Run) -> None:
    params = expecting(plain, list)
    params[2] = replace(params[2], n=1)  # its siblings say something else
    plain_tokens = [[tokens[0]] if i == 2 else tokens for i, tokens in enumerate(plain.tokens)]
    for options in ({}, SITUATIONS["a pool that forces preemption"]):
        result = run(make_llm(models.target, PREDICTION, **options), params=params)
        assert result.tokens == plain_tokens
        assert result.stats["num_accepted_tokens"] == result.stats["num_draft_tokens"] > 50


def test_a_place_that_does_not_move_is_noticed(
    models: Any, plain: harness.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control of the test above: a drafter that reads the prediction from its start every time."""
    monkeypatch.setattr(Alignment, "append", lambda self, token_id: self.output.append(token_id))
    result = run(make_llm(models.target, PREDICTION), params=expecting(plain, list))
    assert result.stats["num_accepted_tokens"] < result.stats["num_draft_tokens"]


def test_a_prefix_hit_changes_nothing(models: Any, plain: harness.Run) -> None:
    llm = make_llm(models.target, PREDICTION, block_size=4)
    params = [replace(p, seed=5) for p in expecting(plain)]
    expected = run(make_llm(models.target), params=[replace(p, prediction=None) for p in params])
    first, second = run(llm, params=params), run(llm, params=params)
    assert first.tokens == second.tokens == expected.tokens
    assert second.stats["prefix_cache_hits"] > 0
    assert_speculated(second.stats)


@pytest.mark.parametrize("acceptance", ["rejection", "block"])
def test_greedy_tokens_are_kept_by_the_other_rules(acceptance: str, models: Any) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    expected = run(make_llm(models.target), params=params)
    predicted = [replace(params, prediction=edited(t[0])) for t in expected.tokens]
    llm = make_llm(models.target, {**PREDICTION, "acceptance": acceptance})
    result = run(llm, params=predicted)
    assert result.tokens == expected.tokens
    assert_speculated(result.stats)


def test_requests_without_a_prediction_run_beside_others(models: Any, plain: harness.Run) -> None:
    params = expecting(plain)
    params[0] = harness.mixed_params()[0]
    params[1] = harness.mixed_params()[1]
    result = run(make_llm(models.target, PREDICTION), params=params)
    assert result.tokens == plain.tokens
    assert [o.metrics.num_drafts > 0 for o in result.outputs] == [False, False, *[True] * 4]


def test_accepting_a_prediction_unseen_is_noticed(
    models: Any, plain: harness.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control of the tests above."""

    monkeypatch.setattr(verify_rows, "verify_coupled", harness.trusting)
    result = run(make_llm(models.target, PREDICTION), params=expecting(plain))
    assert result.tokens != plain.tokens


@pytest.mark.parametrize("prediction", [[1, VOCAB_SIZE], "a text"])
def test_tokens_that_the_model_does_not_have_are_refused(prediction: Any, models: Any) -> None:
    """In a text too: a tokenizer may know more tokens than the model."""

    class Tokenizer:
        def __call__(self, text: str, **options: bool) -> dict[str, list[int]]:
            return {"input_ids": [1, VOCAB_SIZE]}

    llm = make_llm(models.target, PREDICTION)
    llm.engine.inputs.tokenizer = Tokenizer()
    with pytest.raises(ValueError, match=f"prediction token ids must be .* got {VOCAB_SIZE}"):
        llm.engine.inputs._prediction(SamplingParams(prediction=prediction))
