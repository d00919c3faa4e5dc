"""Drafts with a causal language model; the drafters that do so are subclasses.

The model is a small one with KV of its own, or a self-draft model that reads the target's KV.

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
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from folospec.models.forward import Rows
from folospec.spec.draft_runner import DraftRunner
from folospec.spec.drafters.base import Drafter, DrafterContext, DraftRequest, StepResult
from folospec.spec.proposal import Proposal
from folospec.spec.stores.acceptance_table import tried_nodes
from folospec.spec.trees.builders import Chain, TreeBuilder
from folospec.spec.trees.children import Children
from folospec.spec.trees.drafting import DRAFTING_OPTIONS, RankAcceptance, Sharpness, read_drafting
from folospec.spec.trees.drawing import DraftPosition, DraftSampling, Drawer, chain_sampling

__all__ = ["DRAFTING_OPTIONS", "ModelDrafter"]


@dataclass(slots=True)
class _Proposed:
    """What is to be learned from a proposal, per node."""

    ranks: list[int]
    confidence: Sequence[float]
    scores_known: bool
    """The confidence comes from all that decides: the draft model's scores, the noise included."""


class ModelDrafter(Drafter):
    """Drafts with the model behind `runner`.

    Drafts are drawn through the request's own sampling pipeline. Under `coupled` they look the
    target's noise up, so that draft and target agree whenever their distributions nearly do (Daliri
    et al., arXiv 2408.07978); under `rejection` and `block` they have noise of their own, as those
    rules demand.

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
        self.drawer = Drawer(self.plan, context.stream)
        self.target_vocab_size = context.vocab_size
        self.runner = runner
        self._proposed: dict[str, _Proposed] = {}

    @property
    def drafts_in_passes(self) -> bool:
        return True

    @property
    def has_static_tree(self) -> bool:
        # Without replacement there are no more children than the distribution has tokens, and
        # behind a drawn token that tells of it.
        return self.plan.kind == "chain" or self.plan.children == "iid"

    def warm_up(self, max_num_seqs: int) -> None:
        if self.plan.kind == "chain":
            length = self.num_speculative_tokens
            self.runner.warm_up_chains(max_num_seqs, length, self.target_vocab_size)

    def propose(self, requests: list[DraftRequest]) -> list[Proposal | None]:
        drafts = [self._begin(row) for row in requests]
        logits = self.catch_up(requests)
        if self.plan.kind == "chain":
            self._draft_chains(cast("list[Chain]", drafts), logits)
        else:
            self._draft_trees(cast("list[TreeBuilder]", drafts), logits)
        return [self._proposal(draft) for draft in drafts]

    def _begin(self, row: DraftRequest) -> Chain | TreeBuilder:
        sampling = DraftSampling(row, self.plan)
        # Under a ratio rule the length of a draft must not depend on what is drawn.
        min_probability = (
            row.min_path_probability if self.shares_noise or not sampling.is_noisy else 0.0
        )
        if self.plan.kind == "chain":
            return Chain(row, sampling, min_probability)
        return TreeBuilder(row, sampling, min_probability, self.plan, self.ranks)

    def _draft_chains(self, chains: list[Chain], logits: Tensor) -> None:
        """Let all chains grow by a token in every pass; `logits` are those of the roots."""
        going = [index for index, chain in enumerate(chains) if not chain.is_done]
        if len(going) < len(chains):
            chains, logits = [chains[index] for index in going], logits[going]
        if not chains or self._draft_at_once(chains, logits):
            return
        run = None
        while chains:
            nodes = [DraftPosition(c.sampling, c.token_ids, len(c.token_ids)) for c in chains]
            for chain, children in zip(chains, self._draw(logits, nodes), strict=True):
                chain.add(children)
            going = [index for index, chain in enumerate(chains) if not chain.is_done]
            if not going:
                return
            if run is not None and len(going) < len(chains):
                run.keep(going)
            chains = [chains[index] for index in going]
            if run is None:
                rows = [chain.row for chain in chains]
                run = self.runner.chains(
                    [row.root_position + 1 for row in rows], [row.block_table for row in rows]
                )
            logits = self._widen(run.forward(self._fit([c.token_ids[-1] for c in chains])))

    def _draft_at_once(self, chains: list[Chain], logits: Tensor) -> bool:
        """Draw all chains without coming back for each token, where the runner can and nothing but
        logits and noise is in the draws."""
        if any(chain.sampling.has_own_noise or chain.sampling.is_constrained for chain in chains):
            return False
        drawn = self.runner.draw_chains(
            logits,
            [chain.row.root_position + 1 for chain in chains],
            [chain.row.block_table for chain in chains],
            [
                chain_sampling(c.sampling, c.length, self.sharpness.value, c.min_probability)
                for c in chains
            ],
        )
        if drawn is None:
            return False
        for chain, token_ids, confidence in zip(chains, *drawn, strict=True):
            for token_id, chance in zip(token_ids, confidence, strict=True):
                if not chain.is_done:
                    chain.add(Children([token_id], [chance]))
        return True

    def _draft_trees(self, builders: list[TreeBuilder], logits: Tensor) -> None:
        """Let all trees grow by a level in every pass; `logits` are those of the roots."""
        active = [builder for builder in builders if builder.frontier]
        if len(active) < len(builders):
            logits = logits[[bool(builder.frontier) for builder in builders]]
        while active:
            at = [(builder, node) for builder in active for node in builder.frontier]
            drawn = self._draw(logits, [builder.draft_position(node) for builder, node in at])
            for (builder, node), children in zip(at, drawn, strict=True):
                builder.add(node, children)
            for builder in active:
                builder.advance()
            active = [builder for builder in active if builder.frontier]
            if active:
                batch = [builder.next_rows() for builder in active]
                logits = self.run([replace(r, token_ids=self._fit(r.token_ids)) for r in batch])

    def _draw(self, logits: Tensor, nodes: Sequence[DraftPosition]) -> list[Children]:
        """Draw the children of every node, with the confidence that the rule allows."""
        drawn = self.drawer.draw(logits, nodes, self.sharpness.value)
        for node, children in zip(nodes, drawn, strict=True):
            if node.sampling.has_own_noise and not self.shares_noise:
                # What is said of a sampled draft may not look at its token under a ratio rule, so
                # it is what children of its rank have met with so far.
                estimates = self.ranks.estimates()
                last, count = len(estimates) - 1, len(children.token_ids)
                children.confidence = [estimates[min(rank, last)] for rank in range(count)]
        return drawn

    def catch_up(self, rows: Sequence[DraftRequest]) -> Tensor:
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
        return self._widen(self.runner.forward(batch).logits)

    def _widen(self, logits: Tensor) -> Tensor:
        missing = self.target_vocab_size - logits.shape[-1]
        return (
            torch.nn.functional.pad(logits, (0, missing), value=-torch.inf) if missing else logits
        )

    def draw(
        self, logits: Tensor, places: Sequence[tuple[DraftRequest, Sequence[int]]]
    ) -> list[Children]:
        """Draw one draft token after each place, as a chain would; none where the request leaves
        none.

        Args:
            logits: float [num_places, vocab_size].
            places: a sequence, and the draft tokens between its root and the place.
        """
        samplings: dict[str, DraftSampling] = {}
        for row, _ in places:
            if row.seq_id not in samplings:
                samplings[row.seq_id] = DraftSampling(row, self.plan)
        nodes = [DraftPosition(samplings[row.seq_id], path, len(path)) for row, path in places]
        return self.drawer.draw(logits, nodes, self.sharpness.value)

    def observe(self, results: list[StepResult]) -> None:
        for result in results:
            proposed = self._proposed.pop(result.seq_id, None)
            if proposed is None:
                continue
            tried = list(tried_nodes(result))
            self.ranks.record((proposed.ranks[node], won) for node, won in tried)
            if proposed.scores_known:
                first = [(node, won) for node, won in tried if proposed.ranks[node] == 0]
                self.sharpness.record((proposed.confidence[node], won) for node, won in first)

    def drop(self, seq_id: str) -> None:
        self._proposed.pop(seq_id, None)

    def stats(self) -> dict[str, Any]:
        return {"rank_acceptance": self.ranks.estimates(), "sharpness": self.sharpness.value}

    def _catch_up_rows(self, row: DraftRequest) -> Rows:
        computed = row.root_position if self.kv_owner is None else row.num_draft_computed
        start = min(computed, row.root_position)
        return Rows(self._fit(row.token_ids[start:]), start, row.block_table)

    def _fit(self, token_ids: Sequence[int]) -> Sequence[int]:
        """Ids of padding rows that only the target has are read as the draft's last: a poor guess,
        never a wrong output."""
        if self.runner.vocab_size >= self.target_vocab_size:
            return token_ids
        last = self.runner.vocab_size - 1
        return [min(token_id, last) for token_id in token_ids]

    def _proposal(self, draft: Chain | TreeBuilder) -> Proposal | None:
        proposal, ranks = draft.finish(self.kv_owner, with_draft_probs=not self.shares_noise)
        if proposal is not None:
            known = draft.sampling.uses_sharpness
            self._proposed[draft.row.seq_id] = _Proposed(ranks, proposal.confidence or (), known)
        return proposal
