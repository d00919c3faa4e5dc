"""Prompt lookup: copy what followed the last time these tokens were seen (LLMA, arXiv 2304.04487;
prompt lookup decoding).

The last n tokens of the sequence are looked up among its own earlier tokens, n from
`prompt_lookup_max` down to `prompt_lookup_min`; of several places the most recent counts, and what
follows it is the draft. A copy that runs into the end of the sequence goes on with its own drafts,
so a repeated pattern is continued at any length.
"""

from __future__ import annotations

from collections.abc import Sequence

from folospec.core.token_tree import TokenTree
from folospec.spec.drafters.base import Drafter, DrafterContext, DraftRow
from folospec.spec.proposal import Proposal


class NgramIndex:
    """Where each n-gram of one sequence was last continued: n-gram -> index of the token after it.

    It follows a sequence as it grows, at a cost of O(new tokens), whatever the length of the
    context.
    """

    def __init__(self, min_n: int, max_n: int) -> None:
        self.min_n, self.max_n = min_n, max_n
        self._next: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def update(self, token_ids: Sequence[int]) -> None:
        """Index the n-grams that have a token after them; those that end the sequence have none
        yet."""
        for end in range(self._num_indexed, len(token_ids) - 1):
            for n in range(self.min_n, min(self.max_n, end + 1) + 1):
                self._next[tuple(token_ids[end + 1 - n : end + 1])] = end + 1
        self._num_indexed = max(self._num_indexed, len(token_ids) - 1)

    def lookup(self, token_ids: Sequence[int]) -> int | None:
        """Return where the longest matching suffix was last continued."""
        for n in range(min(self.max_n, len(token_ids)), self.min_n - 1, -1):
            found = self._next.get(tuple(token_ids[-n:]))
            if found is not None:
                return found
        return None


class NgramDrafter(Drafter):
    """Drafts chains by prompt lookup. State: an n-gram index per sequence, which only ever sees
    committed tokens."""

    def __init__(self, context: DrafterContext) -> None:
        super().__init__(context)
        context.refuse_model()
        options = context.read_options({"prompt_lookup_min": 2, "prompt_lookup_max": 4})
        self.min_n, self.max_n = options["prompt_lookup_min"], options["prompt_lookup_max"]
        for name, value in options.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.min_n > self.max_n:
            raise ValueError(
                f"prompt_lookup_min must be at most prompt_lookup_max={self.max_n}, got "
                f"{self.min_n}"
            )
        self._indexes: dict[str, NgramIndex] = {}

    def propose(self, rows: list[DraftRow]) -> list[Proposal | None]:
        return [self._propose(row) for row in rows]

    def _propose(self, row: DraftRow) -> Proposal | None:
        index = self._indexes.get(row.seq_id)
        if index is None:
            index = self._indexes[row.seq_id] = NgramIndex(self.min_n, self.max_n)
        index.update(row.token_ids)
        source = index.lookup(row.token_ids)
        if source is None:
            return None
        known = len(row.token_ids)
        draft_token_ids: list[int] = []
        for place in range(source, source + min(row.max_draft_tokens, row.max_depth)):
            draft_token_ids.append(
                row.token_ids[place] if place < known else draft_token_ids[place - known]
            )
        return Proposal(TokenTree.chain(draft_token_ids))

    def drop(self, seq_id: str) -> None:
        self._indexes.pop(seq_id, None)
