"""What is learned from a step, and that the steps which are compared are a fair sample."""

from __future__ import annotations

from statistics import mean

import pytest

from folospec.spec.planner.feedback import Feedback
from folospec.spec.planner.plan_terms import PlannedSequence, Source
from folospec.spec.planner.planner import Planner
from folospec.spec.planner.step_cost import CostCurve, StepShape

CURVE = CostCurve({1: 0.010, 64: 0.020})
ALONE, NAME, LONG, EVERY = StepShape(1, 1), "lookup", 24, 30


class Noting(Feedback):
    """Notes the tokens of every step that it is told of, and says that drafts have gained 1.1."""

    def __init__(self) -> None:
        super().__init__()
        self.got: list[float] = []

    def gain(self, source: str) -> float:
        return 1.1

    def note_drafted(self, sources, promised, got, expected, taken):  # type: ignore[no-untyped-def]
        self.got.append(got)


def accepted_at(step: int) -> int:
    """Long answers come in runs: three steps in a row of `EVERY`."""
    return LONG if step % EVERY < 3 else 0


def run(num_steps: int) -> tuple[Planner, list[float]]:
    """A planner after so many steps with drafts, and the tokens of each."""
    feedback, got = Noting(), []
    planner = Planner([Source(NAME, LONG, False)], CURVE, feedback)
    for step in range(num_steps):
        planner.begin_step()
        if not planner.resting(["s"]):
            planner.plan(["s"], [PlannedSequence("s", 10_000, None, {NAME: 1})], ALONE)
        if not planner.last_plan:
            planner.record_step(ALONE, 0, 0.010)
            continue
        # What was accepted in the last step is what the drafter has to read now.
        planner.record_draft(NAME, {"s": step}, [LONG], accepted_at(step - 1), 0.0001)
        nodes = range(LONG)
        scored = planner.score(NAME, "s", [n - 1 for n in nodes], [n + 1 for n in nodes], None)
        planner.prune([scored], ALONE, 0.0001)
        scored.kept = list(nodes)
        planner.observe(scored, list(range(accepted_at(step))))
        got.append(1.0 + accepted_at(step))
        planner.record_step(ALONE, LONG, 0.0101)
    return planner, got


def test_steps_that_are_compared_are_no_better_than_the_others():
    planner, got = run(6000)
    noted = planner.feedback.got[64:]  # type: ignore[attr-defined]
    assert len(noted) > 300
    assert mean(noted) == pytest.approx(mean(got), rel=0.2)


def test_control_where_drafters_have_much_to_read_more_was_accepted_than_on_average():
    after = [accepted_at(step) for step in range(6000) if accepted_at(step - 1) > 16]
    assert mean(after) > 5 * mean(accepted_at(step) for step in range(6000))


def test_steps_with_much_to_read_are_learned_from_even_where_they_are_not_compared():
    planner, got = run(6000)
    num_noted = len(planner.feedback.got)  # type: ignore[attr-defined]
    assert planner.estimates.draft_costs[NAME]._fit.num_seen > num_noted + len(got) // EVERY
