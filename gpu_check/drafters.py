"""Drafters whose acceptance is known beforehand.

One is told what the target will say, and is right with a set probability, token by token:

    plain run      a b c d e f g h i j k l ...
    told drafter   | b c d x f |                  each of the k tokens is right 8 times in 10
    accepted         b c d                        3 of 5, and `e` comes from the target

The other is never right, so that every step is like the one before.
"""

from __future__ import annotations

import random
from typing import Any

from folospec import Drafter, Proposal, register_drafter
from folospec.core.token_tree import TokenTree

ACCEPTANCE = 0.8
FAR = 1231
"""Between the tokens of a wrong draft: no small number, and none that a text counts by."""


class ToldDrafter(Drafter):
    """Drafts chains of what it was told, by prompt, each token wrong with a set probability. Of a
    prompt that it was not told of it drafts nothing."""

    futures: dict[tuple[int, ...], list[int]] = {}
    acceptance = ACCEPTANCE

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self._told: dict[str, list[int]] = {}

    def propose(self, rows: list[Any]) -> list[Proposal | None]:
        return [self._chain(row) for row in rows]

    def _chain(self, row: Any) -> Proposal | None:
        if row.seq_id not in self._told:
            prompt = tuple(row.token_ids[: row.num_prompt_tokens])
            self._told[row.seq_id] = self._with_lies(self.futures.get(prompt, []))
        done = len(row.token_ids) - row.num_prompt_tokens
        length = min(row.max_draft_tokens, row.max_depth)
        chain = self._told[row.seq_id][done : done + length]
        return Proposal(TokenTree.chain(chain)) if chain else None

    def _with_lies(self, future: list[int]) -> list[int]:
        draw = random.Random(repr(future[:8]))
        return [token if draw.random() < self.acceptance else token ^ 1 for token in future]

    def drop(self, seq_id: str) -> None:
        self._told.pop(seq_id, None)


register_drafter("told", ToldDrafter)


class WrongDrafter(Drafter):
    """Drafts chains that are right by chance only: every step of a row then is like the next."""

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self._vocab_size = context.vocab_size

    def propose(self, rows: list[Any]) -> list[Proposal | None]:
        return [self._chain(row) for row in rows]

    def _chain(self, row: Any) -> Proposal | None:
        length, last = min(row.max_draft_tokens, row.max_depth), row.token_ids[-1]
        chain = [(last + FAR * place) % self._vocab_size for place in range(1, length + 1)]
        return Proposal(TokenTree.chain(chain)) if chain else None


register_drafter("wrong", WrongDrafter)


def chains(most: int) -> dict[str, Any]:
    """Drafts of that many rows less one."""
    return {"method": "wrong", "num_speculative_tokens": max(most - 1, 1)}
