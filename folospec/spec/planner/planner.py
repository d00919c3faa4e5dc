"""Decides how much to draft for each sequence.

Core gets integers; what they rest on stays here.

    plan      which drafters run, and how deep: acceptance so far, against the cost of a step and a
              draft
    score     a proposal came: its confidence, corrected by what came of earlier ones
    prune     which nodes the target verifies
    observe   what became of them
    record    how long it took

No torch and no clock: the same object runs in the engine and in a simulation. What is decided about
a node rests on earlier steps, on its rank, depth and stated confidence, and on those of other
nodes, never on its token; where even which nodes there are may tell of a token that must not
decide, nothing is pruned. So whatever rule a confidence is fit for, this is too; see
`Proposal.prune`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from folospec.spec.planner.estimates import Estimates
from folospec.spec.planner.feedback import Feedback
from folospec.spec.planner.learning_pace import REFERENCE_STEPS, SURE_GAIN
from folospec.spec.planner.plan_terms import PlannedSequence, ScoredProposal, Source
from folospec.spec.planner.probing import Probing
from folospec.spec.planner.scored_proposals import (
    learn_from_end,
    learn_from_path,
    prune_scored,
    score_proposal,
)
from folospec.spec.planner.step_cost import DEFAULT_CURVE, CostCurve, DraftCall, StepShape
from folospec.spec.planner.step_learning import StepLearning
from folospec.spec.planner.step_plan import StepPlan

_RESTS, _HOLDS, _LOOKUP_HOLDS = (31, 63), (1, 7), (7, 15)
"""For how many steps a plan is kept, at first and later: one of no drafts, one of some, and one
that asks no model, which risks less."""
_SURE_EVERY = 4
"""Of a plan whose drafts gain beyond doubt every so many-th step is learned from."""
_ARRIVALS_OVER = 8
"""After so many steps without a new sequence nobody is expected to come."""


class DraftLimit:
    """How many draft tokens a sequence may have in a step, at most.

    Args:
        limit: most draft tokens per sequence and step, of all drafters together.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit

    def num_draft_tokens(self, wanted: int | None) -> int:
        """Most draft tokens of a sequence; `wanted` is the request's own limit."""
        return self._limit if wanted is None else min(wanted, self._limit)


class Planner:
    """Spends rows and drafting where the batch gets most tokens per second of them.

    Args:
        sources: in order of precedence.
        curve: the cost of the target's pass.
        feedback: another one than usual.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        curve: CostCurve = DEFAULT_CURVE,
        feedback: Feedback | None = None,
    ) -> None:
        self.estimates = Estimates(sources, curve)
        self.probing = Probing()
        self.feedback = feedback or Feedback()
        self._plan = StepPlan(self.estimates, self.probing, self.feedback, [], StepShape(1, 1))
        self._batch: list[str] = []
        self._ids: set[str] = set()
        self._rest = self._rested = self._backoff = self._since_arrival = 0
        self._is_sure = False
        self._learning = StepLearning(self.estimates, self.probing, self.feedback)

    # Plan -----------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """See `StepLearning.begin_step`."""
        self._learning.begin_step()

    def resting(self, seq_ids: list[str]) -> bool:
        """Whether the last plan still holds: the batch is the same, and it was made lately."""
        if self._rested >= self._rest or seq_ids != self._batch:
            return False
        self._rested += 1
        return True

    @property
    def learns(self) -> bool:
        """Whether anything is to be learned from this step. Where a single sequence has drafts that
        gain beyond doubt and cost no pass, learning from each would take a good part of what they
        gain."""
        return not self._is_sure or self._rested % _SURE_EVERY == 0

    @property
    def last_plan(self) -> dict[str, dict[str, int]]:
        return self._plan.depths

    @property
    def reasons(self) -> dict[str, str]:
        """Of the last plan: why sequences without a draft have none."""
        return self._plan.reasons

    def plan(
        self, seq_ids: list[str], rows: Sequence[PlannedSequence], shape: StepShape
    ) -> dict[str, dict[str, int]]:
        """Choose whom to ask for whom, and how deep.

        Args:
            seq_ids: of all running sequences: when they change, the plan is made anew.
            rows: those that could be drafted for.
            shape: the step without drafts.

        Returns:
            for each sequence that is drafted for, how deep by the name of the source.
        """
        changed = seq_ids != self._batch
        num_steps = 1 + self._rested
        self._since_arrival += num_steps
        if changed and not self._ids.issuperset(seq_ids):
            self._since_arrival = 0
        self._ids = set(seq_ids)
        self._learning.end_plan(self._plan, num_steps)
        self._batch, self._rested = seq_ids, 0
        self.probing.next_plan(num_steps - 1)
        plan = self._plan = StepPlan(
            *(self.estimates, self.probing, self.feedback, rows, shape),
            ends_together=self._since_arrival > _ARRIVALS_OVER,
        )
        self._learning.is_reference = bool(rows) and self._learning.needs_reference()
        all_ready = bool(rows) and shape.num_sequences >= len(seq_ids)
        if self._learning.is_reference:
            plan.reasons = {row.seq_id: "reference" for row in rows}
            self._is_sure = False
            self._rest = REFERENCE_STEPS - 1 if all_ready else 0
            return {}
        if rows:
            plan.choose()
        self._rest = self._next_rest(all_ready, changed)
        self._is_sure = len(seq_ids) == 1 and self._asks_surely()
        return plan.depths

    def _asks_surely(self) -> bool:
        """Whether all who are asked are lookups that have gained beyond doubt, and none a probe."""
        asked = self._plan.asked
        return (
            bool(asked)
            and not self._plan.has_probes
            and not any(self.estimates.sources[name].in_passes for name in asked)
            and all(self.feedback.gain(name) >= SURE_GAIN for name in asked)
        )

    def _next_rest(self, all_ready: bool, changed: bool) -> int:
        """For how many steps the plan is to hold: twice as long as the last, while nothing changes.
        A probe is an exception of one step, and while nobody is asked there is little to learn."""
        asks = self._plan.asked
        # Who is still at the prompt, or could not be drafted for, may be ready in the next step.
        if not all_ready or (changed and asks):
            self._backoff = 0
            return 0
        if self._plan.has_probes:
            return 0
        least, most = _HOLDS if asks else _RESTS
        if asks and not any(self.estimates.sources[name].in_passes for name in asks):
            least, most = _LOOKUP_HOLDS
        self._backoff = least if changed else min(max(2 * self._backoff + 1, least), most)
        return self._backoff

    def min_path_probability(self, name: str) -> float:
        """The chance below which a draft with a model is not worth another level."""
        num_rows = self._plan.num_rows(name)
        if not num_rows or not self.estimates.sources[name].in_passes:
            return 0.0
        prices = self.estimates.prices(name)
        level = self._plan.rate * (prices.one_pass / num_rows + prices.level) + self._plan.price
        return min(0.9, level / max(0.3, self.estimates.records[name].conditional("", 2)))

    # Offers ---------------------------------------------------------------------------------------

    def score(
        self,
        name: str,
        seq_id: str,
        parents: Sequence[int],
        depths: Sequence[int],
        confidence: Sequence[float] | None,
        candidate: Sequence[bool] | None = None,
        *,
        follows_draws: bool = False,
    ) -> ScoredProposal:
        """Take a proposal of a source in; an empty one says that it has nothing to say.

        Args:
            follows_draws: the shape may depend on tokens that were drawn, under a rule that does
                not allow them to decide. The proposal is kept whole then, and stands for as much
                as earlier answers were worth.
        """
        record = self.estimates.records[name]
        expected_gain = record.expected_gain(seq_id, self._plan.price) if follows_draws else None
        answer = parents, depths, confidence, candidate
        scored = score_proposal(record, name, seq_id, *answer, learn=self.learns)
        scored.expected_gain = expected_gain
        scored.is_probe = self.probing.is_probing(name, seq_id)
        return scored

    def record_draft(
        self,
        name: str,
        rows: Mapping[str, int],
        depths: Sequence[int],
        num_uncomputed: int,
        seconds: float,
    ) -> None:
        """Learn what asking cost.

        Args:
            rows: the asked sequences, and how many tokens each has.
            depths: how deep each answer went.
            num_uncomputed: tokens that had to be computed first, in all, besides one for each.
        """
        self.estimates.note_seen(name, rows)
        # How fast the machine was is known when the step is over.
        call = DraftCall(len(rows), max(depths, default=0), sum(depths), num_uncomputed)
        self._learning.calls.append((name, call, seconds))

    def num_unread(self, name: str, seq_id: str, num_uncomputed: int) -> int:
        """See `Estimates.num_unread`."""
        return self.estimates.num_unread(name, seq_id, num_uncomputed)

    def better(
        self, first: ScoredProposal | None, second: ScoredProposal | None
    ) -> ScoredProposal | None:
        """Of two proposals for one sequence, the one that brings more; the first of equal ones."""
        if first is None or second is None:
            return first or second
        return second if second.net(self._plan.price) > first.net(self._plan.price) else first

    def still_asked(
        self, name: str, asked: Mapping[str, int], proposals: Mapping[str, ScoredProposal]
    ) -> dict[str, int]:
        """Of the sequences for which a source was to be asked, those for which it still pays, given
        what the sources before it have offered."""
        record, prices, kept = self.estimates.records[name], self.estimates.prices(name), {}
        level = prices.level + prices.one_pass / max(1, len(asked))
        cost = self._plan.price + self._plan.rate * level
        for seq_id, depth in asked.items():
            scored = proposals.get(seq_id)
            if scored is not None:
                reach = record.reach(seq_id, depth)
                if scored.net(self._plan.price) >= sum(max(0.0, c - cost) for c in reach):
                    continue
            kept[seq_id] = depth
        return kept

    # Prune ----------------------------------------------------------------------------------------

    def prune(self, proposals: Sequence[ScoredProposal], shape: StepShape, drafting: float) -> None:
        """Say in `ScoredProposal.kept` which nodes the target verifies. One that `is_indivisible`
        is kept as it is. Of a probe the likeliest path is kept, two levels of it.

        Args:
            drafting: seconds that were spent on the proposals.
        """
        num_nodes = sum(len(scored.parents) for scored in proposals)
        seconds = self._plan.seconds(shape, num_nodes)
        prune_scored(proposals, shape.num_sequences, seconds, drafting, self._plan.weights)
        for scored in proposals if self.learns else ():
            if not scored.kept:
                learn_from_end(self.estimates.records[scored.source], scored, -1)

    # Learn ----------------------------------------------------------------------------------------

    def observe(self, scored: ScoredProposal, path: Sequence[int]) -> None:
        """Learn from a verdict: `path` are the accepted nodes, as they are numbered in the
        proposal."""
        if not self.learns:
            return
        self._learning.num_accepted += len(path) * self._plan.weights.get(scored.seq_id, 1.0)
        learn_from_path(self.estimates.records[scored.source], scored, path)

    def record_step(self, shape: StepShape, num_draft_rows: int, seconds: float) -> None:
        """Learn how long a step took, drafting left out."""
        self.probing.add_share(seconds)
        if self._learning.is_reference and self._rested < self._rest:
            return  # what drafters have left in caches makes it slow
        is_resting = self._rested > 0
        self._learning.record(self._plan, shape, num_draft_rows, seconds, is_resting=is_resting)

    def skip_step(self) -> bool:
        """Whether a step of a plan that holds is too much like others to be learned from; it is
        counted then. The last ones of a plan without drafts are not: by then the machine's speed
        has to be known."""
        if not self.learns:
            self._learning.pace.skip_drafted()
            return True
        is_known = self._rested > 2 or self._learning.pace.knows_plain
        is_last = self._rest - self._rested < 2
        if self.last_plan or self._learning.is_reference or is_last or not is_known:
            return False
        self._learning.pace.num_skipped += 1
        return True

    def pass_over(self, seconds: float) -> None:
        """A step took so long that teaches nothing, since it computed prompts too. It counts as the
        reference that it was to be: where prompts never end, so would the steps without drafts."""
        self.probing.add_share(seconds)
        if self._learning.is_reference:
            self._learning.pace.add_plain()
        self.begin_step()

    def keeps(self, name: str, seq_id: str, num_tokens: int) -> bool:
        """Whether a source should keep what it can of an output that has ended. Where it is in use
        it should; where it is given up, as often as the probe budget allows."""
        if name in self.last_plan.get(seq_id, ()) and not self.probing.is_probing(name, seq_id):
            return True
        if not self.probing.has_budget:
            return False
        self.probing.spend(self.estimates.prices(name).num_uncomputed * num_tokens)
        return True

    def stats(self) -> dict[str, Any]:
        """What is believed at present, times in seconds."""
        found = self.estimates.stats()
        for name, source in found["sources"].items():
            source["measured_gain"] = self.feedback.gain(name)
            source["kept_of_promise"] = self.feedback.factor(name)
        return found

    def drop(self, seq_id: str, *, finished: bool) -> None:
        """Forget a sequence that has ended, or the places of drafters in one that was preempted."""
        self.estimates.drop(seq_id, finished=finished)
        if finished:
            for name in self.estimates.sources:
                self.probing.forget(name, seq_id)
