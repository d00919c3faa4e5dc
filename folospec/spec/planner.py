"""How much to draft for each sequence. Core is told integers; what they rest on stays here.

The numbers may depend on what was accepted before, never on the tokens being drafted: under
`rejection` and `block` a number that looked at them would change the law of the output.
"""

from __future__ import annotations


class Planner:
    """A fixed number of draft tokens, and per sequence, if adaptive, how deep they may go: two
    levels more after a draft that was accepted to its end, one less after any other, between 1 and
    the limit (the schedule of transformers' assisted generation; a chain's depth is its length).

    Args:
        limit: most draft tokens per sequence and step, of all drafters together.
        adaptive: whether the depth follows the acceptance.
    """

    def __init__(self, limit: int, *, adaptive: bool) -> None:
        self._limit, self._adaptive = limit, adaptive
        self._depths: dict[str, int] = {}

    def num_draft_tokens(self, wanted: int | None) -> int:
        """Most draft tokens of a sequence; `wanted` is the request's own limit."""
        return self._limit if wanted is None else min(wanted, self._limit)

    def max_depth(self, seq_id: str, room: int) -> int:
        """How deep a draft may go, with room for that many tokens before the bonus token."""
        return min(room, self._depths.get(seq_id, self._limit)) if self._adaptive else room

    def observe(self, seq_id: str, depth: int, num_accepted_tokens: int) -> None:
        """Learn from a verified draft of that depth."""
        if self._adaptive:
            change = 2 if num_accepted_tokens == depth else -1
            allowed = self._depths.get(seq_id, self._limit) + change
            self._depths[seq_id] = min(self._limit, max(1, allowed))

    def drop(self, seq_id: str) -> None:
        self._depths.pop(seq_id, None)
