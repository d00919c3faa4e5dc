"""Costs that do not depend on the clock, so that what the planner decides is the same in every
run."""

from __future__ import annotations

from typing import Any

from folospec import LLM
from folospec.spec.planner.planner import Planner
from folospec.spec.planner.step_cost import CostCurve, DraftCost, StepCost


class FixedStepCost(StepCost):
    """Knows what a step costs, whatever it took."""

    def observe(self, *_: Any, **__: Any) -> None: ...


class FixedDraftCost(DraftCost):
    """Knows what a draft costs, whatever it took."""

    def observe(self, *_: Any) -> None: ...


def planner_of(llm: LLM) -> Planner:
    assert llm.engine.proposer.step_planner is not None
    return llm.engine.proposer.step_planner.planner


def fix_costs(llm: LLM, *, row: float = 0.01, drafting: float = 0.01) -> LLM:
    """A step of one row costs 1; every other row of the target, and a pass of a drafter or a
    question to it, this much."""
    estimates = planner_of(llm).estimates
    estimates.cost = FixedStepCost(CostCurve({1: 1.0, 64: 1.0 + 63 * row}))
    for name, source in estimates.sources.items():
        each = 0.0 if source.in_passes else drafting
        guess = (0.0, each, drafting - each, 0.0, 0.0)
        estimates.draft_costs[name] = FixedDraftCost(1.0, in_passes=source.in_passes, guess=guess)
    return llm
