"""What long prompts get of a step follows how long steps take; the tokens do not follow it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import harness
import pytest
from harness import make_llm

from folospec import SamplingParams
from folospec.core import step_budget
from folospec.core.prefill_pace import PrefillPace

DECODES = [1] * 8


def scheduled(*num_tokens: int) -> Any:
    return [SimpleNamespace(num_tokens=count) for count in num_tokens]


def paced(
    pace: PrefillPace, steps: int, per_token: float, *, usual: float = 0.010, every: int = 0
) -> list[float]:
    """Seconds of steps next to a long prompt, on a machine where a token of it takes so long; of
    every so many steps one hangs."""
    seconds = []
    for number in range(steps):
        limit = pace.limit
        assert limit is not None
        taken = usual + per_token * limit
        if every and number % every == every - 1:
            taken *= 20
        pace.record(scheduled(*DECODES, *([limit] if limit else [])), taken)
        seconds.append(taken)
    return seconds


def used_to(usual: float = 0.010, slowdown: float | None = 1.75) -> PrefillPace:
    pace = PrefillPace(slowdown)
    for _ in range(8):
        pace.record(scheduled(*DECODES), usual)
    return pace


@pytest.mark.parametrize("per_token", [0.000002, 0.0001, 0.0005])
def test_a_step_takes_as_many_times_the_usual_one_as_was_asked_for(per_token: float) -> None:
    seconds = paced(used_to(), 60, per_token)
    assert max(seconds) < 0.0185
    assert seconds[-1] == pytest.approx(0.0175, rel=0.05)


def test_where_tokens_are_dear_at_least_a_few_run() -> None:
    pace = used_to()
    paced(pace, 10, 0.1)
    assert pace.limit == 4


def test_tokens_that_become_dearer_are_followed() -> None:
    pace = used_to()
    paced(pace, 40, 0.0001)
    assert paced(pace, 40, 0.0004)[-3] == pytest.approx(0.0175, rel=0.1)


def test_steps_that_hang_change_nothing() -> None:
    seconds = paced(used_to(), 60, 0.0001, every=6)
    assert sorted(seconds)[45] == pytest.approx(0.0175, rel=0.05)


def test_now_and_then_a_step_is_without_prompts_to_know_what_one_takes() -> None:
    pace = used_to()
    paced(pace, 20, 0.0001)
    assert pace.limit == 0
    pace.record(scheduled(*DECODES), 0.010)
    assert pace.limit


def test_where_usual_steps_become_longer_prompts_get_more() -> None:
    """As where drafts set in."""
    pace = used_to()
    paced(pace, 41, 0.0005)
    before = pace.limit
    paced(pace, 121, 0.0005, usual=0.040)
    assert before is not None
    assert pace.limit is not None
    assert pace.limit > 2 * before


def test_steps_in_which_nobody_decodes_teach_nothing() -> None:
    pace = used_to()
    before = pace.limit
    pace.record(scheduled(2048), 3.0)
    assert pace.limit == before


def test_without_a_slowdown_there_is_no_limit() -> None:
    pace = used_to(slowdown=None)
    assert pace.limit is None


LONG_PROMPT = [7 + index % 50 for index in range(120)]


def outputs_with(
    model: str, limit: int | None, monkeypatch: pytest.MonkeyPatch, speculative: Any = None
) -> tuple[list[Any], list[int]]:
    """Tokens and logprobs of requests that decode, and of a long prompt that comes later; and the
    chunks of that prompt."""
    monkeypatch.setattr(step_budget, "LONG_PROMPT", 20)
    monkeypatch.setattr(PrefillPace, "limit", property(lambda self: limit))
    llm = make_llm(model, speculative)
    engine, chunks = llm.engine, []
    engine.on_step = lambda step: chunks.extend(
        seq.num_tokens for seq in step.sequences if seq.request_id == "late" and seq.num_tokens > 1
    )
    params = [
        SamplingParams(temperature=t, seed=3, max_tokens=60, ignore_eos=True, logprobs=1)
        for t in (0.0, 0.9, 0.9)
    ]
    for number in range(2):
        engine.add_request(harness.as_prompts(harness.PROMPTS)[number], params[number], f"{number}")
    finished = {}
    for step in range(400):
        if step == 5:
            engine.add_request({"prompt_token_ids": LONG_PROMPT}, params[2], "late")
        for output in engine.step(finished_only=True) if engine.requests else ():
            finished[output.request_id] = output.outputs[0]
    if speculative is not None:
        harness.assert_speculated(llm.stats())
    found = [finished[name] for name in ("0", "1", "late")]
    return [(one.token_ids, one.cumulative_logprob) for one in found], chunks


@pytest.mark.parametrize("speculative", [None, "ngram"])
@pytest.mark.parametrize("limit", [3, 17])
def test_the_tokens_are_the_same_whatever_the_chunks(
    limit: int, speculative: Any, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, whole = outputs_with(models.target, None, monkeypatch)
    found, chunks = outputs_with(models.target, limit, monkeypatch, speculative)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert len(chunks) > max(3, len(whole))
    assert max(chunks) == limit
    for (_, logprob), (_, before) in zip(found, expected, strict=True):
        assert logprob == pytest.approx(before, abs=1e-9)
