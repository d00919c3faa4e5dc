"""Sends drafters the result of a step: verdicts, new tokens, and rows of the target's pass."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

from torch import Tensor

from folospec.core.sequence_step import SequenceStep
from folospec.models.forward import ForwardResult
from folospec.spec.drafter_calls import DrafterCalls
from folospec.spec.drafter_handle import DrafterHandle
from folospec.spec.drafters.base import DrafterNeeds, StepResult


class DrafterUpdates:
    """Sends each drafter as much as it needs.

    Args:
        calls: keeps a drafter's failure to its sequences.
        strict: raise what a drafter raises.
    """

    def __init__(self, drafters: list[DrafterHandle], calls: DrafterCalls, *, strict: bool) -> None:
        self._drafters, self._calls, self._strict = drafters, calls, strict
        self.needs = _union([drafter.needs for drafter in drafters])
        """What the target's pass must give so that every drafter has what it needs."""
        self._is_for_all = bool(self.needs.aux_hidden_state_layers or self.needs.num_top_tokens)
        """Whether every sequence of a step matters, not only those with a proposal."""

    def send(self, steps: Seq[SequenceStep], result: ForwardResult) -> None:
        """Call `observe` of every drafter that the step concerns."""
        if not (self._is_for_all or any(step.proposal is not None for step in steps)):
            return
        top_token_ids = self._top_token_ids(steps, result)
        for drafter in self._drafters:
            needs = drafter.needs
            results = [
                _step_result(drafter, step, result, top)
                for step, top in zip(steps, top_token_ids, strict=True)
                if step.proposal is not None
                or needs.aux_hidden_state_layers
                or needs.num_top_tokens
            ]
            self._observe(drafter, results, steps)

    def _observe(
        self, drafter: DrafterHandle, results: list[StepResult], steps: Seq[SequenceStep]
    ) -> None:
        try:
            if results:
                drafter.drafter.observe(results)
        except Exception as error:
            if self._strict:
                raise
            what = "failed to observe; its state for these sequences is dropped"
            self._calls.report(drafter, what, error)
            for step in steps:
                self._calls.count_error(step.group)
                self._calls.guard(drafter, "drop", step.seq.seq_id)

    def _top_token_ids(self, steps: Seq[SequenceStep], result: ForwardResult) -> Seq[Tensor | None]:
        """The likeliest tokens after the rows with logits of each, as many as the most demanding
        drafter needs; on the host, in one copy."""
        if not self.needs.num_top_tokens:
            return [None] * len(steps)
        count = min(self.needs.num_top_tokens, result.logits.shape[1])
        top = result.logits.topk(count).indices.cpu()
        indices = (step.logits_indices for step in steps)
        return [top[rows.start : rows.stop] if len(rows) else None for rows in indices]


def _step_result(
    drafter: DrafterHandle,
    step: SequenceStep,
    result: ForwardResult,
    top: Tensor | None,
) -> StepResult:
    """What one drafter is told of a sequence; all that can be changed is its own copy."""
    needs, verdict, proposal = drafter.needs, step.verdict, step.proposal
    if verdict is not None:
        verdict = replace(verdict, path=list(verdict.path))
    own_nodes = {} if proposal is None else dict(proposal.own_nodes.get(drafter.name, {}))
    if top is not None:
        top = top[:, : needs.num_top_tokens].clone() if needs.num_top_tokens else None
    return StepResult(
        step.seq.seq_id,
        None if proposal is None else proposal.copy(),
        verdict,
        tuple(step.new_token_ids),
        own_nodes=own_nodes,
        start=step.start,
        aux_hidden_states={
            layer: result.aux_hidden_states[layer][step.committed_rows]
            for layer in needs.aux_hidden_state_layers
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
