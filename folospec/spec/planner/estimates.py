"""Estimates how often each source is right, and what rows and drafts cost."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from folospec.spec.planner.acceptance_record import AcceptanceRecord
from folospec.spec.planner.plan_core import DraftPrices
from folospec.spec.planner.plan_terms import PlannedSequence, Source
from folospec.spec.planner.step_cost import CostCurve, DraftCost, StepCost, StepShape

_HORIZON = 64
"""Steps over which the cost of catching up is spread, if the output is that long."""
_RELAXING_STEPS = 10_000


class Estimates:
    """The estimates that a plan rests on.

    Args:
        sources: in order of precedence.
        curve: the cost of the target's pass.
    """

    def __init__(self, sources: Sequence[Source], curve: CostCurve) -> None:
        self.sources = {source.name: source for source in sources}
        self.cost = StepCost(curve)
        unit = curve.at(1)
        self.draft_costs = {
            s.name: DraftCost(unit, in_passes=s.in_passes, guess=s.guess) for s in sources
        }
        self.records = {source.name: AcceptanceRecord() for source in sources}
        self._seen: dict[tuple[str, str], int] = {}

    def prices(self, name: str, *, is_first: bool = False) -> DraftPrices:
        """What drafting costs at the machine's present speed; the first source to be asked in a
        step bears what it costs that anyone is, and a model what it costs that one is."""
        slowdown = self.cost.slowdown
        call, row, one_pass, level, num_uncomputed = self.draft_costs[name].parts(slowdown)
        if is_first:
            call += self.cost.asking
        if self.sources[name].in_passes:
            call += self.cost.asking_model
        return DraftPrices(call, row, one_pass, level, num_uncomputed)

    def depth_limit(self, row: PlannedSequence, source: Source) -> int:
        """The deepest draft that the request, the source and the end of the output allow."""
        wanted = source.limit if row.wanted is None else min(row.wanted, source.limit)
        return min(wanted, row.room - 1)

    def reach(self, row: PlannedSequence, source: Source) -> list[float]:
        """The chance that a draft is accepted up to each level."""
        return self.records[source.name].reach(row.seq_id, self.depth_limit(row, source))

    # Catching up ----------------------------------------------------------------------------------

    def num_unread(self, name: str, seq_id: str, num_uncomputed: int) -> int:
        """Tokens that a source has to catch up with, besides the last; `num_uncomputed` counts from
        the last that it has KV for, or from the first."""
        return max(0, num_uncomputed - self._seen.get((name, seq_id), 0) - 1)

    def note_seen(self, name: str, counts: Mapping[str, int]) -> None:
        """A source has seen so many tokens of these sequences."""
        if not self.sources[name].in_passes:
            self._seen.update({(name, seq_id): count for seq_id, count in counts.items()})

    def catching_up(self, row: PlannedSequence, name: str, price: float) -> float:
        """Seconds of this step's share in catching up. It is spent before anything is gained, and
        the output ends sooner with drafts, so the steps that share it are counted low."""
        num_unread = max(0, self.num_unread(name, row.seq_id, row.uncomputed[name]) - 1)
        return price * num_unread / (0.4 * min(row.room, _HORIZON))

    # Forgetting -----------------------------------------------------------------------------------

    def relax(self, num_steps: int, asked: Container[str]) -> None:
        """What drafts were found to cost is believed less and less while there are none: a machine
        that was busy at a bad time must not end them for good."""
        share = num_steps / _RELAXING_STEPS
        idle = [name for name in self.sources if name not in asked]
        if len(idle) == len(self.sources):
            self.cost.relax(share)
        for name in idle:
            self.draft_costs[name].relax(share)

    def drop(self, seq_id: str, *, finished: bool) -> None:
        """Forget a sequence that has ended, or what sources have seen of one that was
        preempted."""
        for name in self.sources:
            self._seen.pop((name, seq_id), None)
            if finished:
                self.records[name].drop(seq_id)

    def stats(self) -> dict[str, Any]:
        """What is believed at present, times in seconds."""
        alone = self.cost.table(StepShape(1, 1), 8)
        parts = ("call", "row", "pass", "row_and_pass", "token_behind")
        return {
            "step_seconds": {rows + 1: alone[rows] for rows in (0, 1, 3, 7)},
            "asking_seconds": self.cost.asking,
            "asking_model_seconds": self.cost.asking_model,
            "slowdown": self.cost.slowdown,
            "sources": {
                name: {
                    "acceptance_by_depth": self.records[name].reach("", 8),
                    "seconds": dict(
                        zip(
                            parts,
                            self.draft_costs[name].parts(self.cost.slowdown),
                            strict=True,
                        )
                    ),
                }
                for name in self.sources
            },
        }
