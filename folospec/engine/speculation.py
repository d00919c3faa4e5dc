"""The engine's side of drafting: who drafts how much, what a drafter is told, and what becomes of
its KV."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from folospec.config import SpeculativeConfig
from folospec.core.kv_cache_manager import KVCacheManager
from folospec.core.sequence import Sequence
from folospec.core.stats import EngineStats
from folospec.engine.request import Request
from folospec.spec.checks import check_answer
from folospec.spec.draft_runner import ForwardResult
from folospec.spec.drafters.base import Drafter, DraftRow, Needs, Outcome
from folospec.spec.merge import merge_proposals
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
    """The drafters in order of precedence, the planner, and the drafters' KV. Without drafters
    nothing is ever drafted."""

    def __init__(
        self,
        config: SpeculativeConfig | None,
        drafters: list[Drafter],
        manager: KVCacheManager,
        stats: EngineStats,
        *,
        vocab_size: int,
        strict: bool,
    ) -> None:
        self.drafters, self.manager = drafters, manager
        self.stats = stats
        self.vocab_size, self.strict = vocab_size, strict
        self.merge = config.merge if config else False
        self.rule = ACCEPTANCE[config.acceptance if config else "coupled"]
        self.planner = Planner(self.limit, adaptive=config.adaptive if config else False)
        self.needs = _union([drafter.needs for drafter in drafters])
        self.kv: dict[str, KVCache] = {}
        """The drafters' KV tensors by owner, set when the pool is made."""
        self._own_nodes: dict[tuple[str, str], Mapping[int, int]] = {}
        """Of this step: (drafter, seq_id) -> where the drafter's nodes are in the proposal."""

    @property
    def limit(self) -> int:
        """Most draft tokens per sequence and step, of all drafters together."""
        limits = [drafter.num_speculative_tokens for drafter in self.drafters]
        return sum(limits) if self.merge else max(limits, default=0)

    def num_draft_slots(self, request: Request, seq: Sequence) -> int:
        """How many slots to reserve behind the root, scratch included; the last token of the output
        is never drafted, it is the bonus."""
        length = self.planner.num_draft_tokens(request.params.num_speculative_tokens)
        drafters = self._allowed(request)
        if not drafters or length == 0 or request.room(seq) <= 1:
            return 0
        if self.merge:
            return length + max(drafter.max_scratch_slots for drafter in drafters)
        return max(min(length, d.num_speculative_tokens) + d.max_scratch_slots for d in drafters)

    def _allowed(self, request: Request) -> list[Drafter]:
        names = request.params.drafters
        return [d for d in self.drafters if names is None or d.name in names]

    def propose(self, candidates: list[Candidate]) -> dict[str, Proposal]:
        """Return a proposal for each sequence, by seq_id, that a drafter has something to say
        about."""
        self._own_nodes = {}
        found: dict[str, list[Proposal]] = {c.seq.seq_id: [] for c in candidates}
        for drafter in self.drafters:
            asked = [
                c
                for c in candidates
                if drafter in self._allowed(c.request) and (self.merge or not found[c.seq.seq_id])
            ]
            for candidate, proposal in zip(asked, self._ask_all(drafter, asked), strict=True):
                if proposal is not None and len(proposal) > 0:
                    proposal.drafter = drafter.name
                    found[candidate.seq.seq_id].append(proposal)
        return {
            c.seq.seq_id: self._merged(c, found[c.seq.seq_id])
            for c in candidates
            if found[c.seq.seq_id]
        }

    def _merged(self, candidate: Candidate, proposals: list[Proposal]) -> Proposal:
        """One tree of the proposals, no deeper than the output can become."""
        seq_id, max_depth = candidate.seq.seq_id, self._max_depth(candidate)
        if len(proposals) == 1 and max(proposals[0].tree.depths) <= max_depth:
            merged = proposals[0]
            sources = [{node: node for node in range(len(merged))}]
        else:
            merged, sources = merge_proposals(
                proposals,
                max_nodes=candidate.num_draft_slots,
                max_draft_tokens=self._max_draft_tokens(candidate),
                max_depth=max_depth,
                unite=self.rule.shares_noise,
                vocab_size=self.vocab_size,
            )
        for proposal, nodes in zip(proposals, sources, strict=True):
            self._own_nodes[proposal.drafter, seq_id] = nodes
        return merged

    def _max_draft_tokens(self, candidate: Candidate) -> int:
        wanted = candidate.request.params.num_speculative_tokens
        return min(self.planner.num_draft_tokens(wanted), candidate.num_draft_slots)

    def _max_depth(self, candidate: Candidate) -> int:
        seq = candidate.seq
        return self.planner.max_depth(seq.seq_id, candidate.request.room(seq) - 1)

    def _ask_all(self, drafter: Drafter, asked: list[Candidate]) -> list[Proposal | None]:
        if not asked:
            return []
        rows = [self._row(drafter, candidate) for candidate in asked]
        proposals = self._ask(drafter, rows, asked)
        if drafter.kv_owner is not None:
            for candidate, row in zip(asked, rows, strict=True):
                self.manager.mark_draft(candidate.seq, drafter.kv_owner, row.num_draft_computed)
        return proposals

    def _row(self, drafter: Drafter, candidate: Candidate) -> DraftRow:
        seq, request = candidate.seq, candidate.request
        owner = drafter.kv_owner
        return DraftRow(
            seq_id=seq.seq_id,
            token_ids=seq.token_ids,
            num_prompt_tokens=seq.num_prompt_tokens,
            max_draft_tokens=min(self._max_draft_tokens(candidate), drafter.num_speculative_tokens),
            max_depth=self._max_depth(candidate),
            num_slots=candidate.num_draft_slots,
            params=request.params,
            seed=request.seed,
            sample_index=seq.sample_index,
            block_table=seq.block_table,
            prediction_token_ids=request.prediction_token_ids,
            prompt_token_ids=seq.prompt_token_ids,
            output_token_ids=seq.output_token_ids,
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
                check_answer(row, proposal, self.rule, self.vocab_size)
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
                "the drafter %s failed; sequence %s goes on without its draft",
                drafter.name,
                rows[0].seq_id,
            )
            self._count_error(candidates[0].request)
            rows[0].num_draft_computed = 0
            self._guard(drafter, drafter.drop, rows[0].seq_id)
            return [None]

    def _count_error(self, request: Request) -> None:
        request.group.metrics.num_drafter_errors += 1
        self.stats.num_drafter_errors += 1

    def _guard(self, drafter: Drafter, hook: Callable[..., None], *args: Any) -> None:
        """Call a hook of a drafter whose failure must not end the step."""
        try:
            hook(*args)
        except Exception:
            if self.strict:
                raise
            self.stats.num_drafter_errors += 1
            logger.exception("the drafter %s failed in %s", drafter.name, hook.__name__)

    def commit_kv(self, seq: Sequence, proposal: Proposal, path: list[int], root: int) -> None:
        """Move the accepted nodes' draft KV beside their target KV and advance the drafters'
        progress over them."""
        for owner, draft_slots in proposal.draft_slots.items():
            sources, targets = [], []
            for depth, node in enumerate(path, start=1):
                offset = draft_slots[node]
                if offset is None:
                    break
                sources.append(self.manager.slot(seq, root + offset))
                targets.append(self.manager.slot(seq, root + depth))
            if sources != targets:
                self.kv[owner].move_rows(sources, targets)
            self.manager.mark_draft(seq, owner, root + 1 + len(sources))

    def count(self, observed: list[Observed]) -> None:
        """Count verified proposals, and tell the planner of them."""
        for seen in observed:
            if seen.proposal is not None and seen.verdict is not None:
                num_drafts, num_accepted = seen.proposal.num_draft_tokens, seen.verdict.num_accepted
                if num_drafts > 0:
                    self.stats.record_draft(seen.request.group.metrics, num_drafts, num_accepted)
                    depths = seen.proposal.tree.depths
                    judged = (d for n, d in enumerate(depths) if seen.proposal.is_candidate(n))
                    self.planner.observe(seen.seq.seq_id, max(judged), num_accepted)

    def observe(self, observed: list[Observed], result: ForwardResult) -> None:
        """Tell the drafters what became of the step, then to forget what is finished."""
        top_token_ids = [self._top_token_ids(seen, result) for seen in observed]
        try:
            for drafter in self.drafters:
                self._tell(drafter, observed, result, top_token_ids)
        finally:
            finished = [s for seen in observed for s in _family(seen) if s.status.is_finished]
            self.drop(finished, finished=True)

    def _top_token_ids(self, seen: Observed, result: ForwardResult) -> Tensor | None:
        """The likeliest tokens after the judged rows, as many as the most demanding drafter
        needs."""
        if not self.needs.num_top_logits or not len(seen.judged_rows):
            return None
        rows = result.logits[seen.judged_rows.start : seen.judged_rows.stop]
        return rows.topk(min(self.needs.num_top_logits, rows.shape[1])).indices

    def _tell(
        self,
        drafter: Drafter,
        observed: list[Observed],
        result: ForwardResult,
        top_token_ids: list[Tensor | None],
    ) -> None:
        needs = drafter.needs
        told = [
            self._outcome(drafter, seen, result, top)
            for seen, top in zip(observed, top_token_ids, strict=True)
            if seen.proposal is not None or needs.taps or needs.num_top_logits
        ]
        try:
            if told:
                drafter.observe(told)
        except Exception:
            if self.strict:
                raise
            logger.exception(
                "the drafter %s failed to observe; its state for these sequences is dropped",
                drafter.name,
            )
            for seen in observed:
                self._count_error(seen.request)
                self._guard(drafter, drafter.drop, seen.seq.seq_id)

    def _outcome(
        self, drafter: Drafter, seen: Observed, result: ForwardResult, top: Tensor | None
    ) -> Outcome:
        needs = drafter.needs
        if top is not None:
            top = top[:, : needs.num_top_logits] if needs.num_top_logits else None
        return Outcome(
            seen.seq.seq_id,
            seen.proposal,
            seen.verdict,
            seen.new_token_ids,
            own_nodes=self._own_nodes.get((drafter.name, seen.seq.seq_id), {}),
            start=seen.start,
            taps={layer: result.taps[layer][seen.rows] for layer in needs.taps},
            top_token_ids=top,
        )

    def drop(self, sequences: Iterable[Sequence], *, finished: bool) -> None:
        """Forget the drafters' state of preempted sequences, and of finished ones their draft
        lengths too."""
        for seq in sequences:
            if finished:
                self.planner.drop(seq.seq_id)
            for drafter in self.drafters:
                if finished:
                    args = (seq.seq_id, seq.token_ids, seq.num_prompt_tokens)
                    self._guard(drafter, drafter.finish, *args)
                self._guard(drafter, drafter.drop, seq.seq_id)


def _union(needs: list[Needs]) -> Needs:
    """What the target's pass must give so that every drafter has what it needs."""
    return Needs(
        taps=tuple(sorted({tap for need in needs for tap in need.taps})),
        num_top_logits=max((need.num_top_logits for need in needs), default=0),
        prediction=any(need.prediction for need in needs),
    )


def _family(seen: Observed) -> list[Sequence]:
    """The sequence and, where it has just been forked, its siblings."""
    return [seen.seq, *seen.siblings]
