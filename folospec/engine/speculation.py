"""The engine's side of drafting: who drafts how much, what a drafter is told, and what becomes of
its KV."""

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
from folospec.engine.asking import Asking
from folospec.engine.planning import UNKNOWN_COSTS, Costs, Planning
from folospec.engine.telling import Telling
from folospec.models.forward import ForwardResult
from folospec.spec.acceptance import ACCEPTANCE
from folospec.spec.drafter_handle import DrafterHandle
from folospec.spec.merge import merge_proposals
from folospec.spec.planner.planner import FixedPlanner
from folospec.spec.proposal import Proposal
from folospec.spec.read_only import ReadOnlyList
from folospec.speculative_config import SpeculativeConfig
from folospec.worker.kv_cache import KVMoves


class Speculation:
    """The drafters in order of precedence, the planner, and the drafters' KV. Without drafters
    nothing is ever drafted."""

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
        self.planner = FixedPlanner(self.limit)
        # On a shared machine a step may wait for a core, which says nothing of what it costs. Where
        # the work is not this thread's alone, what others do while it sleeps counts all the same.
        is_alone = device.type == "cpu" and torch.get_num_threads() == 1
        self.clock = time.thread_time if is_alone else time.perf_counter
        """What the planner's times are measured with."""
        self.planning: Planning | None = None
        if config is not None and config.is_adaptive and drafters:
            self.planning = Planning(
                drafters,
                merge=self.merge,
                allowed=self._allowed,
                shares_noise=self.rule.shares_noise,
                costs=costs,
                clock=self.clock,
            )
        self.asking = Asking(
            self.planner,
            self.planning,
            manager,
            stats,
            self.rule,
            vocab_size=vocab_size,
            device=device,
            strict=strict,
        )
        self.reasons: dict[str, str] = {}
        """Of this step: seq_id -> why it has no draft, a key of `plan_terms.REASONS`."""
        self._telling = Telling(drafters, self.asking, strict=strict)
        self.needs = self._telling.needs

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
        if self.planning is not None:
            self.planning.begin(running)
        if self.is_idle:
            return {}
        return {seq.seq_id: self._num_draft_slots(seq) for seq in candidates}

    @property
    def is_idle(self) -> bool:
        """Whether nothing can be drafted in this step."""
        if self.planning is not None:
            return self.planning.is_idle
        return not self.drafters

    def _num_draft_slots(self, seq: Sequence) -> int:
        """How many slots to reserve behind the root; the last token of the output is never drafted,
        it is the bonus."""
        if self.planning is not None and not self.planning.is_planned(seq.seq_id):
            return 0
        group = seq.group
        assert group is not None
        drafters = self._asked(group, seq)
        length = self.planner.num_draft_tokens(group.params.num_speculative_tokens)
        if not drafters or length == 0 or group.room(seq) <= 1:
            return 0
        if self.merge:
            return length + max(drafter.max_scratch_slots for drafter in drafters)
        return max(min(length, d.num_speculative_tokens) + d.max_scratch_slots for d in drafters)

    def _asked(self, group: SequenceGroup, seq: Sequence) -> list[DrafterHandle]:
        """The drafters that may be asked for a sequence in this step."""
        drafters, planning = self._allowed(group), self.planning
        if planning is not None and drafters:
            drafters = [drafter for drafter in drafters if planning.asks(seq.seq_id, drafter)]
        return drafters

    def _allowed(self, group: SequenceGroup) -> list[DrafterHandle]:
        names = group.params.drafters
        return [d for d in self.drafters if names is None or d.name in names]

    def propose(self, steps: Seq[SequenceStep]) -> None:
        """Set the proposal, and with it the tree, of each step that a drafter has something to say
        about; and note for the others why they have none."""
        asked = [step for step in steps if step.num_draft_slots > 0] if not self.is_idle else []
        if self.planning is None:
            self._propose_fixed(asked)
        else:
            self.planning.note_schedule(steps)
            if asked:
                self._propose_planned(self.planning, asked)
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
            for seq_id, proposal in self.asking.ask(drafter, asked).items():
                answers[seq_id].append(proposal)
        for step in steps:
            step.proposal = self._merged(step, answers[step.seq.seq_id])

    def _propose_planned(self, planning: Planning, steps: Seq[SequenceStep]) -> None:
        """Ask whom the plan says, and keep what pays."""
        answers: dict[str, list[Proposal]] = {step.seq.seq_id: [] for step in steps}
        for drafter in self.drafters:
            still = planning.still_asked(drafter, answers)
            asked = [
                step
                for step in steps
                if step.seq.seq_id in still and drafter in self._allowed(step.group)
            ]
            for seq_id, proposal in self.asking.ask(drafter, asked).items():
                answers[seq_id].append(proposal)
            if self.merge:
                continue
            for step in asked:
                new = [p for p in answers[step.seq.seq_id] if p.drafter == drafter.name]
                planning.take(step, drafter.name, self._merged(step, new))
            planning.note_taken()
        if self.merge:
            name = planning.source_of(self.drafters[0])
            for step in steps:
                planning.take(step, name, self._merged(step, answers[step.seq.seq_id]))
            planning.note_taken()
        planning.prune(steps)

    def _merged(self, step: SequenceStep, proposals: list[Proposal]) -> Proposal | None:
        """One tree of the proposals, no deeper than the output can become."""
        if not proposals:
            return None
        max_depth = self.asking.max_depth(step)
        if len(proposals) == 1 and max(proposals[0].tree.depths) <= max_depth:
            return proposals[0]
        merged, sources = merge_proposals(
            proposals,
            max_nodes=step.num_draft_slots,
            max_draft_tokens=self.asking.max_draft_tokens(step),
            max_depth=max_depth,
            unite=self.rule.shares_noise,
            vocab_size=self.vocab_size,
        )
        names = [proposal.drafter for proposal in proposals]
        return replace(merged, own_nodes=dict(zip(names, sources, strict=True)))

    def commit_kv(
        self, seq: Sequence, proposal: Proposal, path: list[int], root: int, moves: KVMoves
    ) -> None:
        """Advance the drafters' progress over the accepted nodes, and add to `moves` what brings
        their draft KV beside their target KV."""
        for owner, draft_slots in proposal.draft_slots.items():
            sources, targets = [], []
            for depth, node in enumerate(path, start=1):
                offset = draft_slots[node]
                if offset is None:
                    break
                sources.append(self.manager.slot(seq, root + offset))
                targets.append(self.manager.slot(seq, root + depth))
            if sources != targets:
                moves.add(owner, sources, targets)
            self.manager.mark_draft(seq, owner, root + 1 + len(sources))

    def count(self, steps: Seq[SequenceStep]) -> None:
        """Count verified proposals, and tell the planner of them."""
        for step in steps:
            proposal, verdict = step.proposal, step.verdict
            if proposal is not None and verdict is not None:
                num_drafted, metrics = proposal.num_draft_tokens, step.group.metrics
                # An output may end within the accepted path; what is behind its end is not counted.
                num_accepted = min(verdict.num_accepted, len(step.new_token_ids))
                if num_drafted > 0:
                    self.stats.record_draft(metrics, num_drafted, num_accepted)
                if self.planning is not None:
                    self.planning.learn(step.seq.seq_id, verdict.path)

    def record_step(self, seconds: float) -> None:
        """Tell the planner how long the step took, all of it."""
        if self.planning is not None:
            self.planning.record(seconds)

    def drafter_stats(self) -> dict[str, dict[str, Any]]:
        """What each drafter says of its state, by name; nothing of one that fails to."""
        found = {d.name: self.asking.guard(d, "stats") for d in self.drafters}
        return {name: stats if isinstance(stats, dict) else {} for name, stats in found.items()}

    def planner_stats(self) -> dict[str, Any] | None:
        """What the planner believes; None where nothing is planned."""
        return self.planning.planner.stats() if self.planning is not None else None

    def _count_undrafted(self, steps: Seq[SequenceStep]) -> None:
        """Note for every sequence that could have had a draft and has none why it is so."""
        self.reasons = {}
        planned = self.planning.reasons if self.planning is not None else {}
        for step in steps if self.drafters else ():
            if step.num_tokens > 1 or step.proposal is not None or not step.samples:
                continue
            seq, group = step.seq, step.group
            reason = planned.get(seq.seq_id) if group.room(seq) > 1 else "no_room"
            reason = self.reasons[seq.seq_id] = reason or self._reason(step)
            self.stats.record_undrafted(group.metrics, reason)

    def _reason(self, step: SequenceStep) -> str:
        seq_id, group, planning = step.seq.seq_id, step.group, self.planning
        if group.params.num_speculative_tokens == 0 or not self._allowed(group):
            return "not_wanted"
        if planning is not None and not planning.is_planned(seq_id):
            return "unplanned"
        if step.num_draft_slots == 0:
            return "no_slots"
        if planning is not None and planning.was_pruned(seq_id):
            return "unlikely"
        return "nothing_to_say"

    def observe(self, steps: Seq[SequenceStep], result: ForwardResult) -> None:
        """Tell the drafters what became of the step, then to forget what is finished."""
        if not self.drafters:
            return
        try:
            self._telling.tell(steps, result)
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
                    self.asking.guard(drafter, "finish", *args)
                self.asking.guard(drafter, "drop", seq.seq_id)
            if self.planning is not None:
                self.planning.planner.drop(seq.seq_id, finished=finished)

    def _keeps(self, drafter: DrafterHandle, seq: Sequence) -> bool:
        if self.planning is None:
            return True
        return self.planning.keeps(drafter, seq.seq_id, seq.num_output_tokens)
