"""What a plan without drafts spares, and what is learned while it holds."""

from __future__ import annotations

import time
from typing import Any

import harness
import pytest
import torch
from fixed_costs import fix_costs, planner_of
from harness import make_llm, run

from folospec import SamplingParams
from folospec.spec.proposer import Proposer

DEAR, CHEAP = 100.0, 0.01
PARAMS = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)


def lookup(models: Any, row: float) -> Any:
    return fix_costs(make_llm(models.target, {"method": "ngram", "adaptive": True}), row=row)


@pytest.mark.parametrize(("row", "is_asked"), [(DEAR, False), (CHEAP, True)])
def test_where_no_draft_can_pay_no_slot_is_reserved(
    row: float, is_asked: bool, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    original = Proposer._num_draft_slots

    def counted(self: Proposer, seq: Any) -> int:
        calls.append(seq.seq_id)
        return original(self, seq)

    monkeypatch.setattr(Proposer, "_num_draft_slots", counted)
    llm = lookup(models, row)
    result = run(llm, params=PARAMS)
    assert result.tokens == run(make_llm(models.target), params=PARAMS).tokens
    assert bool(calls) == is_asked
    assert bool(result.stats["num_drafts"]) == is_asked


def test_a_prompt_that_comes_while_a_plan_rests_is_not_learned_as_a_plain_step(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = lookup(models, DEAR)
    planner, engine = planner_of(llm), llm.engine
    learned: list[str] = []
    for name in ("pass_over", "record_step", "skip_step"):
        original = getattr(planner, name)

        def noted(*args: Any, name: str = name, original: Any = original) -> Any:
            result = original(*args)
            if result is not False:
                learned.append(name)
            return result

        monkeypatch.setattr(planner, name, noted)
    prompts = harness.as_prompts(harness.PROMPTS[:2])
    engine.add_request(prompts[0], PARAMS, "first")
    for _ in range(16):
        engine.step()
    assert "record_step" in learned
    assert learned[-3:] == ["skip_step"] * 3
    assert planner._rested > 0
    engine.add_request(prompts[1], PARAMS, "second")
    engine.step()
    assert learned[-1] == "pass_over"


def test_a_lookup_that_is_merged_with_a_model_is_never_behind(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model has caught up after its first draft, and a lookup's reading counts for nothing."""
    drafters = [{"method": "ngram"}, {"method": "draft_model", "model": models.near}]
    speculative = {"drafters": drafters, "merge": True, "adaptive": True}
    llm = fix_costs(make_llm(models.target, speculative))
    planner = planner_of(llm)
    uncomputed: list[int] = []
    original = planner.plan

    def noted(seq_ids: Any, rows: Any, shape: Any) -> Any:
        uncomputed.extend(
            num_uncomputed for row in rows for num_uncomputed in row.uncomputed.values()
        )
        return original(seq_ids, rows, shape)

    monkeypatch.setattr(planner, "plan", noted)
    prompt = list(range(5, 45))
    run(llm, [prompt], SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True))
    assert max(uncomputed) >= len(prompt)
    assert uncomputed[-1] < 12


@pytest.mark.parametrize(("threads", "clock"), [(1, time.thread_time), (2, time.perf_counter)])
def test_where_threads_share_the_work_time_is_not_that_of_one_of_them(
    threads: int, clock: Any, models: Any
) -> None:
    """A thread that sleeps while another is late would make large steps seem short."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert lookup(models, CHEAP).engine.proposer.clock is clock
    finally:
        torch.set_num_threads(before)
