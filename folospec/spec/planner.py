"""How many tokens to draft for each sequence. Core is told integers; what they rest on stays here.

A length may depend on what was accepted before, never on the tokens being drafted: under
`rejection` and `block` a length that looked at them would change the law of the output.
"""

from __future__ import annotations

from folospec.config import SpeculativeConfig


class Planner:
    """A fixed draft length, or per sequence an adaptive one: two more after a draft that was
    accepted whole, one less after any other, between 1 and `num_speculative_tokens` (the schedule
    of transformers' assisted generation)."""

    def __init__(self, config: SpeculativeConfig | None) -> None:
        self._limit = config.num_speculative_tokens if config else 0
        self._adaptive = config.adaptive if config else False
        self._lengths: dict[str, int] = {}

    def draft_length(self, seq_id: str, wanted: int | None, room: int) -> int:
        """Return the number of draft tokens: `wanted` is the request's own limit, `room` what it
        has left to generate."""
        limit = self._limit if wanted is None else min(wanted, self._limit)
        if self._adaptive:
            limit = min(limit, self._lengths.get(seq_id, self._limit))
        return max(0, min(limit, room))

    def observe(self, seq_id: str, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """Learn from a verified draft."""
        if self._adaptive:
            length = self._lengths.get(seq_id, self._limit)
            change = 2 if num_accepted_tokens == num_draft_tokens else -1
            self._lengths[seq_id] = min(self._limit, max(1, length + change))

    def drop(self, seq_id: str) -> None:
        self._lengths.pop(seq_id, None)
