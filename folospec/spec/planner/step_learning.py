"""Learns from a finished step: the cost of its pass and drafts, and what drafting gained."""

from __future__ import annotations

from collections.abc import Set

from folospec.spec.planner.estimates import Estimates
from folospec.spec.planner.feedback import Feedback
from folospec.spec.planner.learning_pace import LearningPace
from folospec.spec.planner.probing import Probing
from folospec.spec.planner.step_cost import DraftCall, StepShape
from folospec.spec.planner.step_plan import StepPlan


class StepLearning:
    """Notes what happens in a step, and learns from it at its end."""

    def __init__(self, estimates: Estimates, probing: Probing, feedback: Feedback) -> None:
        self._estimates, self._probing, self._feedback = estimates, probing, feedback
        self.pace = LearningPace()
        self.calls: list[tuple[str, DraftCall, float]] = []
        """Of this step: the source, what it was asked, and the seconds that it took."""
        self.num_accepted = 0.0
        """Draft tokens, each for what a token of its sequence counts."""
        self.is_reference = False
        """Whether the steps of this plan are plain so that there is something to compare with."""
        self._gain = 1.0
        self._asked_before: Set[str] = frozenset()

    def begin_step(self) -> None:
        """Forget what was drafted in the last step, also in one that failed before it was
        recorded."""
        self.calls.clear()
        self.num_accepted = 0.0

    def end_plan(self, plan: StepPlan, num_steps: int) -> None:
        """A plan has held for so many steps, and another is made."""
        asked = self._asked_before = plan.asked
        if asked:
            measured = max(self._feedback.gain(name) for name in asked)
            self._gain = max(plan.corrected, measured)
        self._probing.add_shares(self.pace.num_skipped + self.pace.num_drafted_skipped)
        self.pace.add_planned(num_steps, is_drafted=bool(asked))
        self._estimates.relax(num_steps, asked)
        self._feedback.relax(num_steps, asked)

    def needs_reference(self) -> bool:
        """See `LearningPace.needs_reference`."""
        return self.pace.needs_reference(self._gain)

    def record(
        self,
        plan: StepPlan,
        shape: StepShape,
        num_draft_rows: int,
        seconds: float,
        *,
        is_resting: bool,
    ) -> None:
        """Learn from a step.

        Args:
            seconds: that it took, drafting left out.
            rests: the plan was made for an earlier step.
        """
        is_due = not self.calls or self.pace.learns_drafted(self._gain)
        if not (is_due or plan.has_probes or any(self._is_new(*call) for call in self.calls)):
            self.begin_step()
            return
        # Steps that are learned from for what is new in them are not like the others: a drafter has
        # more to catch up with where more was accepted.
        if is_due or plan.has_probes:
            self._compare(plan, shape, num_draft_rows, seconds)
        if num_draft_rows == 0 and not plan.depths:
            self.pace.add_plain()
        # What a source and the planner work with has left the processor's caches where it was not
        # asked in the step before, and a question takes two or three times as long: who verifies by
        # that never asks again, and never learns better.
        cold = {name for name, *_ in self.calls if not (is_resting or name in self._asked_before)}
        cost = self._estimates.cost
        cost.observe(
            *(shape, num_draft_rows, seconds),
            asked=bool(self.calls),
            model=self._asks_model,
            learn=not cold,
        )
        for name, call, spent in self.calls:
            if name not in cold:
                self._estimates.draft_costs[name].observe(call, spent, cost.speed_now)
        self.begin_step()

    @property
    def _asks_model(self) -> bool:
        return any(self._estimates.sources[name].in_passes for name, *_ in self.calls)

    def _is_new(self, name: str, call: DraftCall, _: float) -> bool:
        """Whether a question is unlike most others; learning takes time."""
        return call.catches_up or not self._estimates.draft_costs[name].is_settled

    def _compare(
        self, plan: StepPlan, shape: StepShape, num_draft_rows: int, seconds: float
    ) -> None:
        """Compare a step with what is expected of it, and of one without drafts."""
        cost = self._estimates.cost
        plain = cost.expected(shape, 0)
        if self.is_reference and self.pace.is_settled:
            self._feedback.note_plain(seconds / plain)
        if not (self.calls and plan.depths):
            return
        expected = max(plain, cost.expected(shape, num_draft_rows)) + cost.asking
        if self._asks_model:
            expected += cost.asking_model
        for name, call, _ in self.calls:
            expected += self._estimates.draft_costs[name].expected(call, cost.slowdown)
        taken = seconds + sum(spent for *_, spent in self.calls)
        got = 1.0 + self.num_accepted / shape.num_sequences
        if plan.probe_loss is None:
            shares = expected / plain, taken / expected
            # Who was not asked in the end, since another had an answer, has gained nothing.
            called = {name for name, *_ in self.calls}
            self._feedback.note_drafted(called, plan.promised, got, *shares)
        elif plan.promised == 1.0:
            loss = min(taken - got * plain, plan.probe_loss + plain)
            self._probing.spend(max(0.0, loss - plan.probe_loss))
