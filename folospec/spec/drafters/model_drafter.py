"""Drafting with a causal language model, whoever it is: a small one with KV of its own, or a
cheaper view of the target that reads the target's KV. The drafters that do so are subclasses.

A draft grows a level at a time. The rows of a level run together, each sees its ancestors, and the
slots behind the root fill up in the order in which nodes are run:

    level    0       1          2                slots   root | a | b | a.a | ...
            root -+- a -+- a.a                   pass 1  root           -> children a, b, c
                  |     `- a.b                   pass 2  a, b           -> a.a, a.b, b.a
                  +- b --- b.a                   c is proposed and never run: it has no draft KV
                  `- c
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from folospec.sampling import noise
from folospec.sampling.constraints import SamplingRow
from folospec.sampling.noise import Purpose
from folospec.sampling.pipeline import process
from folospec.sampling.sampler import NO_TOKEN
from folospec.spec.acceptance_table import tried_nodes
from folospec.spec.children import Children, Place, draw_children
from folospec.spec.draft_runner import DraftRunner, Rows
from folospec.spec.drafters.base import Drafter, DrafterContext, DraftRow, Outcome
from folospec.spec.drafting import DRAFTING_OPTIONS, RankAcceptance, Sharpness, read_drafting
from folospec.spec.growth import Growth
from folospec.spec.proposal import Proposal

__all__ = ["DRAFTING_OPTIONS", "ModelDrafter"]


@dataclass(slots=True)
class _Proposed:
    """What is to be learned from a proposal, per node."""

    ranks: list[int]
    confidence: list[float]
    scores_known: bool
    """The confidence comes from all that decides: the draft model's scores, the noise included."""


class ModelDrafter(Drafter):
    """Drafts with the model behind `runner`.

    Drafts are drawn through the request's own sampling pipeline. Under `coupled` they look the
    target's noise up, so that draft and target agree whenever their laws nearly do (Daliri et al.,
    arXiv 2408.07978); under `rejection` and `block` they have noise of their own, as those rules
    demand.

    Args:
        options: those of `DRAFTING_OPTIONS`, read from the user's.
        runner: without a `kv_owner` its KV is the target's, which always covers the tokens before
            the root.

    Raises:
        ValueError: an option is out of range, or does not go with the acceptance rule.
    """

    def __init__(
        self, context: DrafterContext, options: Mapping[str, Any], runner: DraftRunner
    ) -> None:
        super().__init__(context)
        self.plan = read_drafting(options, context.acceptance)
        self.shares_noise = self.plan.shares_noise
        self.default_num_speculative_tokens = self.plan.default_num_nodes
        self.max_scratch_slots = self.plan.num_scratch_slots(self.num_speculative_tokens)
        self.ranks = RankAcceptance(options["rank_acceptance"])
        self.sharpness = Sharpness()
        self.stream = context.stream
        self.target_vocab_size = context.vocab_size
        self.runner = runner
        self._proposed: dict[str, _Proposed] = {}

    def propose(self, rows: list[DraftRow]) -> list[Proposal | None]:
        growths = [Growth(row, self.plan, self.ranks) for row in rows]
        logits = self.catch_up(rows)
        active = [growth for growth in growths if growth.frontier]
        if len(active) < len(growths):
            logits = logits[[bool(growth.frontier) for growth in growths]]
        while active:
            self._grow(active, logits)
            active = [growth for growth in active if growth.frontier]
            if active:
                logits = self.run([growth.next_rows(self._fit) for growth in active])
        return [self._proposal(growth) for growth in growths]

    def catch_up(self, rows: Sequence[DraftRow]) -> Tensor:
        """Run the committed tokens that the model has not seen, and the root, whose logits are the
        first draft's even where its KV exists: float [num_rows, vocab_size of the target]."""
        logits = self.run([self._catch_up_rows(row) for row in rows])
        if self.kv_owner is not None:
            for row in rows:
                row.num_draft_computed = len(row.token_ids)
        return logits

    def run(self, batch: list[Rows]) -> Tensor:
        """Run rows of the draft model: the wanted logits, float [num_logits, vocab_size of the
        target]. What only the target's vocabulary has is -inf."""
        logits = self.runner.forward(batch).logits
        missing = self.target_vocab_size - logits.shape[-1]
        return (
            torch.nn.functional.pad(logits, (0, missing), value=-torch.inf) if missing else logits
        )

    def draw(
        self, logits: Tensor, places: Sequence[tuple[DraftRow, Sequence[int]]]
    ) -> tuple[list[int], list[float], Tensor]:
        """Draw one draft token after each place, as a chain would.

        Args:
            logits: float [num_places, vocab_size].
            places: a sequence, and the draft tokens between its root and the place.

        Returns:
            the token ids (`NO_TOKEN` where the request leaves none), the confidence in them, and
            the log-probabilities they were drawn from, [num_places, vocab_size].
        """
        log_probs = self._log_probs(logits, places)
        wanted = [self._place(row, len(path), len(path), 1) for row, path in places]
        drawn = draw_children(self.plan.children, log_probs, wanted, self.sharpness.value)
        return (
            [c.token_ids[0] if c.token_ids else NO_TOKEN for c in drawn],
            [c.confidence[0] if c.confidence else 0.0 for c in drawn],
            log_probs,
        )

    def observe(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            proposed = self._proposed.pop(outcome.seq_id, None)
            if proposed is None:
                continue
            tried = list(tried_nodes(outcome))
            self.ranks.record((proposed.ranks[node], won) for node, won in tried)
            if proposed.scores_known:
                first = [(node, won) for node, won in tried if proposed.ranks[node] == 0]
                self.sharpness.record((proposed.confidence[node], won) for node, won in first)

    def drop(self, seq_id: str) -> None:
        self._proposed.pop(seq_id, None)

    def stats(self) -> dict[str, Any]:
        return {"rank_acceptance": self.ranks.estimates(), "sharpness": self.sharpness.value}

    def _grow(self, growths: list[Growth], logits: Tensor) -> None:
        """Draw the children of every frontier node; logits are [num_frontier_nodes, vocab_size], in
        the order of the growths and their frontiers."""
        at = [(growth, node) for growth in growths for node in growth.frontier]
        paths = [(growth.row, growth.path_token_ids(node)) for growth, node in at]
        log_probs = self._log_probs(logits, paths)
        places = [
            self._place(row, len(path), node + 1, growth.width(node))
            for (growth, node), (row, path) in zip(at, paths, strict=True)
        ]
        drawn = draw_children(self.plan.children, log_probs, places, self.sharpness.value)
        for (growth, node), children in zip(at, drawn, strict=True):
            self._use_own_confidence(growth.row, children)
            growth.add(node, children)
        for growth in growths:
            growth.advance()

    def _use_own_confidence(self, row: DraftRow, children: Children) -> None:
        """Sampled drafts under a ratio rule: what is said of a node may not look at its token, so
        it is what children of its rank have met with so far."""
        if not self.shares_noise and self.plan.is_sampled and not row.params.greedy:
            estimates = self.ranks.estimates()
            count = len(children.token_ids)
            children.confidence = [estimates[min(r, len(estimates) - 1)] for r in range(count)]

    def _log_probs(
        self, logits: Tensor, places: Sequence[tuple[DraftRow, Sequence[int]]]
    ) -> Tensor:
        return process(
            logits,
            [
                SamplingRow(
                    params=row.params,
                    prompt_token_ids=row.prompt_token_ids,
                    output_token_ids=row.output_token_ids,
                    draft_token_ids=path,
                    is_draft=True,
                )
                for row, path in places
            ],
            soften_greedy=True,
        )

    def _place(self, row: DraftRow, depth: int, parent_row: int, count: int) -> Place:
        temperature = row.params.temperature
        keys: list[int] = []
        if temperature > 0 and self.plan.is_sampled:
            if self.plan.uses_target_noise:
                codes = [int(Purpose.TARGET)]
                position = row.root_position + 1 + depth
            else:
                draws = count if self.plan.children == "iid" else 1
                streams = [self.stream + (draw << 10) for draw in range(draws)]
                codes = [noise.purpose_code(Purpose.DRAFT, parent_row, s) for s in streams]
                position = row.root_position
            keys = [noise.key(row.seed, row.sample_index, position, code) for code in codes]
        return Place(count, keys, temperature)

    def _catch_up_rows(self, row: DraftRow) -> Rows:
        computed = row.root_position if self.kv_owner is None else row.num_draft_computed
        start = min(computed, row.root_position)
        return Rows(self._fit(row.token_ids[start:]), start, row.block_table)

    def _fit(self, token_ids: Sequence[int]) -> list[int]:
        """Ids of padding rows that only the target has are read as the draft's last: a poor guess,
        never a wrong output."""
        last = self.runner.vocab_size - 1
        return [min(token_id, last) for token_id in token_ids]

    def _proposal(self, growth: Growth) -> Proposal | None:
        proposal, ranks = growth.finish(self.kv_owner, with_laws=not self.shares_noise)
        if proposal is not None:
            known = self.plan.children == "coupled" or growth.row.params.greedy
            self._proposed[growth.row.seq_id] = _Proposed(ranks, proposal.confidence or [], known)
        return proposal
