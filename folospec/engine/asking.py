"""Asking drafters: what a row is told, who is to blame when one fails, and how long it took."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from folospec.core.kv_cache_manager import KVCacheManager
from folospec.core.sequence import Sequence
from folospec.core.stats import EngineStats
from folospec.engine.planning import Planning
from folospec.engine.request import Request
from folospec.spec.checks import check_answer
from folospec.spec.drafters.base import Drafter, DraftRow
from folospec.spec.planner import FixedPlanner
from folospec.spec.proposal import Proposal

if TYPE_CHECKING:
    from folospec.spec.verify import AcceptanceRule

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Candidate:
    """A sequence that may be drafted for in this step, with the number of draft slots it was
    given."""

    request: Request
    seq: Sequence
    num_draft_slots: int


class Asking:
    """Puts the questions to drafters, and keeps their failures to the rows that caused them.

    Args:
        limits: most draft tokens of a sequence.
        planning: what the plan allows, if there is one.
        strict: raise what a drafter raises.
    """

    def __init__(
        self,
        limits: FixedPlanner,
        planning: Planning | None,
        manager: KVCacheManager,
        stats: EngineStats,
        rule: AcceptanceRule,
        *,
        vocab_size: int,
        strict: bool,
    ) -> None:
        self._limits, self._planning = limits, planning
        self._manager, self._stats, self._rule = manager, stats, rule
        self._vocab_size, self._strict = vocab_size, strict

    def ask(self, drafter: Drafter, asked: list[Candidate]) -> dict[str, Proposal]:
        """The proposals of one drafter, by seq_id."""
        if not asked:
            return {}
        begin = time.perf_counter()
        rows = [self._row(drafter, candidate) for candidate in asked]
        behind = self._planning.behind(drafter, rows) if self._planning is not None else 0
        answers = self._ask_rows(drafter, rows, asked)
        proposals = {}
        for row, proposal in zip(rows, answers, strict=True):
            if proposal is not None and len(proposal) > 0:
                proposal.drafter = drafter.name
                proposals[row.seq_id] = proposal
        if drafter.kv_owner is not None:
            for candidate, row in zip(asked, rows, strict=True):
                self._manager.mark_draft(candidate.seq, drafter.kv_owner, row.num_draft_computed)
        if self._planning is not None:
            depths = [max(proposal.tree.depths) for proposal in proposals.values()]
            self._planning.note_asked(drafter, rows, depths, behind, begin)
        return proposals

    def max_draft_tokens(self, candidate: Candidate) -> int:
        wanted = candidate.request.params.num_speculative_tokens
        return min(self._limits.num_draft_tokens(wanted), candidate.num_draft_slots)

    def max_depth(self, candidate: Candidate) -> int:
        return candidate.request.room(candidate.seq) - 1

    def _row(self, drafter: Drafter, candidate: Candidate) -> DraftRow:
        seq, request = candidate.seq, candidate.request
        owner, max_depth, min_path_chance = drafter.kv_owner, self.max_depth(candidate), 0.0
        if self._planning is not None:
            max_depth = min(max_depth, self._planning.max_depth(seq.seq_id, drafter))
            min_path_chance = self._planning.min_path_chance(seq.seq_id, drafter)
        return DraftRow(
            seq_id=seq.seq_id,
            token_ids=seq.token_ids,
            num_prompt_tokens=seq.num_prompt_tokens,
            max_draft_tokens=min(self.max_draft_tokens(candidate), drafter.num_speculative_tokens),
            max_depth=max_depth,
            num_slots=candidate.num_draft_slots,
            params=request.params,
            seed=request.seed,
            sample_index=seq.sample_index,
            block_table=seq.block_table,
            prediction_token_ids=request.prediction_token_ids,
            prompt_token_ids=seq.prompt_token_ids,
            output_token_ids=seq.output_token_ids,
            num_draft_computed=seq.draft_progress.get(owner, 0) if owner else 0,
            min_path_chance=min_path_chance,
        )

    def _ask_rows(
        self, drafter: Drafter, rows: list[DraftRow], candidates: list[Candidate]
    ) -> list[Proposal | None]:
        """Ask for the whole batch; if that fails, row by row, so that one row's trouble stays its
        own."""
        try:
            proposals = drafter.propose(rows)
            if len(proposals) != len(rows):
                raise ValueError(
                    f"a drafter must answer every row: {len(rows)} rows, {len(proposals)} answers"
                )
            for row, proposal in zip(rows, proposals, strict=True):
                check_answer(row, proposal, self._rule, self._vocab_size)
            return proposals
        except Exception:
            if self._strict:
                raise
            if len(rows) > 1:
                return [
                    self._ask_rows(drafter, [row], [candidate])[0]
                    for row, candidate in zip(rows, candidates, strict=True)
                ]
            logger.exception(
                "the drafter %s failed; sequence %s goes on without its draft",
                drafter.name,
                rows[0].seq_id,
            )
            self.count_error(candidates[0].request)
            rows[0].num_draft_computed = 0
            self.guard(drafter, drafter.drop, rows[0].seq_id)
            return [None]

    def count_error(self, request: Request) -> None:
        request.group.metrics.num_drafter_errors += 1
        self._stats.num_drafter_errors += 1

    def guard(self, drafter: Drafter, hook: Callable[..., None], *args: Any) -> None:
        """Call a hook of a drafter whose failure must not end the step."""
        try:
            hook(*args)
        except Exception:
            if self._strict:
                raise
            self._stats.num_drafter_errors += 1
            logger.exception("the drafter %s failed in %s", drafter.name, hook.__name__)
