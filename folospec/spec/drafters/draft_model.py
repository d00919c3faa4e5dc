"""A small model drafts for a large one (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv
2302.01318).

The draft model has its own KV tensors on the target's block tables and its own progress per
sequence. Before it drafts it runs whatever committed tokens it has not seen: the last one or two as
a rule, more after it was off, preempted, or met a cached prefix.

    tokens      t0 t1 t2 t3 t4 | root       progress 3: t3, t4 and the root are caught up in one
    pass, draft KV     *  *  *  .  . |  .         then x1, x2, ... are fed one at a time at the
    slots after the root; drafts                     |  x1 x2 x3  x3 is proposed and never fed, so
    it has no draft KV.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from folospec.core.token_tree import TokenTree
from folospec.sampling import noise
from folospec.sampling.constraints import SamplingRow
from folospec.sampling.noise import Purpose
from folospec.sampling.pipeline import process
from folospec.sampling.sampler import draw_target
from folospec.spec.draft_runner import Rows
from folospec.spec.drafters.base import Drafter, DrafterContext, DraftRow, read_options
from folospec.spec.proposal import Proposal


class DraftModelDrafter(Drafter):
    """Drafts chains with a causal language model that has the target's vocabulary.

    Drafts are drawn through the request's own sampling pipeline. Under `coupled` they look the
    target's noise up, so that draft and target agree whenever their laws nearly do (Daliri et al.,
    arXiv 2408.07978); under `rejection` and `block` they have noise of their own, as those rules
    demand. `greedy_drafts=True` proposes the arg-max instead, as a one-hot law.
    """

    def __init__(self, context: DrafterContext) -> None:
        super().__init__(context)
        if context.config.model is None:
            raise ValueError(
                "speculative method 'draft_model' needs the draft model's path or name as "
                "'model', got None"
            )
        options = read_options("draft_model", context.config.options, {"greedy_drafts": False})
        self.greedy_drafts = bool(options["greedy_drafts"])
        self.coupled = context.config.acceptance == "coupled"
        self.target_vocab_size = context.vocab_size
        self.runner = context.load_draft_model(context.config.model, self.kv_owner)

    @property
    def kv_owner(self) -> str:
        return "draft_model"

    def propose(self, rows: list[DraftRow]) -> list[Proposal | None]:
        drafts: list[list[int]] = [[] for _ in rows]
        laws: list[list[Tensor]] = [[] for _ in rows]
        logits = self._forward([self._catch_up_rows(row) for row in rows])
        for row in rows:
            row.num_draft_computed = len(row.token_ids)
        active = list(range(len(rows)))
        while active:
            log_probs = self._draft_law(
                logits, [rows[i] for i in active], [drafts[i] for i in active]
            )
            token_ids = self._draw(
                log_probs, [rows[i] for i in active], [drafts[i] for i in active]
            )
            for i, token_id, law in zip(active, token_ids, log_probs.exp(), strict=True):
                drafts[i].append(token_id)
                laws[i].append(law)
            active = [i for i in active if len(drafts[i]) < rows[i].max_draft_tokens]
            if active:
                logits = self._forward([self._next_rows(rows[i], drafts[i]) for i in active])
        return [self._proposal(d, law) for d, law in zip(drafts, laws, strict=True)]

    def _catch_up_rows(self, row: DraftRow) -> Rows:
        # The root is fed even where its KV exists: its logits are the first draft's.
        start = min(row.num_draft_computed, row.root_position)
        return Rows(self._fit(row.token_ids[start:]), start, row.block_table)

    def _next_rows(self, row: DraftRow, drafts: list[int]) -> Rows:
        return Rows(self._fit(drafts[-1:]), row.root_position + len(drafts), row.block_table)

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

    def _draft_law(self, logits: Tensor, rows: list[DraftRow], drafts: list[list[int]]) -> Tensor:
        """Log-probabilities float [num_rows, vocab_size] of the next draft token, each row with its
        own history."""
        sampling_rows = [
            SamplingRow(
                params=row.params,
                prompt_token_ids=row.token_ids[: row.num_prompt_tokens],
                output_token_ids=row.token_ids[row.num_prompt_tokens :],
                draft_token_ids=draft,
            )
            for row, draft in zip(rows, drafts, strict=True)
        ]
        return process(logits, sampling_rows)

    def _draw(self, log_probs: Tensor, rows: list[DraftRow], drafts: list[list[int]]) -> list[int]:
        if self.greedy_drafts:
            return log_probs.argmax(-1).tolist()
        keys = [self._noise_key(row, len(draft)) for row, draft in zip(rows, drafts, strict=True)]
        return draw_target(log_probs, noise.key_tensor(keys, log_probs.device)).tolist()

    def _noise_key(self, row: DraftRow, num_drafts: int) -> int:
        if self.coupled:
            position, purpose = row.root_position + 1 + num_drafts, int(Purpose.TARGET)
        else:
            position, purpose = row.root_position, noise.purpose_code(Purpose.DRAFT, row=num_drafts)
        return noise.key(row.seed, row.sample_index, position, purpose)

    def _proposal(self, drafts: list[int], laws: list[Tensor]) -> Proposal:
        draft_probs = torch.stack(laws)
        confidence = draft_probs[torch.arange(len(drafts)), torch.tensor(drafts)].tolist()
        return Proposal(
            TokenTree.chain(drafts),
            draft_probs=None if self.greedy_drafts or self.coupled else draft_probs,
            confidence=confidence,
            draft_slots=[*range(1, len(drafts)), None],
        )
