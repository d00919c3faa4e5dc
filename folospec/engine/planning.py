"""The planner beside the engine: sequences become its rows, proposals its offers, and what it
decides becomes limits of drafters and smaller proposals.

    begin          before the schedule: who may draft, how deep
    asks, limits   while drafters are asked
    take, prune    their proposals
    learn, record  what became of them, and how long the step took
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from folospec.core.sequence import Sequence
from folospec.spec.drafter_handle import DrafterHandle
from folospec.spec.plan_terms import Offer, PlanRow, Source
from folospec.spec.planner import Planner
from folospec.spec.proposal import Proposal
from folospec.spec.step_cost import DEFAULT_CURVE, CostCurve, StepShape

if TYPE_CHECKING:
    from folospec.core.scheduler import ScheduledSequence
    from folospec.engine.request import Request


@dataclass(frozen=True, slots=True)
class Costs:
    """What is known of costs before the first step: the curve of the target's pass, and by drafter
    the guess that `spec.step_cost.DraftCost` takes."""

    curve: CostCurve = DEFAULT_CURVE
    guesses: Mapping[str, tuple[float, float, float, float, float]] = field(default_factory=dict)


UNKNOWN_COSTS = Costs()


@dataclass(slots=True)
class Found:
    """The proposal for a sequence, and where the nodes of each drafter that had a part in it are:
    name -> its node -> node of the proposal."""

    proposal: Proposal
    own_nodes: dict[str, dict[int, int]]
    offer: Offer | None = None


class Planning:
    """Drives a `Planner` for one engine.

    Args:
        merge: the drafters' proposals are merged, so that they are asked all or none.
        allowed: the drafters that a request takes.
        shares_noise: of the acceptance rule.
        clock: what time is measured with, in seconds.
    """

    def __init__(
        self,
        drafters: list[DrafterHandle],
        *,
        merge: bool,
        allowed: Callable[[Request], list[DrafterHandle]],
        shares_noise: bool,
        costs: Costs,
        clock: Callable[[], float],
    ) -> None:
        self.clock = clock
        self._shares_noise = shares_noise
        self._drafters, self._merge, self._allowed = drafters, merge, allowed
        if merge:
            limit = sum(drafter.num_speculative_tokens for drafter in drafters)
            in_passes = any(drafter.drafts_in_passes for drafter in drafters)
            sources = [Source("+".join(d.name for d in drafters), limit, in_passes)]
        else:
            sources = [_source(drafter, costs) for drafter in drafters]
        self.planner = Planner(sources, costs.curve)
        self._shape = StepShape(1, 1)
        self._asked: dict[str, dict[str, int]] = {}
        self._drafting = 0.0
        self._num_nodes = 0
        self._offers: dict[str, Offer] = {}
        self._pruned: set[str] = set()
        self._has_prompts = self._rests = False
        self._learning = 0.0
        """Seconds that learning from a step with drafts takes."""
        self._unpaid: list[tuple[str, dict[str, int], Seq[int], int, float]] = []

    def source_of(self, drafter: DrafterHandle) -> str:
        """The name under which the planner knows a drafter."""
        return next(iter(self.planner.beliefs.sources)) if self._merge else drafter.name

    # Plan -----------------------------------------------------------------------------------------

    def begin(self, running: Seq[Sequence], request_of: Callable[[Sequence], Request]) -> None:
        """Plan the step before it is scheduled."""
        seq_ids = [seq.seq_id for seq in running]
        self._rests = self.planner.resting(seq_ids)
        if self._rests and not self._asked:
            return  # as in the last step, which has left nothing behind
        self._unpaid.clear()  # of a step that failed
        self.planner.begin_step()
        self._offers, self._pruned, self._drafting, self._num_nodes = {}, set(), 0.0, 0
        if self._rests:
            return
        rows, context, num_ready = [], 0, 0
        for seq in running:
            if seq.num_tokens - seq.num_computed_tokens != 1:
                continue
            num_ready += 1
            context += seq.num_tokens
            row = self._plan_row(seq, request_of(seq))
            if row is not None:
                rows.append(row)
        # What is computed of prompts has to be computed anyhow: it is no reason to draft more.
        self._shape = StepShape(max(1, num_ready), max(1, num_ready), context)
        self._asked = self.planner.plan(seq_ids, rows, self._shape)

    def _plan_row(self, seq: Sequence, request: Request) -> PlanRow | None:
        room, wanted = request.room(seq), request.params.num_speculative_tokens
        allowed = self._allowed(request)
        if room <= 1 or wanted == 0 or not allowed:
            return None
        lags: dict[str, int] = {}
        for drafter in allowed:
            lag = self._lag(drafter, seq)
            name = self.source_of(drafter)
            lags[name] = max(lag, lags.get(name, 0))
        return PlanRow(seq.seq_id, room, wanted, lags)

    def _lag(self, drafter: DrafterHandle, seq: Sequence) -> int:
        owner = drafter.kv_owner
        if owner is not None:
            return seq.num_tokens - seq.draft_progress.get(owner, 0)
        return seq.num_tokens if self._reads_from_start(drafter) else 1

    def _reads_from_start(self, drafter: DrafterHandle) -> bool:
        """Whether the planner keeps count of what the drafter has read. A view of the target has
        its KV, and nothing to catch up with; beside a model, reading counts for nothing."""
        return not self.planner.beliefs.sources[self.source_of(drafter)].in_passes

    @property
    def is_idle(self) -> bool:
        """Whether nobody is asked in this step."""
        return not self._asked

    def note_schedule(self, scheduled: Seq[ScheduledSequence]) -> None:
        """Take in what is really scheduled."""
        if self._rests and len(scheduled) == self._shape.num_sequences:
            self._has_prompts = False
            return  # as in the last step, but for a token more of context
        ready = [item.start for item in scheduled if item.num_tokens == 1 and item.samples]
        self._has_prompts = len(ready) < len(scheduled)
        self._shape = StepShape(max(1, len(ready)), max(1, len(ready)), sum(ready))

    def asks(self, seq_id: str, drafter: DrafterHandle) -> bool:
        """Whether the drafter is to be asked for the sequence."""
        return self.source_of(drafter) in self._asked.get(seq_id, ())

    def max_depth(self, seq_id: str, drafter: DrafterHandle) -> int:
        return self._asked.get(seq_id, {}).get(self.source_of(drafter), 0)

    def is_planned(self, seq_id: str) -> bool:
        return seq_id in self._asked

    def was_pruned(self, seq_id: str) -> bool:
        """Whether there was a proposal, and nothing of it is left."""
        return seq_id in self._pruned

    @property
    def reasons(self) -> Mapping[str, str]:
        """Why the plan has no draft for a sequence; one that has, or is unknown, is not there."""
        return self.planner.reasons

    def still_asked(self, drafter: DrafterHandle, seq_ids: Iterable[str]) -> set[str]:
        """Of the sequences that the drafter was to be asked for, those where it still pays, given
        the proposals so far."""
        name = self.source_of(drafter)
        depths = {s: self._asked[s][name] for s in seq_ids if name in self._asked.get(s, ())}
        if self._merge or not self._offers or not drafter.drafts_in_passes:
            return set(depths)
        return set(self.planner.still_asked(name, depths, self._offers))

    # Proposals ------------------------------------------------------------------------------------

    def behind(self, drafter: DrafterHandle, seqs: Seq[Sequence]) -> int:
        """Tokens that the drafter has to catch up with for these sequences, besides one for
        each."""
        if drafter.kv_owner is not None:
            return sum(max(0, self._lag(drafter, seq) - 1) for seq in seqs)
        if not self._reads_from_start(drafter):
            return 0
        name = self.source_of(drafter)
        return sum(self.planner.behind(name, seq.seq_id, seq.num_tokens) for seq in seqs)

    def note_asked(
        self,
        drafter: DrafterHandle,
        seqs: Seq[Sequence],
        depths: Seq[int],
        behind: int,
        begin: float,
    ) -> None:
        """Note what was asked, since when by `clock`; `note_taken` tells the planner."""
        counts = {seq.seq_id: seq.num_tokens for seq in seqs}
        self._unpaid.append((self.source_of(drafter), counts, depths, behind, begin))

    def note_taken(self) -> None:
        """Learn what asking cost, and taking the answers in; drafters that are merged were one
        question."""
        if not self._unpaid:
            return
        name, counts, depths, behind, begin = self._unpaid[0]
        for _, more, other_depths, other_behind, _ in self._unpaid[1:]:
            counts = {**counts, **more}
            depths, behind = [*depths, *other_depths], behind + other_behind
        spent = self.clock() - begin
        self._drafting += spent
        self.planner.record_draft(name, counts, depths, behind, spent)
        self._unpaid.clear()

    def min_path_probability(self, seq_id: str, drafter: DrafterHandle) -> float:
        """The chance below which a draft should not be made longer; probes go on."""
        name = self.source_of(drafter)
        if not drafter.drafts_in_passes or self.planner.probing.is_probing(name, seq_id):
            return 0.0
        return self.planner.min_path_probability(name)

    def take(self, seq_id: str, name: str, answer: Found | None, found: dict[str, Found]) -> None:
        """Take an answer in, and note it in `found` unless what is there brings more."""
        if answer is None:
            self.planner.offer(name, seq_id, (), (), None)
            return
        proposal = answer.proposal
        tree, stated = proposal.tree, proposal.confidence
        follows_draws = False
        if proposal.draft_probs is not None and not self._shares_noise:
            # A ratio rule judges drawn tokens: neither what the drafter says of them nor what
            # hangs behind them may decide.
            stated, follows_draws = None, not self._has_static_tree(answer)
        answer.offer = self.planner.offer(
            *(name, seq_id, tree.parents, tree.depths, stated, proposal.candidate),
            follows_draws=follows_draws,
        )
        before = found.get(seq_id)
        if before is None or self.planner.better(before.offer, answer.offer) is answer.offer:
            found[seq_id] = answer
            self._offers[seq_id] = answer.offer

    def _has_static_tree(self, answer: Found) -> bool:
        """Whether all who had a part in the proposal promise that its shape is not drawn."""
        return all(d.has_static_tree for d in self._drafters if d.name in answer.own_nodes)

    def prune(self, found: dict[str, Found]) -> dict[str, Found]:
        """Keep of every proposal what the target is to judge; who keeps nothing is left out."""
        offers = [one.offer for one in found.values() if one.offer is not None]
        if not offers:
            return found
        self.planner.prune(offers, self._shape, self._drafting)
        kept = {}
        for seq_id, one in found.items():
            assert one.offer is not None
            nodes = one.offer.kept
            if not nodes:
                self._pruned.add(seq_id)
                continue
            if len(nodes) < len(one.proposal):
                place = {node: index for index, node in enumerate(nodes)}
                one.proposal = one.proposal.prune(nodes)
                one.own_nodes = {
                    name: {own: place[node] for own, node in own_nodes.items() if node in place}
                    for name, own_nodes in one.own_nodes.items()
                }
            kept[seq_id] = one
            self._num_nodes += len(nodes)
        self._offers = {seq_id: one.offer for seq_id, one in kept.items() if one.offer is not None}
        return kept

    # Learn ----------------------------------------------------------------------------------------

    def keeps(self, drafter: DrafterHandle, seq_id: str, num_tokens: int) -> bool:
        """Whether the drafter is to keep what it can of an output."""
        return self.planner.keeps(self.source_of(drafter), seq_id, num_tokens)

    def learn(self, seq_id: str, path: Seq[int]) -> None:
        """Learn from a verdict; `path` are nodes of the proposal that was judged."""
        offer = self._offers[seq_id]
        self.planner.observe(offer, [offer.kept[node] for node in path])

    def record(self, seconds: float) -> None:
        """Learn how long the step took, drafting included. One that computes prompts teaches
        nothing."""
        if self._rests and not self._has_prompts and self.planner.skip_step():
            return
        begin = self.clock()
        if not self.is_idle:
            # What it took to learn from the last one is a part of what such a step costs. Of steps
            # without drafts most are not learned from.
            seconds += self._learning - self._drafting
        if self._has_prompts:
            self.planner.pass_over(seconds)
        else:
            self.planner.record_step(self._shape, self._num_nodes, seconds)
        if not self.is_idle:
            self._learning += 0.1 * (self.clock() - begin - self._learning)


def _source(drafter: DrafterHandle, costs: Costs) -> Source:
    guess = costs.guesses.get(drafter.name)
    return Source(drafter.name, drafter.num_speculative_tokens, drafter.drafts_in_passes, guess)
