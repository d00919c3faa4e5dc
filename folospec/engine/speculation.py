"""The engine's side of drafting: who drafts how much, what a drafter is told, and what becomes of
its KV."""

from __future__ import annotations

import time
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from folospec.config import SpeculativeConfig
from folospec.core.kv_cache_manager import KVCacheManager
from folospec.core.scheduler import ScheduledSequence
from folospec.core.sequence import Sequence
from folospec.core.stats import EngineStats
from folospec.engine.asking import Asking, Candidate
from folospec.engine.planning import UNKNOWN_COSTS, Costs, Found, Planning
from folospec.engine.request import Request
from folospec.engine.telling import Observed, Telling
from folospec.spec.draft_runner import ForwardResult
from folospec.spec.drafter_handle import DrafterHandle
from folospec.spec.merge import merge_proposals
from folospec.spec.planner import FixedPlanner
from folospec.spec.proposal import Proposal
from folospec.spec.read_only import ReadOnlyList
from folospec.spec.verify import ACCEPTANCE
from folospec.worker.kv_cache import KVCache, PendingMoves


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
        self.rule = ACCEPTANCE[config.acceptance if config else "coupled"]
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
        """Of this step: seq_id -> why it has no draft, a key of `spec.plan_terms.REASONS`."""
        self._telling = Telling(drafters, self.asking, strict=strict)
        self.needs = self._telling.needs
        self.kv: dict[str, KVCache] = {}
        """The drafters' KV tensors by owner, set when the pool is made."""
        self._own_nodes: dict[tuple[str, str], Mapping[int, int]] = {}
        """Of this step: (drafter, seq_id) -> where the drafter's nodes are in the proposal."""

    @property
    def limit(self) -> int:
        """Most draft tokens per sequence and step, of all drafters together."""
        limits = [drafter.num_speculative_tokens for drafter in self.drafters]
        return sum(limits) if self.merge else max(limits, default=0)

    def plan(
        self, running: typing.Sequence[Sequence], request_of: Callable[[Sequence], Request]
    ) -> None:
        """Plan a step before it is scheduled."""
        if self.planning is not None:
            self.planning.begin(running, request_of)

    @property
    def is_idle(self) -> bool:
        """Whether nothing can be drafted in this step."""
        if self.planning is not None:
            return self.planning.is_idle
        return not self.drafters

    def num_draft_slots(self, request: Request, seq: Sequence) -> int:
        """How many slots to reserve behind the root, scratch included; the last token of the output
        is never drafted, it is the bonus."""
        if self.planning is not None and not self.planning.is_planned(seq.seq_id):
            return 0
        drafters = self._asked(request, seq)
        length = self.planner.num_draft_tokens(request.params.num_speculative_tokens)
        if not drafters or length == 0 or request.room(seq) <= 1:
            return 0
        if self.merge:
            return length + max(drafter.max_scratch_slots for drafter in drafters)
        return max(min(length, d.num_speculative_tokens) + d.max_scratch_slots for d in drafters)

    def _asked(self, request: Request, seq: Sequence) -> list[DrafterHandle]:
        """The drafters that may be asked for a sequence in this step."""
        drafters, planning = self._allowed(request), self.planning
        if planning is not None and drafters:
            drafters = [drafter for drafter in drafters if planning.asks(seq.seq_id, drafter)]
        return drafters

    def _allowed(self, request: Request) -> list[DrafterHandle]:
        names = request.params.drafters
        return [d for d in self.drafters if names is None or d.name in names]

    def propose(
        self, candidates: list[Candidate], scheduled: typing.Sequence[ScheduledSequence]
    ) -> dict[str, Proposal]:
        """Return a proposal for each sequence, by seq_id, that a drafter has something to say
        about.

        Args:
            candidates: those that have slots for one.
            scheduled: all that is in the step.
        """
        if self.planning is None:
            found = self._propose_fixed(candidates)
        else:
            self.planning.note_schedule(scheduled)
            found = self._propose_planned(self.planning, candidates) if candidates else {}
        self._own_nodes = {}
        for seq_id, one in found.items():
            self._own_nodes |= {(name, seq_id): nodes for name, nodes in one.own_nodes.items()}
        return {seq_id: one.proposal for seq_id, one in found.items()}

    def _propose_fixed(self, candidates: list[Candidate]) -> dict[str, Found]:
        answers: dict[str, list[Proposal]] = {c.seq.seq_id: [] for c in candidates}
        for drafter in self.drafters:
            asked = [
                c
                for c in candidates
                if drafter in self._allowed(c.request) and (self.merge or not answers[c.seq.seq_id])
            ]
            for seq_id, proposal in self.asking.ask(drafter, asked).items():
                answers[seq_id].append(proposal)
        return {
            c.seq.seq_id: self._merged(c, answers[c.seq.seq_id])
            for c in candidates
            if answers[c.seq.seq_id]
        }

    def _propose_planned(self, planning: Planning, candidates: list[Candidate]) -> dict[str, Found]:
        """Ask whom the plan says, and keep what pays."""
        found: dict[str, Found] = {}
        answers: dict[str, list[Proposal]] = {c.seq.seq_id: [] for c in candidates}
        for drafter in self.drafters:
            still = planning.still_asked(drafter, answers)
            asked = [
                c
                for c in candidates
                if c.seq.seq_id in still and drafter in self._allowed(c.request)
            ]
            for seq_id, proposal in self.asking.ask(drafter, asked).items():
                answers[seq_id].append(proposal)
            if self.merge:
                continue
            for candidate in asked:
                seq_id = candidate.seq.seq_id
                new = [p for p in answers[seq_id] if p.drafter == drafter.name]
                answer = self._merged(candidate, new) if new else None
                planning.take(seq_id, drafter.name, answer, found)
            planning.note_taken()
        if self.merge:
            name = planning.source_of(self.drafters[0])
            for candidate in candidates:
                several = answers[candidate.seq.seq_id]
                answer = self._merged(candidate, several) if several else None
                planning.take(candidate.seq.seq_id, name, answer, found)
            planning.note_taken()
        return planning.prune(found)

    def _merged(self, candidate: Candidate, proposals: list[Proposal]) -> Found:
        """One tree of the proposals, no deeper than the output can become."""
        max_depth = self.asking.max_depth(candidate)
        if len(proposals) == 1 and max(proposals[0].tree.depths) <= max_depth:
            merged = proposals[0]
            sources = [{node: node for node in range(len(merged))}]
        else:
            merged, sources = merge_proposals(
                proposals,
                max_nodes=candidate.num_draft_slots,
                max_draft_tokens=self.asking.max_draft_tokens(candidate),
                max_depth=max_depth,
                unite=self.rule.shares_noise,
                vocab_size=self.vocab_size,
            )
        names = [proposal.drafter for proposal in proposals]
        return Found(merged, dict(zip(names, sources, strict=True)))

    def commit_kv(
        self, seq: Sequence, proposal: Proposal, path: list[int], root: int, moves: PendingMoves
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
                moves.add(self.kv[owner], sources, targets)
            self.manager.mark_draft(seq, owner, root + 1 + len(sources))

    def count(self, observed: list[Observed]) -> None:
        """Count verified proposals, and tell the planner of them."""
        for seen in observed:
            if seen.proposal is not None and seen.verdict is not None:
                num_drafted, metrics = seen.proposal.num_draft_tokens, seen.request.group.metrics
                # An output may end within the accepted path; what is behind its end is not counted.
                num_accepted = min(seen.verdict.num_accepted, len(seen.new_token_ids))
                if num_drafted > 0:
                    self.stats.record_draft(metrics, num_drafted, num_accepted)
                if self.planning is not None:
                    self.planning.learn(seen.seq.seq_id, seen.verdict.path)

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

    def count_undrafted(
        self,
        scheduled: typing.Sequence[ScheduledSequence],
        proposals: dict[str, Proposal],
        request_of: Callable[[Sequence], Request],
    ) -> None:
        """Note for every sequence that could have had a draft and has none why it is so."""
        self.reasons = {}
        planned = self.planning.reasons if self.planning is not None else {}
        for item in scheduled if self.drafters else ():
            seq = item.seq
            seq_id = seq.seq_id
            if item.num_tokens > 1 or seq_id in proposals or not item.samples:
                continue
            request = request_of(seq)
            reason = planned.get(seq_id) if request.room(seq) > 1 else "no_room"
            reason = self.reasons[seq_id] = reason or self._reason(request, item)
            self.stats.record_undrafted(request.group.metrics, reason)

    def _reason(self, request: Request, item: ScheduledSequence) -> str:
        seq_id, planning = item.seq.seq_id, self.planning
        if request.params.num_speculative_tokens == 0 or not self._allowed(request):
            return "not_wanted"
        if planning is not None and not planning.is_planned(seq_id):
            return "unplanned"
        if item.num_draft_slots == 0:
            return "no_slots"
        if planning is not None and planning.was_pruned(seq_id):
            return "unlikely"
        return "nothing_to_say"

    def observe(self, observed: list[Observed], result: ForwardResult) -> None:
        """Tell the drafters what became of the step, then to forget what is finished."""
        if not self.drafters:
            return
        try:
            self._telling.tell(observed, result, self._own_nodes)
        finally:
            for seen in observed:
                if seen.siblings or seen.seq.status.is_finished:
                    self.drop([s for s in seen.family if s.status.is_finished], finished=True)

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
