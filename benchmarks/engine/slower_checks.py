"""Whether a ratio of times is a loss: a bound for its median, and a planner that has to lose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from folospec import LLM

CONFIDENCE = 0.95
LEAST_MEDIAN, LEAST_BOUND = 0.97, 0.94
"""A cell is not slower where the median of its ratios and the bound for it are at least these."""


def lower_bound(ratios: Sequence[float], num_cells: int) -> float | None:
    """The one-sided 95 % bound for the median, corrected by Bonferroni for so many cells: with that
    confidence all of them hold at once.

    It is the k-th smallest ratio, with the largest k that is safe: it exceeds the true median only
    where at most k - 1 of n ratios are below that, and the chance of this is that of at most k - 1
    heads in n throws of a coin, however ratios are distributed. None where there are too few.
    """
    allowed = (1.0 - CONFIDENCE) / num_cells
    count, chance, place = len(ratios), 0.0, 0
    while place < count:
        chance += math.comb(count, place) * 0.5**count
        if chance > allowed:
            break
        place += 1
    return sorted(ratios)[place - 1] if place else None


def verdict(median: float, bound: float | None) -> str:
    """What a cell shows of whether its contestant is slower than plain decoding."""
    if median < LEAST_MEDIAN:
        return "slower"
    if bound is None or bound < LEAST_BOUND:
        return "undecided"
    return "not slower"


def force_drafts(llm: LLM) -> LLM:
    """Make the planner of an engine ask every drafter for every sequence in every step, and keep
    whatever they propose: it must be found to be slower where drafts do not pay."""
    step_planner = llm.engine.proposer.step_planner
    assert step_planner is not None
    planner = step_planner.planner
    limits = {name: source.limit for name, source in planner.estimates.sources.items()}

    def plan(seq_ids: list[str], rows: Sequence[Any], shape: Any) -> Mapping[str, Any]:
        return {
            row.seq_id: {name: min(n, row.room - 1) for name, n in limits.items()} for row in rows
        }

    def prune(offers: Sequence[Any], shape: Any, drafting: float) -> None:
        for offer in offers:
            offer.kept = list(range(len(offer.parents)))

    def still_asked(name: str, asked: Mapping[str, int], offers: Any) -> dict[str, int]:
        return dict(asked)

    planner.plan, planner.prune = plan, prune  # type: ignore[method-assign, assignment]
    planner.still_asked = still_asked  # type: ignore[method-assign]
    planner.resting = lambda seq_ids: False  # type: ignore[method-assign]
    planner.min_path_probability = lambda name: 0.0  # type: ignore[method-assign]
    return llm
