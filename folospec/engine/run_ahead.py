"""Plain decoding that does not come back to the host for every token.

    step by step   pass, draw | host | pass, draw | host | pass, draw | host
    ahead          pass, draw, pass, draw, pass, draw                 | host

The tokens are the same: the same kernels draw them with the same noise. They are committed like a
run of accepted drafts, so that an output may end within it; and their slots are reserved like those
of drafts, so that they are given up first when blocks are short. Beside drafters it is done in the
steps for which the planner wants no drafts.
"""

from __future__ import annotations

from collections.abc import Callable

from folospec.config import EngineConfig
from folospec.core.scheduler import ScheduledSequence
from folospec.core.sequence import Sequence
from folospec.core.token_tree import TokenTree
from folospec.engine.judgement import Judgement
from folospec.engine.request import Request
from folospec.kernels.native_sampling import pack_law
from folospec.spec.draft_runner import ChainLaw, ForwardResult
from folospec.spec.drafters.base import DrafterNeeds
from folospec.spec.verify import Verdict
from folospec.worker.model_runner import ModelRunner

DEFAULT = 8


class RunAhead:
    """Decides how far a step goes, and goes there.

    Args:
        needs: what the drafters want of every pass.
        request_of: the request of a sequence.

    Raises:
        ValueError: it is asked for where it cannot be.
    """

    def __init__(
        self,
        config: EngineConfig,
        target: ModelRunner,
        needs: DrafterNeeds,
        request_of: Callable[[Sequence], Request],
    ) -> None:
        self.target, self._request = target, request_of
        wanted, speculative = config.run_ahead, config.speculative
        obstacle = None
        if target.graphs is None:
            obstacle = "where no CUDA graphs run"
        elif speculative is not None and not speculative.is_adaptive:
            obstacle = "with drafters that are asked in every step"
        elif needs.aux_hidden_state_layers or needs.num_top_tokens:
            obstacle = "with a drafter that reads the target's logits or hidden states"
        elif config.logprobs_mode == "processed_logprobs":
            obstacle = "with logprobs_mode='processed_logprobs'"
        if obstacle is not None and wanted not in (None, 1):
            raise ValueError(f"run_ahead must be None or 1 {obstacle}, got {wanted}")
        self.length = 1 if obstacle is not None else wanted or DEFAULT
        """Most tokens of a step."""

    @property
    def is_on(self) -> bool:
        return self.length > 1

    @property
    def lengths(self) -> list[int]:
        """How far steps go: `length`, and by halves less."""
        found = [self.length]
        while found[-1] > 3:
            found.append(found[-1] // 2)
        return found if self.is_on else []

    def warm_up(self, max_num_seqs: int) -> None:
        """Record what steps will want."""
        if self.is_on:
            self.target.warm_up_run_ahead(max_num_seqs, self.lengths)

    def num_slots(self, seq: Sequence) -> int:
        """How many slots to reserve behind the last token."""
        request = self._request(seq)
        if request.is_constrained or request.needs_logprobs:
            return 0
        return max(0, min(self.length, request.room(seq)) - 1)

    def applies(self, scheduled: list[ScheduledSequence], judgements: list[Judgement]) -> bool:
        """Whether nothing but logits and noise decides, for sequences that all decode."""
        return any(item.num_draft_slots > 0 for item in scheduled) and all(
            item.samples
            and item.num_tokens == judgement.num_draws == 1
            and not judgement.request.is_constrained
            for item, judgement in zip(scheduled, judgements, strict=True)
        )

    def go(
        self,
        scheduled: list[ScheduledSequence],
        judgements: list[Judgement],
        result: ForwardResult,
    ) -> int:
        """Draw what follows the pass, and fill in the verdicts; a sequence without any possible
        token is left to be judged.

        Args:
            result: of the pass over the last token of every sequence.

        Returns:
            Passes that were made for it.
        """
        most = max(1 + item.num_draft_slots for item in scheduled)
        length = next(length for length in [*self.lengths, 1] if length <= most)
        laws = [
            ChainLaw(
                pack_law(j.request.seed, j.seq.sample_index, j.request.filters),
                j.seq.num_tokens,
                1.0,
                min(length, 1 + item.num_draft_slots),
            )
            for item, j in zip(scheduled, judgements, strict=True)
        ]
        drawn = self.target.draw_chains(
            result.logits,
            [j.seq.num_tokens for j in judgements],
            [j.seq.block_table for j in judgements],
            laws,
            as_target=True,
        )
        if drawn is None:
            return 0
        for judgement, token_ids in zip(judgements, drawn.token_ids, strict=True):
            if token_ids:
                judgement.run_ahead = TokenTree.chain(token_ids[:-1])
                path = list(range(len(token_ids) - 1))
                judgement.verdicts = [Verdict(path, token_ids[-1])]
        return length - 1
