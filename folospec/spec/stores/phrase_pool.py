"""Stores phrases by their first token: drafters fill it with n-grams and draft from it.

    insert (5 6 7 8), (5 6 9), (7 8 1)      5 -> 6 9 | 6 7 8      the phrase inserted last comes
                                            7 -> 8 1              first

    phrase_tree of what follows 5           6 -+- 9               beginnings that phrases share are
                                               `- 7 - 8           one node

What is bounded forgets what was used longest ago: a token its phrases, the pool its tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from folospec.core.token_tree import ROOT, TokenTree
from folospec.spec.stores.acceptance_table import AcceptanceTable, share_among_siblings

NOTHING = -1
"""In `phrases_said`: the model was not asked, or had nothing to say."""
FIRST_GUESS = 0.5
"""Chance of a node of the latest phrase before any was verified; that of the next one is a half of
it, of the third a third."""


class PhrasePool:
    """First token -> what may follow it.

    Args:
        phrases_per_token: most phrases with the same first token.
        max_first_tokens: most first tokens.

    Raises:
        ValueError: a bound is below 1.
    """

    def __init__(self, phrases_per_token: int, max_first_tokens: int) -> None:
        for name, value in (
            ("phrases_per_token", phrases_per_token),
            ("max_first_tokens", max_first_tokens),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._phrases_per_token, self._max_first_tokens = phrases_per_token, max_first_tokens
        # Dicts keep the order of insertion: what was used longest ago comes first in both.
        self._pool: dict[int, dict[tuple[int, ...], None]] = {}
        self._num_phrases = 0

    def __len__(self) -> int:
        """Number of phrases."""
        return self._num_phrases

    @property
    def num_tokens(self) -> int:
        """Number of first tokens."""
        return len(self._pool)

    def insert(self, phrase: Sequence[int]) -> None:
        """Keep a phrase of at least two tokens, as the one used last."""
        first, rest = phrase[0], tuple(phrase[1:])
        phrases = self._pool.pop(first, {})
        self._num_phrases -= len(phrases)
        phrases.pop(rest, None)
        phrases[rest] = None
        if len(phrases) > self._phrases_per_token:
            del phrases[next(iter(phrases))]
        self._pool[first] = phrases
        self._num_phrases += len(phrases)
        if len(self._pool) > self._max_first_tokens:
            oldest = next(iter(self._pool))
            self._num_phrases -= len(self._pool.pop(oldest))

    def insert_ngrams(self, token_ids: Sequence[int], start: int, n: int) -> None:
        """Keep the n-grams of a text that end at index `start` or later."""
        for end in range(max(start, n - 1), len(token_ids)):
            self.insert(token_ids[end - n + 1 : end + 1])

    def lookup(self, token_id: int) -> list[tuple[int, ...]]:
        """What may follow the token, the phrase inserted last first; the token counts as used."""
        phrases = self._pool.pop(token_id, None)
        if phrases is None:
            return []
        self._pool[token_id] = phrases
        return list(reversed(phrases))


def phrase_tree(
    phrases: Iterable[Sequence[int]], max_nodes: int, max_depth: int
) -> tuple[TokenTree, list[tuple[int, int]]]:
    """Merge phrases into one tree, the first ones first; what does not fit is left out.

    Returns:
        the tree, and for each node the rank of the first phrase that runs through it, and its
        depth.
    """
    token_ids: list[int] = []
    parents: list[int] = []
    kinds: list[tuple[int, int]] = []
    places: dict[tuple[int, int], int] = {}
    for rank, phrase in enumerate(phrases):
        parent = ROOT
        for depth, token_id in enumerate(phrase[:max_depth], start=1):
            place = places.get((parent, token_id))
            if place is None:
                if len(token_ids) >= max_nodes:
                    break
                place = places[parent, token_id] = len(token_ids)
                token_ids.append(token_id)
                parents.append(parent)
                kinds.append((rank, depth))
            parent = place
    return TokenTree(token_ids, parents), kinds


def phrase_confidence(
    tree: TokenTree, kinds: Sequence[tuple[int, int]], acceptance: AcceptanceTable
) -> list[float]:
    """The chance of each node of a phrase tree, given its parent, from what became of its kind."""
    chances = [acceptance.estimate(kind, prior=FIRST_GUESS / (1 + kind[0])) for kind in kinds]
    return share_among_siblings(tree.parents, chances)


def phrases_said(
    tree: TokenTree, said: Sequence[int], nodes: Iterable[int], max_length: int
) -> Iterator[tuple[int, ...]]:
    """The phrases that begin at the given nodes and go on as a model says: from child to child as
    long as one has the token that it says, and that token where none has.

    Args:
        said: [num_nodes] the model's token after each node, or `NOTHING`.
    """
    for begin in nodes:
        phrase, node = [tree.token_ids[begin]], begin
        while said[node] != NOTHING and len(phrase) < max_length:
            phrase.append(said[node])
            agreeing = [c for c in tree.children(node) if tree.token_ids[c] == phrase[-1]]
            if not agreeing:
                break
            node = agreeing[0]
        if len(phrase) > 1:
            yield tuple(phrase)
