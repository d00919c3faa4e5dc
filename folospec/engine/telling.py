"""Telling drafters what became of a step: the verdicts, the tokens, and what they need of the
target's pass."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from torch import Tensor

from folospec.core.sequence import Sequence
from folospec.engine.asking import Asking
from folospec.engine.request import Request
from folospec.spec.draft_runner import ForwardResult
from folospec.spec.drafter_handle import DrafterHandle
from folospec.spec.drafters.base import DrafterNeeds, StepResult
from folospec.spec.proposal import Proposal
from folospec.spec.verify import Verdict

OwnNodes = Mapping[tuple[str, str], Mapping[int, int]]
"""(drafter, seq_id) -> where the drafter's nodes are in the proposal."""


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

    @property
    def family(self) -> list[Sequence]:
        """The sequence and, where it has just been forked, its siblings."""
        return [self.seq, *self.siblings]


class Telling:
    """Tells each drafter as much as it needs.

    Args:
        asking: keeps a drafter's failure to its sequences.
        strict: raise what a drafter raises.
    """

    def __init__(self, drafters: list[DrafterHandle], asking: Asking, *, strict: bool) -> None:
        self._drafters, self._asking, self._strict = drafters, asking, strict
        self.needs = _union([drafter.needs for drafter in drafters])
        """What the target's pass must give so that every drafter has what it needs."""
        self._is_for_all = bool(self.needs.aux_hidden_state_layers or self.needs.num_top_tokens)
        """Whether every sequence of a step matters, not only those with a proposal."""

    def tell(self, observed: Seq[Observed], result: ForwardResult, own_nodes: OwnNodes) -> None:
        """Tell every drafter what became of the step, if that concerns it."""
        if not (own_nodes or self._is_for_all):
            return
        top_token_ids = self._top_token_ids(observed, result)
        for drafter in self._drafters:
            needs = drafter.needs
            told = [
                _step_result(drafter, seen, result, top, own_nodes)
                for seen, top in zip(observed, top_token_ids, strict=True)
                if seen.proposal is not None
                or needs.aux_hidden_state_layers
                or needs.num_top_tokens
            ]
            self._tell(drafter, told, observed)

    def _tell(
        self, drafter: DrafterHandle, told: list[StepResult], observed: Seq[Observed]
    ) -> None:
        try:
            if told:
                drafter.drafter.observe(told)
        except Exception as error:
            if self._strict:
                raise
            what = "failed to observe; its state for these sequences is dropped"
            self._asking.report(drafter, what, error)
            for seen in observed:
                self._asking.count_error(seen.request)
                self._asking.guard(drafter, "drop", seen.seq.seq_id)

    def _top_token_ids(self, observed: Seq[Observed], result: ForwardResult) -> Seq[Tensor | None]:
        """The likeliest tokens after the judged rows of each, as many as the most demanding drafter
        needs; on the host, in one copy."""
        if not self.needs.num_top_tokens:
            return [None] * len(observed)
        count = min(self.needs.num_top_tokens, result.logits.shape[1])
        top = result.logits.topk(count).indices.cpu()
        judged = (seen.judged_rows for seen in observed)
        return [top[rows.start : rows.stop] if len(rows) else None for rows in judged]


def _step_result(
    drafter: DrafterHandle,
    seen: Observed,
    result: ForwardResult,
    top: Tensor | None,
    own_nodes: OwnNodes,
) -> StepResult:
    """What one drafter is told of a sequence; all that can be changed is its own copy."""
    needs, verdict = drafter.needs, seen.verdict
    if verdict is not None:
        verdict = replace(verdict, path=list(verdict.path))
    proposal = None if seen.proposal is None else seen.proposal.copy()
    if top is not None:
        top = top[:, : needs.num_top_tokens].clone() if needs.num_top_tokens else None
    return StepResult(
        seen.seq.seq_id,
        proposal,
        verdict,
        tuple(seen.new_token_ids),
        own_nodes=dict(own_nodes.get((drafter.name, seen.seq.seq_id), {})),
        start=seen.start,
        aux_hidden_states={
            layer: result.taps[layer][seen.rows] for layer in needs.aux_hidden_state_layers
        },
        top_token_ids=top,
    )


def _union(needs: list[DrafterNeeds]) -> DrafterNeeds:
    return DrafterNeeds(
        aux_hidden_state_layers=tuple(
            sorted({layer for need in needs for layer in need.aux_hidden_state_layers})
        ),
        num_top_tokens=max((need.num_top_tokens for need in needs), default=0),
        prediction=any(need.prediction for need in needs),
    )
