"""Drafts in a step: slots for each sequence, proposals, and updates when the step is over.

The updates go to the drafters and to the planner.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

import torch

from folospec.core.kv_cache_manager import KVCacheManager
from folospec.core.sequence import Sequence, SequenceGroup
from folospec.core.sequence_step import SequenceStep
from folospec.core.stats import EngineStats
from folospec.models.forward import ForwardResult
from folospec.spec.acceptance import ACCEPTANCE
from folospec.spec.drafter_calls import DrafterCalls
from folospec.spec.drafter_handle import DrafterHandle
from folospec.spec.drafter_updates import DrafterUpdates
from folospec.spec.merge import merge_proposals
from folospec.spec.planner.planner import DraftLimit
from folospec.spec.planner.step_cost import UNKNOWN_COSTS, Costs
from folospec.spec.planner.step_planner import StepPlanner
from folospec.spec.proposal import Proposal
from folospec.spec.read_only import ReadOnlyList
from folospec.speculative_config import SpeculativeConfig


class Proposer:
    """The drafters in order of precedence, and the planner. Without drafters nothing is ever
    drafted.

        plan      before the schedule: draft slots by sequence
        propose   after it: a proposal in each step that gets one
        observe   when tokens are committed: drafters and planner learn
        drop      sequences that were preempted or have ended
    """

    def __init__(
        self,
        config: SpeculativeConfig | None,
        drafters: list[DrafterHandle],
        manager: KVCacheManager,
        stats: EngineStats,
        *,
        vocab_size: int,
        device: torch.device,
        strict: bool,
        costs: Costs = UNKNOWN_COSTS,
    ) -> None:
        self.drafters, self.manager = drafters, manager
        self.stats = stats
        self.vocab_size = vocab_size
        self.merge = config.merge if config else False
        self.acceptance = config.acceptance if config else "coupled"
        self.rule = ACCEPTANCE[self.acceptance]
        self.draft_limit = DraftLimit(self.limit)
        # On a shared machine a step may wait for a core, which says nothing of what it costs. Where
        # the work is not this thread's alone, what others do while it sleeps counts all the same.
        is_alone = device.type == "cpu" and torch.get_num_threads() == 1
        self.clock = time.thread_time if is_alone else time.perf_counter
        """What the planner's times are measured with."""
        self.step_planner: StepPlanner | None = None
        if config is not None and config.is_adaptive and drafters:
            self.step_planner = StepPlanner(
                drafters,
                merge=self.merge,
                allowed=self._allowed,
                shares_noise=self.rule.shares_noise,
                costs=costs,
                clock=self.clock,
            )
        self.calls = DrafterCalls(
            self.draft_limit,
            self.step_planner,
            manager,
            stats,
            self.rule,
            vocab_size=vocab_size,
            device=device,
            strict=strict,
        )
        self.reasons: dict[str, str] = {}
        """Of this step: seq_id -> why it has no draft, a key of `plan_terms.REASONS`."""
        self._updates = DrafterUpdates(drafters, self.calls, strict=strict)
        self.needs = self._updates.needs

    @property
    def limit(self) -> int:
        """Most draft tokens per sequence and step, of all drafters together."""
        limits = [drafter.num_speculative_tokens for drafter in self.drafters]
        return sum(limits) if self.merge else max(limits, default=0)

    def plan(self, running: Seq[Sequence], candidates: Seq[Sequence]) -> dict[str, int]:
        """Plan a step before it is scheduled.

        Args:
            running: the sequences that the planner plans for.
            candidates: all that may be in the step.

        Returns:
            By seq_id, how many slots a sequence wants behind its last token, scratch included, if
            it decodes in this step; one that is not there wants none.
        """
        if self.step_planner is not None:
            self.step_planner.begin(running)
        if self.is_idle:
            return {}
        return {seq.seq_id: self._num_draft_slots(seq) for seq in candidates}

    @property
    def is_idle(self) -> bool:
        """Whether nothing can be drafted in this step."""
        if self.step_planner is not None:
            return self.step_planner.is_idle
        return not self.drafters

    def _num_draft_slots(self, seq: Sequence) -> int:
        """How many slots to reserve behind the root; the last token of the output is never drafted,
        it is the bonus."""
        if self.step_planner is not None and not self.step_planner.is_planned(seq.seq_id):
            return 0
        group = seq.group
        assert group is not None
        drafters = self._asked(group, seq)
        length = self.draft_limit.num_draft_tokens(group.params.num_speculative_tokens)
        if not drafters or length == 0 or group.room(seq) <= 1:
            return 0
        if self.merge:
            return length + max(drafter.max_scratch_slots for drafter in drafters)
        return max(min(length, d.num_speculative_tokens) + d.max_scratch_slots for d in drafters)

    def _asked(self, group: SequenceGroup, seq: Sequence) -> list[DrafterHandle]:
        """The drafters that may be asked for a sequence in this step."""
        drafters, planner = self._allowed(group), self.step_planner
        if planner is not None and drafters:
            drafters = [drafter for drafter in drafters if planner.asks(seq.seq_id, drafter)]
        return drafters

    def _allowed(self, group: SequenceGroup) -> list[DrafterHandle]:
        names = group.params.drafters
        return [d for d in self.drafters if names is None or d.name in names]

    def propose(self, steps: Seq[SequenceStep]) -> None:
        """Set the proposal, and with it the tree, of each step that a drafter has something to say
        about; and note for the others why they have none."""
        asked = [step for step in steps if step.num_draft_slots > 0] if not self.is_idle else []
        if self.step_planner is None:
            self._propose_fixed(asked)
        else:
            self.step_planner.note_schedule(steps)
            if asked:
                self._propose_planned(self.step_planner, asked)
        for step in asked:
            if step.proposal is not None:
                step.tree = step.proposal.tree
        self._count_undrafted(steps)

    def _propose_fixed(self, steps: Seq[SequenceStep]) -> None:
        answers: dict[str, list[Proposal]] = {step.seq.seq_id: [] for step in steps}
        for drafter in self.drafters:
            asked = [
                step
                for step in steps
                if drafter in self._allowed(step.group)
                and (self.merge or not answers[step.seq.seq_id])
            ]
            for seq_id, proposal in self.calls.propose(drafter, asked).items():
                answers[seq_id].append(proposal)
        for step in steps:
            step.proposal = self._merged(step, answers[step.seq.seq_id])

    def _propose_planned(self, planner: StepPlanner, steps: Seq[SequenceStep]) -> None:
        """Have the drafters of the plan propose, and keep what pays."""
        answers: dict[str, list[Proposal]] = {step.seq.seq_id: [] for step in steps}
        for drafter in self.drafters:
            still = planner.still_asked(drafter, answers)
            asked = [
                step
                for step in steps
                if step.seq.seq_id in still and drafter in self._allowed(step.group)
            ]
            for seq_id, proposal in self.calls.propose(drafter, asked).items():
                answers[seq_id].append(proposal)
            if self.merge:
                continue
            for step in asked:
                new = [p for p in answers[step.seq.seq_id] if p.drafter == drafter.name]
                planner.take(step, drafter.name, self._merged(step, new))
            planner.note_taken()
        if self.merge:
            name = planner.source_of(self.drafters[0])
            for step in steps:
                planner.take(step, name, self._merged(step, answers[step.seq.seq_id]))
            planner.note_taken()
        planner.prune(steps)

    def _merged(self, step: SequenceStep, proposals: list[Proposal]) -> Proposal | None:
        """One tree of the proposals, no deeper than the output can become."""
        if not proposals:
            return None
        max_depth = self.calls.max_depth(step)
        if len(proposals) == 1 and max(proposals[0].tree.depths) <= max_depth:
            return proposals[0]
        merged, sources = merge_proposals(
            proposals,
            max_nodes=step.num_draft_slots,
            max_draft_tokens=self.calls.max_draft_tokens(step),
            max_depth=max_depth,
            unite=self.rule.shares_noise,
            vocab_size=self.vocab_size,
        )
        names = [proposal.drafter for proposal in proposals]
        return replace(merged, own_nodes=dict(zip(names, sources, strict=True)))

    def record_step(self, seconds: float) -> None:
        """Tell the planner how long the step took, all of it."""
        if self.step_planner is not None:
            self.step_planner.record(seconds)

    def drafter_stats(self) -> dict[str, dict[str, Any]]:
        """What each drafter says of its state, by name; nothing of one that fails to."""
        found = {d.name: self.calls.guard(d, "stats") for d in self.drafters}
        return {name: stats if isinstance(stats, dict) else {} for name, stats in found.items()}

    def planner_stats(self) -> dict[str, Any] | None:
        """What the planner believes; None where nothing is planned."""
        return self.step_planner.planner.stats() if self.step_planner is not None else None

    def _count_undrafted(self, steps: Seq[SequenceStep]) -> None:
        """Note for every sequence that could have had a draft and has none why it is so."""
        self.reasons = {}
        planned = self.step_planner.reasons if self.step_planner is not None else {}
        for step in steps if self.drafters else ():
            if step.num_tokens > 1 or step.proposal is not None or not step.samples:
                continue
            seq, group = step.seq, step.group
            reason = planned.get(seq.seq_id) if group.room(seq) > 1 else "no_room"
            reason = self.reasons[seq.seq_id] = reason or self._reason(step)
            self.stats.record_undrafted(group.metrics, reason)

    def _reason(self, step: SequenceStep) -> str:
        seq_id, group, planner = step.seq.seq_id, step.group, self.step_planner
        if group.params.num_speculative_tokens == 0 or not self._allowed(group):
            return "not_wanted"
        if planner is not None and not planner.is_planned(seq_id):
            return "unplanned"
        if step.num_draft_slots == 0:
            return "no_slots"
        if planner is not None and planner.was_pruned(seq_id):
            return "unlikely"
        return "nothing_to_say"

    def observe(self, steps: Seq[SequenceStep], result: ForwardResult) -> None:
        """Let the planner and the drafters learn from a committed step; then drop the sequences
        that have finished in it."""
        if not self.drafters:
            return
        try:
            if self.step_planner is not None:
                for step in steps:
                    if step.proposal is not None and step.verdict is not None:
                        self.step_planner.learn(step.seq.seq_id, step.verdict.path)
            self._updates.send(steps, result)
        finally:
            for step in steps:
                if step.siblings or step.seq.status.is_finished:
                    family = (step.seq, *step.siblings)
                    self.drop([seq for seq in family if seq.status.is_finished], finished=True)

    def drop(self, sequences: Iterable[Sequence], *, finished: bool) -> None:
        """Forget the drafters' state of preempted sequences, and of finished ones their draft
        lengths too."""
        for seq in sequences:
            for drafter in self.drafters:
                if finished and self._keeps(drafter, seq):
                    args = (seq.seq_id, ReadOnlyList(seq.token_ids), seq.num_prompt_tokens)
                    self.calls.guard(drafter, "finish", *args)
                self.calls.guard(drafter, "drop", seq.seq_id)
            if self.step_planner is not None:
                self.step_planner.planner.drop(seq.seq_id, finished=finished)

    def _keeps(self, drafter: DrafterHandle, seq: Sequence) -> bool:
        if self.step_planner is None:
            return True
        return self.step_planner.keeps(drafter, seq.seq_id, seq.num_output_tokens)
