"""Drives the planner through the stages of a step.

It turns sequences into the planner's rows and proposals into scored proposals, and what the planner
decides into limits of drafters and smaller proposals.

    begin          before the schedule: who may draft, how deep
    asks, limits   while drafters are asked
    take, prune    their proposals
    learn, record  what became of them, and how long the step took
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq

from folospec.core.sequence import Sequence, SequenceGroup
from folospec.core.sequence_step import SequenceStep
from folospec.spec.drafter_handle import DrafterHandle
from folospec.spec.planner.plan_terms import PlannedSequence, ScoredProposal, Source
from folospec.spec.planner.planner import Planner
from folospec.spec.planner.step_cost import Costs, StepShape
from folospec.spec.proposal import Proposal


class StepPlanner:
    """One `Planner` for the sequences of an engine.

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
        allowed: Callable[[SequenceGroup], list[DrafterHandle]],
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
        self._scored: dict[str, ScoredProposal] = {}
        self._pruned: set[str] = set()
        self.has_prompts = False
        """Whether the step computes prompts."""
        self.is_resting = False
        """Whether the plan of an earlier step holds, and drafts nothing or the same again."""
        self._learning = 0.0
        """Seconds that learning from a step with drafts takes."""
        self._unpaid: list[tuple[str, dict[str, int], Seq[int], int, float]] = []

    def source_of(self, drafter: DrafterHandle) -> str:
        """The name under which the planner knows a drafter."""
        return next(iter(self.planner.estimates.sources)) if self._merge else drafter.name

    # Plan -----------------------------------------------------------------------------------------

    def begin(self, running: Seq[Sequence]) -> None:
        """Plan the step before it is scheduled."""
        seq_ids = [seq.seq_id for seq in running]
        self.is_resting = self.planner.resting(seq_ids)
        if self.is_resting and not self._asked:
            return  # as in the last step, which has left nothing behind
        self._unpaid.clear()  # of a step that failed
        self.planner.begin_step()
        self._scored, self._pruned, self._drafting, self._num_nodes = {}, set(), 0.0, 0
        if self.is_resting:
            return
        rows, context, num_ready = [], 0, 0
        for seq in running:
            if seq.num_tokens - seq.num_computed_tokens != 1:
                continue
            num_ready += 1
            context += seq.num_tokens
            row = self._plan_row(seq)
            if row is not None:
                rows.append(row)
        # What is computed of prompts has to be computed anyhow: it is no reason to draft more.
        self._shape = StepShape(max(1, num_ready), max(1, num_ready), context)
        self._asked = self.planner.plan(seq_ids, rows, self._shape)

    def _plan_row(self, seq: Sequence) -> PlannedSequence | None:
        group = seq.group
        assert group is not None
        room, wanted = group.room(seq), group.params.num_speculative_tokens
        allowed = self._allowed(group)
        if room <= 1 or wanted == 0 or not allowed:
            return None
        uncomputed: dict[str, int] = {}
        for drafter in allowed:
            num_uncomputed = self._num_uncomputed(drafter, seq)
            name = self.source_of(drafter)
            uncomputed[name] = max(num_uncomputed, uncomputed.get(name, 0))
        return PlannedSequence(seq.seq_id, room, wanted, uncomputed)

    def _num_uncomputed(self, drafter: DrafterHandle, seq: Sequence) -> int:
        owner = drafter.kv_owner
        if owner is not None:
            return seq.num_tokens - seq.draft_progress.get(owner, 0)
        return seq.num_tokens if self._reads_from_start(drafter) else 1

    def _reads_from_start(self, drafter: DrafterHandle) -> bool:
        """Whether the planner keeps count of what the drafter has read. A self-draft model has
        its KV, and nothing to catch up with; beside a model, reading counts for nothing."""
        return not self.planner.estimates.sources[self.source_of(drafter)].in_passes

    @property
    def is_idle(self) -> bool:
        """Whether nobody is asked in this step."""
        return not self._asked

    def note_schedule(self, steps: Seq[SequenceStep]) -> None:
        """Take in what is really scheduled."""
        if self.is_resting and len(steps) == self._shape.num_sequences:
            self.has_prompts = False
            return  # as in the last step, but for a token more of context
        ready = [step.start for step in steps if step.num_tokens == 1 and step.samples]
        self.has_prompts = len(ready) < len(steps)
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
        if self._merge or not self._scored or not drafter.drafts_in_passes:
            return set(depths)
        return set(self.planner.still_asked(name, depths, self._scored))

    # Proposals ------------------------------------------------------------------------------------

    def num_unread(self, drafter: DrafterHandle, seqs: Seq[Sequence]) -> int:
        """Tokens that the drafter has to catch up with for these sequences, besides one for
        each."""
        if drafter.kv_owner is not None:
            return sum(max(0, self._num_uncomputed(drafter, seq) - 1) for seq in seqs)
        if not self._reads_from_start(drafter):
            return 0
        name = self.source_of(drafter)
        return sum(self.planner.num_unread(name, seq.seq_id, seq.num_tokens) for seq in seqs)

    def note_asked(
        self,
        drafter: DrafterHandle,
        seqs: Seq[Sequence],
        depths: Seq[int],
        num_unread: int,
        begin: float,
    ) -> None:
        """Note what was asked, since when by `clock`; `note_taken` tells the planner."""
        counts = {seq.seq_id: seq.num_tokens for seq in seqs}
        self._unpaid.append((self.source_of(drafter), counts, depths, num_unread, begin))

    def note_taken(self) -> None:
        """Learn what asking cost, and taking the answers in; drafters that are merged were one
        question."""
        if not self._unpaid:
            return
        name, counts, depths, num_unread, begin = self._unpaid[0]
        for _, more, other_depths, other_behind, _ in self._unpaid[1:]:
            counts = {**counts, **more}
            depths, num_unread = [*depths, *other_depths], num_unread + other_behind
        spent = self.clock() - begin
        self._drafting += spent
        self.planner.record_draft(name, counts, depths, num_unread, spent)
        self._unpaid.clear()

    def min_path_probability(self, seq_id: str, drafter: DrafterHandle) -> float:
        """The chance below which a draft should not be made longer; probes go on."""
        name = self.source_of(drafter)
        if not drafter.drafts_in_passes or self.planner.probing.is_probing(name, seq_id):
            return 0.0
        return self.planner.min_path_probability(name)

    def take(self, step: SequenceStep, name: str, proposal: Proposal | None) -> None:
        """Take an answer in, and note it in `step` unless what is there brings more."""
        seq_id = step.seq.seq_id
        if proposal is None:
            self.planner.score(name, seq_id, (), (), None)
            return
        tree, confidence = proposal.tree, proposal.confidence
        follows_draws = False
        if proposal.draft_probs is not None and not self._shares_noise:
            # A ratio rule verifies drawn tokens: neither what the drafter says of them nor what
            # hangs behind them may decide.
            confidence, follows_draws = None, not self._has_static_tree(proposal)
        scored = self.planner.score(
            *(name, seq_id, tree.parents, tree.depths, confidence, proposal.candidate),
            follows_draws=follows_draws,
        )
        if self.planner.better(self._scored.get(seq_id), scored) is scored:
            step.proposal, self._scored[seq_id] = proposal, scored

    def _has_static_tree(self, proposal: Proposal) -> bool:
        """Whether all who had a part in the proposal promise that its shape is not drawn."""
        return all(d.has_static_tree for d in self._drafters if d.name in proposal.own_nodes)

    def prune(self, steps: Seq[SequenceStep]) -> None:
        """Keep of every proposal what the target is to verify, if anything."""
        if not self._scored:
            return
        self.planner.prune(list(self._scored.values()), self._shape, self._drafting)
        for step in steps:
            scored = self._scored.get(step.seq.seq_id)
            if scored is None:
                continue
            if not scored.kept:
                del self._scored[scored.seq_id]
                self._pruned.add(scored.seq_id)
                step.proposal = None
            elif len(scored.kept) < len(step.proposal):
                step.proposal = step.proposal.prune(scored.kept)
            self._num_nodes += len(scored.kept)

    # Learn ----------------------------------------------------------------------------------------

    def keeps(self, drafter: DrafterHandle, seq_id: str, num_tokens: int) -> bool:
        """Whether the drafter is to keep what it can of an output."""
        return self.planner.keeps(self.source_of(drafter), seq_id, num_tokens)

    def learn(self, seq_id: str, path: Seq[int]) -> None:
        """Learn from a verdict; `path` are nodes of the proposal that was verified."""
        scored = self._scored[seq_id]
        self.planner.observe(scored, [scored.kept[node] for node in path])

    def record(self, seconds: float) -> None:
        """Learn how long the step took, drafting included. One that computes prompts teaches
        nothing."""
        if self.is_resting and not self.has_prompts and self.planner.skip_step():
            return
        begin = self.clock()
        if not self.is_idle:
            # What it took to learn from the last one is a part of what such a step costs. Of steps
            # without drafts most are not learned from.
            seconds += self._learning - self._drafting
        if self.has_prompts:
            self.planner.pass_over(seconds)
        else:
            self.planner.record_step(self._shape, self._num_nodes, seconds)
        if not self.is_idle:
            self._learning += 0.1 * (self.clock() - begin - self._learning)


def _source(drafter: DrafterHandle, costs: Costs) -> Source:
    guess = costs.guesses.get(drafter.name)
    return Source(drafter.name, drafter.num_speculative_tokens, drafter.drafts_in_passes, guess)
