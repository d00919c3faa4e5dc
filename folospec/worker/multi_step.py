"""Decides how many tokens a plain step decodes before the host looks at them.

    step by step   pass, draw | host | pass, draw | host | pass, draw | host
    multi-step     pass, draw, pass, draw, pass, draw                 | host

The tokens are the same: the same kernels draw them with the same noise. They are committed like a
run of accepted drafts, so that an output may end within it; and their slots are reserved like those
of drafts, so that they are given up first when blocks are short. With drafters, it is done in the
steps for which the planner wants no drafts.
"""

from __future__ import annotations

from collections.abc import Iterable

from folospec.config import EngineConfig
from folospec.core.sequence import Sequence
from folospec.spec.drafters.base import DrafterNeeds
from folospec.worker.model_runner import ModelRunner

DEFAULT = 8


class MultiStep:
    """Decides how many tokens a step decodes; the worker decodes them.

    Args:
        needs: what the drafters want of every pass.

    Raises:
        ValueError: it is asked for where it cannot be.
    """

    def __init__(
        self,
        config: EngineConfig,
        target: ModelRunner,
        needs: DrafterNeeds,
    ) -> None:
        self.target = target
        wanted, speculative = config.multi_step, config.speculative
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
            raise ValueError(f"multi_step must be None or 1 {obstacle}, got {wanted}")
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
            self.target.warm_up_multi_step(max_num_seqs, self.lengths)

    def plan(self, candidates: Iterable[Sequence]) -> dict[str, int]:
        """How many slots to reserve behind the last token of each sequence, by seq_id."""
        return {seq.seq_id: self._num_slots(seq) for seq in candidates}

    def _num_slots(self, seq: Sequence) -> int:
        group = seq.group
        assert group is not None
        if group.sampling.is_constrained or group.needs_logprobs:
            return 0
        return max(0, min(self.length, group.room(seq)) - 1)
