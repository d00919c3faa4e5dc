"""Drafting with a causal language model, whoever it is: a small one with KV of its own, or a
cheaper view of the target that reads the target's KV. The drafters that do so are subclasses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from folospec.core.token_tree import TokenTree
from folospec.sampling import noise
from folospec.sampling.constraints import SamplingRow
from folospec.sampling.noise import Purpose
from folospec.sampling.pipeline import process
from folospec.sampling.sampler import NO_TOKEN, draw_target
from folospec.spec.draft_runner import DraftRunner, Rows
from folospec.spec.drafters.base import Drafter, DrafterContext, DraftRow
from folospec.spec.proposal import Proposal

DRAFTING_OPTIONS: Mapping[str, Any] = {"greedy_drafts": False}
"""The options that every drafter of this kind has, with their defaults."""


@dataclass(slots=True)
class _Chain:
    """The draft of one sequence as it grows: `laws` are log-probabilities [vocab_size] each."""

    row: DraftRow
    token_ids: list[int] = field(default_factory=list)
    laws: list[Tensor] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    ended: bool = False

    @property
    def has_room(self) -> bool:
        return not self.ended and len(self.token_ids) < min(
            self.row.max_draft_tokens, self.row.max_depth
        )

    def sampling_row(self) -> SamplingRow:
        row = self.row
        return SamplingRow(
            params=row.params,
            prompt_token_ids=row.token_ids[: row.num_prompt_tokens],
            output_token_ids=row.token_ids[row.num_prompt_tokens :],
            draft_token_ids=self.token_ids,
            is_draft=True,
        )


class ModelDrafter(Drafter):
    """Drafts with the model behind `runner`.

    Drafts are drawn through the request's own sampling pipeline. Under `coupled` they look the
    target's noise up, so that draft and target agree whenever their laws nearly do (Daliri et al.,
    arXiv 2408.07978); under `rejection` and `block` they have noise of their own, as those rules
    demand. `greedy_drafts=True` proposes the arg-max instead, as a one-hot law.

    Args:
        options: those of `DRAFTING_OPTIONS`, read from the user's.
        runner: without a `kv_owner` its KV is the target's, which always covers the tokens before
            the root.
    """

    def __init__(
        self, context: DrafterContext, options: Mapping[str, Any], runner: DraftRunner
    ) -> None:
        super().__init__(context)
        self.greedy_drafts = options["greedy_drafts"]
        if not isinstance(self.greedy_drafts, bool):
            raise ValueError(f"greedy_drafts must be True or False, got {self.greedy_drafts!r}")
        self.coupled = context.acceptance == "coupled"
        self.stream = context.stream
        self.target_vocab_size = context.vocab_size
        self.runner = runner

    def propose(self, rows: list[DraftRow]) -> list[Proposal | None]:
        chains = [_Chain(row) for row in rows]
        active = chains
        logits = self._forward([self._catch_up_rows(row) for row in rows])
        if self.kv_owner is not None:
            for row in rows:
                row.num_draft_computed = len(row.token_ids)
        while active:
            self._extend(active, logits)
            active = [chain for chain in active if chain.has_room]
            if active:
                logits = self._forward([self._next_rows(chain) for chain in active])
        return [self._proposal(chain) for chain in chains]

    def _extend(self, chains: list[_Chain], logits: Tensor) -> None:
        """Draw the next draft token of each chain; logits are [num_chains, vocab_size]."""
        log_probs = process(logits, [chain.sampling_row() for chain in chains])
        token_ids = self._draw(log_probs, chains)
        confidence = logits.log_softmax(-1).exp().gather(-1, token_ids.clamp(min=0)[:, None])
        for index, chain in enumerate(chains):
            token_id = int(token_ids[index])
            if token_id == NO_TOKEN:  # the request's options leave nothing to draft here
                chain.ended = True
            else:
                chain.token_ids.append(token_id)
                chain.laws.append(log_probs[index])
                chain.confidence.append(float(confidence[index]))

    def _catch_up_rows(self, row: DraftRow) -> Rows:
        # The root is fed even where its KV exists: its logits are the first draft's.
        computed = row.root_position if self.kv_owner is None else row.num_draft_computed
        start = min(computed, row.root_position)
        return Rows(self._fit(row.token_ids[start:]), start, row.block_table)

    def _next_rows(self, chain: _Chain) -> Rows:
        start = chain.row.root_position + len(chain.token_ids)
        return Rows(self._fit(chain.token_ids[-1:]), start, chain.row.block_table)

    def _fit(self, token_ids: Sequence[int]) -> list[int]:
        """Ids of padding rows that only the target has are read as the draft's last: a poor guess,
        never a wrong output."""
        last = self.runner.vocab_size - 1
        return [min(token_id, last) for token_id in token_ids]

    def _forward(self, batch: list[Rows]) -> Tensor:
        logits = self.runner.forward(batch).logits
        missing = self.target_vocab_size - logits.shape[-1]
        return (
            torch.nn.functional.pad(logits, (0, missing), value=-torch.inf) if missing else logits
        )

    def _draw(self, log_probs: Tensor, chains: list[_Chain]) -> Tensor:
        if self.greedy_drafts:
            possible = log_probs.amax(-1) > -torch.inf
            return torch.where(possible, log_probs.argmax(-1), NO_TOKEN)
        keys = [self._noise_key(chain.row, len(chain.token_ids)) for chain in chains]
        return draw_target(log_probs, noise.key_tensor(keys, log_probs.device))

    def _noise_key(self, row: DraftRow, num_drafts: int) -> int:
        if self.coupled:
            position, purpose = row.root_position + 1 + num_drafts, int(Purpose.TARGET)
        else:
            position, purpose = (
                row.root_position,
                noise.purpose_code(Purpose.DRAFT, row=num_drafts, stream=self.stream),
            )
        return noise.key(row.seed, row.sample_index, position, purpose)

    def _proposal(self, chain: _Chain) -> Proposal | None:
        if not chain.token_ids:
            return None
        one_hot = self.greedy_drafts or self.coupled
        return Proposal(
            TokenTree.chain(chain.token_ids),
            draft_probs=None if one_hot else torch.stack(chain.laws).exp(),
            confidence=chain.confidence,
            draft_slots=self._draft_slots(len(chain.token_ids)),
        )

    def _draft_slots(self, length: int) -> dict[str, list[int | None]]:
        return {} if self.kv_owner is None else {self.kv_owner: [*range(1, length), None]}
