"""The engine's side of drafting: who drafts how much, what a drafter is told, and what becomes of
its KV."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from folospec.config import SpeculativeConfig
from folospec.core.kv_cache_manager import KVCacheManager
from folospec.core.sequence import Sequence
from folospec.core.stats import EngineStats
from folospec.engine.request import Request
from folospec.spec.draft_runner import ForwardResult
from folospec.spec.drafters.base import Drafter, DraftRow, Needs, Outcome
from folospec.spec.planner import Planner
from folospec.spec.proposal import Proposal
from folospec.spec.verify import ACCEPTANCE, Verdict
from folospec.worker.kv_cache import KVCache

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Candidate:
    """A sequence that may be drafted for in this step, with the number of draft slots it was
    given."""

    request: Request
    seq: Sequence
    num_draft_slots: int


@dataclass(slots=True)
class Observed:
    """A sequence after its step: the verdict on its proposal, if it had one, the tokens that were
    appended, and the packed rows of the step that are committed now."""

    request: Request
    seq: Sequence
    proposal: Proposal | None
    verdict: Verdict | None
    new_token_ids: list[int]
    start: int
    rows: list[int]
    judged_rows: range
    siblings: list[Sequence]


class Speculation:
    """One drafter, its planner, and its KV if it has any. Without a drafter nothing is ever
    drafted."""

    def __init__(
        self,
        config: SpeculativeConfig | None,
        drafter: Drafter | None,
        manager: KVCacheManager,
        stats: EngineStats,
        *,
        vocab_size: int,
        strict: bool,
    ) -> None:
        self.config, self.drafter, self.manager = config, drafter, manager
        self.stats = stats
        self.vocab_size, self.strict = vocab_size, strict
        self.planner = Planner(config)
        self.rule = ACCEPTANCE[config.acceptance] if config else None
        self.kv: KVCache | None = None
        """The drafter's KV tensors, set when the pool is made."""

    def draft_length(self, request: Request, seq: Sequence) -> int:
        """How many slots to reserve for drafts; the last token of the output is never drafted, it
        is the bonus."""
        if self.drafter is None:
            return 0
        wanted = request.params.num_speculative_tokens
        return self.planner.draft_length(seq.seq_id, wanted, request.room(seq) - 1)

    def propose(self, candidates: list[Candidate]) -> dict[str, Proposal]:
        """Return a proposal for each sequence, by seq_id, that the drafter has something to say
        about."""
        if self.drafter is None or not candidates:
            return {}
        rows = [self._row(c) for c in candidates]
        proposals = self._ask(self.drafter, rows, candidates)
        owner = self.drafter.kv_owner
        if owner is not None:
            for candidate, row in zip(candidates, rows, strict=True):
                self.manager.mark_draft(candidate.seq, owner, row.num_draft_computed)
        return {
            c.seq.seq_id: proposal
            for c, proposal in zip(candidates, proposals, strict=True)
            if proposal is not None and len(proposal) > 0
        }

    def _row(self, candidate: Candidate) -> DraftRow:
        seq, request = candidate.seq, candidate.request
        owner = self.drafter.kv_owner if self.drafter else None
        return DraftRow(
            seq_id=seq.seq_id,
            token_ids=seq.token_ids,
            num_prompt_tokens=seq.num_prompt_tokens,
            max_draft_tokens=candidate.num_draft_slots,
            params=request.params,
            seed=request.seed,
            sample_index=seq.sample_index,
            block_table=seq.block_table,
            num_draft_computed=seq.draft_progress.get(owner, 0) if owner else 0,
        )

    def _ask(
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
                self._check(row, proposal)
            return proposals
        except Exception:
            if self.strict:
                raise
            if len(rows) > 1:
                return [
                    self._ask(drafter, [row], [candidate])[0]
                    for row, candidate in zip(rows, candidates, strict=True)
                ]
            logger.exception(
                "the drafter failed; sequence %s goes on without a draft", rows[0].seq_id
            )
            self._count_error(candidates[0].request)
            rows[0].num_draft_computed = 0
            self._forget(drafter, rows[0].seq_id)
            return [None]

    def _count_error(self, request: Request) -> None:
        request.group.metrics.num_drafter_errors += 1
        self.stats.num_drafter_errors += 1

    def _forget(self, drafter: Drafter, seq_id: str) -> None:
        try:
            drafter.drop(seq_id)
        except Exception:
            if self.strict:
                raise
            self.stats.num_drafter_errors += 1
            logger.exception("the drafter failed to forget sequence %s", seq_id)

    def _check(self, row: DraftRow, proposal: Proposal | None) -> None:
        """A proposal that would write where it may not, or cannot be judged, is the drafter's
        failure."""
        known = len(row.token_ids)
        if not 0 <= row.num_draft_computed <= known:
            raise ValueError(
                f"num_draft_computed must be in [0, {known}], got {row.num_draft_computed}"
            )
        if proposal is None:
            return
        most = row.max_draft_tokens
        if len(proposal) > most:
            raise ValueError(f"at most {most} draft tokens were allowed, got {len(proposal)}")
        for offset in proposal.draft_slots or ():
            if offset is not None and not 1 <= offset <= most:
                raise ValueError(f"draft_slots must be None or in [1, {most}], got {offset}")
        for token_id in proposal.tree.token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(f"draft token ids must be below {self.vocab_size}, got {token_id}")
        assert self.rule is not None
        law = proposal.draft_probs
        if law is not None and not self.rule.shares_noise:
            if law.shape[1] != self.vocab_size:
                raise ValueError(
                    f"draft_probs must cover {self.vocab_size} tokens, got {law.shape[1]}"
                )
            if not bool((law >= 0).all()) or not bool(law.isfinite().all()):
                raise ValueError("draft_probs must be finite and at least 0")
        if not self.rule.takes_trees and not proposal.tree.is_chain:
            raise ValueError(
                "acceptance='block' judges chains, got a tree; use 'coupled' or 'rejection'"
            )

    def commit_kv(self, seq: Sequence, proposal: Proposal, path: list[int], root: int) -> None:
        """Move the accepted nodes' draft KV beside their target KV and advance the drafter's
        progress over them."""
        owner = self.drafter.kv_owner if self.drafter else None
        if owner is None or proposal.draft_slots is None:
            return
        sources, targets = [], []
        for depth, node in enumerate(path, start=1):
            offset = proposal.draft_slots[node]
            if offset is None:
                break
            sources.append(self.manager.slot(seq, root + offset))
            targets.append(self.manager.slot(seq, root + depth))
        if self.kv is not None and sources != targets:
            self.kv.move_rows(sources, targets)
        self.manager.mark_draft(seq, owner, root + 1 + len(sources))

    @property
    def needs(self) -> Needs:
        return self.drafter.needs if self.drafter else Needs()

    def count(self, observed: list[Observed]) -> None:
        """Count verified proposals, and tell the planner of them."""
        for seen in observed:
            if seen.proposal is not None and seen.verdict is not None:
                num_drafts, num_accepted = seen.proposal.num_draft_tokens, seen.verdict.num_accepted
                if num_drafts > 0:
                    self.stats.record_draft(seen.request.group.metrics, num_drafts, num_accepted)
                    self.planner.observe(seen.seq.seq_id, num_drafts, num_accepted)

    def observe(self, observed: list[Observed], result: ForwardResult) -> None:
        """Tell the drafter what became of the step, then to forget what is finished."""
        if self.drafter is None:
            return
        needs = self.needs
        told = [
            _outcome(seen, needs, result)
            for seen in observed
            if seen.proposal is not None or needs != Needs()
        ]
        try:
            if told:
                self.drafter.observe(told)
        except Exception:
            if self.strict:
                raise
            logger.exception(
                "the drafter failed to observe; its state for these sequences is dropped"
            )
            for seen in observed:
                self._count_error(seen.request)
                self._forget(self.drafter, seen.seq.seq_id)
        finally:
            finished = [s for seen in observed for s in _family(seen) if s.status.is_finished]
            self.drop(finished, finished=True)

    def drop(self, sequences: Iterable[Sequence], *, finished: bool) -> None:
        """Forget the drafter's state of preempted sequences, and of finished ones their draft
        lengths too."""
        for seq in sequences:
            if finished:
                self.planner.drop(seq.seq_id)
            if self.drafter is not None:
                self._forget(self.drafter, seq.seq_id)


def _family(seen: Observed) -> list[Sequence]:
    """The sequence and, where it has just been forked, its siblings."""
    return [seen.seq, *seen.siblings]


def _outcome(seen: Observed, needs: Needs, result: ForwardResult) -> Outcome:
    top_token_ids = None
    if needs.num_top_logits and len(seen.judged_rows):
        rows = result.logits[seen.judged_rows.start : seen.judged_rows.stop]
        top_token_ids = rows.topk(needs.num_top_logits).indices
    return Outcome(
        seen.seq.seq_id,
        seen.proposal,
        seen.verdict,
        seen.new_token_ids,
        start=seen.start,
        taps={layer: result.taps[layer][seen.rows] for layer in needs.taps},
        top_token_ids=top_token_ids,
    )
