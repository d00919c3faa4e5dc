"""Calls drafters: makes requests, checks and times proposals, isolates failures.

A failing drafter affects only the sequence that caused it.
"""

from __future__ import annotations

import logging
import traceback
from typing import TYPE_CHECKING, Any

from folospec.core.kv_cache_manager import KVCacheManager
from folospec.core.sequence import SequenceGroup
from folospec.core.sequence_step import SequenceStep
from folospec.core.stats import EngineStats
from folospec.spec.checks import AnswerLimits, ProposalChecks, take_answers, take_progress
from folospec.spec.drafter_handle import DrafterHandle
from folospec.spec.drafters.base import DraftRequest
from folospec.spec.guarded_runner import SlotRange
from folospec.spec.planner.planner import DraftLimit
from folospec.spec.planner.step_planner import StepPlanner
from folospec.spec.proposal import Proposal
from folospec.spec.read_only import ReadOnlyList

if TYPE_CHECKING:
    import torch

    from folospec.spec.acceptance import AcceptanceRule

logger = logging.getLogger(__name__)

_Answer = tuple[Proposal | None, int]
"""A checked proposal, and how many committed tokens have KV of the drafter."""


class DrafterCalls:
    """Calls drafters, and keeps their failures to the sequences that caused them.

    A drafter is given views and copies, and its answers are copied when they are checked: nothing
    that it does to either reaches the engine.

    Args:
        limit: most draft tokens of a sequence.
        step_planner: what the plan allows, if there is one.
        strict: raise what a drafter raises.
    """

    def __init__(
        self,
        limit: DraftLimit,
        step_planner: StepPlanner | None,
        manager: KVCacheManager,
        stats: EngineStats,
        rule: AcceptanceRule,
        *,
        vocab_size: int,
        device: torch.device,
        strict: bool,
    ) -> None:
        self._limit, self._step_planner = limit, step_planner
        self._manager, self._stats = manager, stats
        self._checks = ProposalChecks(rule, vocab_size, device)
        self._strict = strict
        self._reported: set[tuple[Any, ...]] = set()

    def propose(self, drafter: DrafterHandle, asked: list[SequenceStep]) -> dict[str, Proposal]:
        """The proposals of one drafter, by seq_id."""
        if not asked:
            return {}
        begin, num_unread = 0.0, 0
        if self._step_planner is not None:
            begin = self._step_planner.clock()
            num_unread = self._step_planner.num_unread(drafter, [step.seq for step in asked])
        answers = self._propose_all(drafter, asked)
        proposals = {}
        for step, (proposal, progress) in zip(asked, answers, strict=True):
            if proposal is not None:
                proposals[step.seq.seq_id] = proposal
            if drafter.kv_owner is not None:
                self._manager.mark_draft(step.seq, drafter.kv_owner, progress)
        if self._step_planner is not None:
            depths = [max(proposal.tree.depths) for proposal in proposals.values()]
            seqs = [step.seq for step in asked]
            self._step_planner.note_asked(drafter, seqs, depths, num_unread, begin)
        return proposals

    def max_draft_tokens(self, step: SequenceStep) -> int:
        wanted = step.group.params.num_speculative_tokens
        return min(self._limit.num_draft_tokens(wanted), step.num_draft_slots)

    def max_depth(self, step: SequenceStep) -> int:
        return step.group.room(step.seq) - 1

    def _request(
        self, drafter: DrafterHandle, step: SequenceStep, limits: AnswerLimits
    ) -> DraftRequest:
        seq, group = step.seq, step.group
        owner, max_depth, min_path_probability = drafter.kv_owner, self.max_depth(step), 0.0
        if self._step_planner is not None:
            max_depth = min(max_depth, self._step_planner.max_depth(seq.seq_id, drafter))
            min_path_probability = self._step_planner.min_path_probability(seq.seq_id, drafter)
        return DraftRequest(
            seq_id=seq.seq_id,
            token_ids=ReadOnlyList(seq.token_ids),
            num_prompt_tokens=seq.num_prompt_tokens,
            max_draft_tokens=limits.max_draft_tokens,
            max_depth=max_depth,
            num_slots=limits.num_slots,
            params=group.draft_params,
            seed=group.seed,
            sample_index=seq.sample_index,
            block_table=tuple(seq.block_table),
            prediction_token_ids=ReadOnlyList(group.prediction_token_ids),
            prompt_token_ids=ReadOnlyList(seq.prompt_token_ids),
            output_token_ids=ReadOnlyList(seq.output_token_ids),
            num_draft_computed=seq.draft_progress.get(owner, 0) if owner else 0,
            min_path_probability=min_path_probability,
        )

    def _propose_all(self, drafter: DrafterHandle, asked: list[SequenceStep]) -> list[_Answer]:
        """Ask for the whole batch; if that fails, row by row, so that one row's trouble stays its
        own."""
        limits = [self._answer_limits(drafter, step) for step in asked]
        rows = [self._request(drafter, s, limit) for s, limit in zip(asked, limits, strict=True)]
        slots = (
            SlotRange(tuple(row.block_table), limit.num_tokens - 1, limit.num_slots)
            for row, limit in zip(rows, limits, strict=True)
        )
        try:
            with drafter.access.granted(slots):
                # The drafter has the list to itself, and may take out of it what it likes.
                answers = take_answers(drafter.drafter.propose(list(rows)), len(rows))
        except Exception as error:
            if self._strict:
                raise
            if len(asked) > 1:
                return [self._propose_all(drafter, [step])[0] for step in asked]
            return [self._give_up(drafter, asked[0], error)]
        return [
            self._take(drafter, step, row, answer, limit)
            for step, row, answer, limit in zip(asked, rows, answers, limits, strict=True)
        ]

    def _take(
        self,
        drafter: DrafterHandle,
        step: SequenceStep,
        row: DraftRequest,
        answer: object,
        limits: AnswerLimits,
    ) -> _Answer:
        """Take over the answer to a row, and the progress that was written into it."""
        try:
            proposal = self._checks.take(answer, limits)
            return proposal, take_progress(row.num_draft_computed, limits)
        except Exception as error:
            if self._strict:
                raise
            return self._give_up(drafter, step, error)

    def _give_up(self, drafter: DrafterHandle, step: SequenceStep, error: Exception) -> _Answer:
        """Go on without a draft where the drafter has just failed."""
        seq_id = step.seq.seq_id
        what = f"failed; sequence {seq_id} goes on without its draft"
        self.report(drafter, what, error)
        self.count_error(step.group)
        self.guard(drafter, "drop", seq_id)
        return None, 0

    def _answer_limits(self, drafter: DrafterHandle, step: SequenceStep) -> AnswerLimits:
        wanted = min(self.max_draft_tokens(step), drafter.num_speculative_tokens)
        return AnswerLimits(
            drafter=drafter.name,
            kv_owner=drafter.kv_owner,
            num_tokens=step.seq.num_tokens,
            max_draft_tokens=wanted,
            num_slots=step.num_draft_slots,
        )

    def count_error(self, group: SequenceGroup) -> None:
        group.metrics.num_drafter_errors += 1
        self._stats.num_drafter_errors += 1

    def guard(self, drafter: DrafterHandle, hook: str, *args: Any) -> Any:
        """Call a hook of a drafter whose failure must not end the step; return what it returns,
        None if it fails."""
        try:
            return getattr(drafter.drafter, hook)(*args)
        except Exception as error:
            if self._strict:
                raise
            self._stats.num_drafter_errors += 1
            self.report(drafter, f"failed in {hook}", error)
            return None

    def report(self, drafter: DrafterHandle, what: str, error: Exception) -> None:
        """Log a failure, one that was logged before only as a debug message: a drafter that always
        fails does so for every sequence of every step."""
        place = traceback.extract_tb(error.__traceback__)[-1]
        kind = (drafter.name, type(error), place.filename, place.lineno)
        is_new = kind not in self._reported
        self._reported.add(kind)
        logger.log(
            logging.ERROR if is_new else logging.DEBUG,
            "the drafter %s %s (num_drafter_errors counts what follows)",
            drafter.name,
            what,
            exc_info=error,
        )
