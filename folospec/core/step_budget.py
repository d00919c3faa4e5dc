"""Counts the tokens of a step that are left to give away."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from folospec.core.sequence import Sequence

LONG_PROMPT = 256
"""A sequence with more tokens is a long prompt until it has caught up. A shorter one delays others
once, by one step."""


def decodes(seq: Sequence) -> bool:
    """Whether all but its last token is computed."""
    return seq.num_tokens - seq.num_computed_tokens == 1


@dataclass(slots=True)
class StepBudget:
    """What is left of a step, for all sequences and for long prompts, which have no limit of their
    own at first."""

    num_tokens: int
    num_long_tokens: int | None = None

    def limit_long(self, num_tokens: int, running: Iterable[Sequence]) -> None:
        """Leave so many tokens to long prompts, all together, if one of these sequences decodes."""
        if any(map(decodes, running)):
            self.num_long_tokens = num_tokens

    def of(self, seq: Sequence) -> int:
        """Most tokens that a sequence may run."""
        if self.num_long_tokens is None or not _is_long(seq):
            return self.num_tokens
        return min(self.num_tokens, self.num_long_tokens)

    def take(self, seq: Sequence, num_tokens: int) -> None:
        """A sequence is about to run so many."""
        self.num_tokens -= num_tokens
        if self.num_long_tokens is not None and _is_long(seq):
            self.num_long_tokens -= num_tokens


def _is_long(seq: Sequence) -> bool:
    return seq.num_tokens > LONG_PROMPT and not decodes(seq)
