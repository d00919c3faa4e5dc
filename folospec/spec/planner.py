"""How many tokens to draft for each sequence. Core is told integers; what they rest on stays here.

A length may depend on what was accepted before, never on the tokens being drafted: under
`rejection` and `block` a length that looked at them would change the law of the output.
"""

from __future__ import annotations


class Planner:
    """A fixed number of draft tokens, or per sequence an adaptive one: two more after a draft that
    was accepted whole, one less after any other, between 1 and the limit (the schedule of
    transformers' assisted generation).

    Args:
        limit: most draft tokens per sequence and step, of all drafters together.
        adaptive: whether the number follows the acceptance.
    """

    def __init__(self, limit: int, *, adaptive: bool) -> None:
        self._limit, self._adaptive = limit, adaptive
        self._lengths: dict[str, int] = {}

    def draft_length(self, seq_id: str, wanted: int | None) -> int:
        """Return the number of draft tokens; `wanted` is the request's own limit."""
        limit = self._limit if wanted is None else min(wanted, self._limit)
        if self._adaptive:
            limit = min(limit, self._lengths.get(seq_id, self._limit))
        return limit

    def observe(self, seq_id: str, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """Learn from a verified draft."""
        if self._adaptive:
            length = self._lengths.get(seq_id, self._limit)
            change = 2 if num_accepted_tokens == num_draft_tokens else -1
            self._lengths[seq_id] = min(self._limit, max(1, length + change))

    def drop(self, seq_id: str) -> None:
        self._lengths.pop(seq_id, None)
