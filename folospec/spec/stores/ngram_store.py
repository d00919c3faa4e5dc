"""Counts what followed each k-gram, and backs off from long contexts to short ones.

These are the multi-level n-grams of ANPD (arXiv 2404.08698, section 3).

    tokens  7 8 9 7 8 5 7 8      n = 3, store "basic"

    context     counts             lookup([7, 8])
    (7, 8)      9: 1, 5: 1   ->    5: as often as 9, and more recent
    (8,)        9: 1, 5: 1         is asked only where the longer context was never seen
    (9,)        7: 1, ...

Two kinds of evidence make the score of a token, and they stay apart: `counts` has what really
followed, 1 for each time; `filler` has what a model found likely there and did not say, for less.
So nothing is counted twice, and a token that is only guessed does not outrank one that was said as
often.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

SCORE_LIMIT = 64
"""A score that comes here halves all of its context: an old habit is outvoted by a new one after 64
occurrences at most."""

FILLER_WEIGHT = 0.5
"""Of the likeliest token; half as much for every further rank. What was said counts 1, so that it
takes two guesses to stand against it."""

STORES = ("basic", "one_level")
"""Stores by name: all context lengths below n with back-off, or n - 1 alone."""


@dataclass(slots=True)
class Continuations:
    """The tokens after one context, and the best of them: of the largest score, and the most recent
    where several have it."""

    counts: dict[int, int] = field(default_factory=dict)
    filler: dict[int, float] = field(default_factory=dict)
    best: int = -1

    def __len__(self) -> int:
        return len(self.counts) + len(self.filler)

    def score(self, token_id: int) -> float:
        return self.counts.get(token_id, 0) + self.filler.get(token_id, 0.0)

    def count(self, token_id: int) -> None:
        """The token followed."""
        self.counts[token_id] = self.counts.get(token_id, 0) + 1
        self._compare(token_id)

    def fill(self, token_ids: Sequence[int], said: int | None) -> None:
        """A model found these tokens likely, the first one most, and said one of them or another:
        that one is counted elsewhere."""
        for rank, token_id in reversed([*enumerate(token_ids)]):  # of equals the likeliest wins
            if token_id != said:
                weight = FILLER_WEIGHT * 0.5**rank
                self.filler[token_id] = self.filler.get(token_id, 0.0) + weight
                self._compare(token_id)

    def _compare(self, token_id: int) -> None:
        score = self.score(token_id)
        if score >= self.score(self.best):
            self.best = token_id
        if score >= SCORE_LIMIT:
            self.counts = {t: count // 2 for t, count in self.counts.items() if count > 1}
            self.filler = {t: w / 2 for t, w in self.filler.items() if w > FILLER_WEIGHT / 2}
            self.best = max([self.best, *self.counts, *self.filler], key=self.score)

    @property
    def doubt(self) -> float:
        """Entropy over the largest it could be with as many different tokens: 0 where one token
        always followed, 1 where all are alike."""
        scores = [self.score(token_id) for token_id in {*self.counts, *self.filler}]
        if len(scores) < 2:
            return 0.0
        total = sum(scores)
        entropy = -sum(score / total * math.log(score / total) for score in scores)
        return min(1.0, entropy / math.log(len(scores)))


@dataclass(frozen=True, slots=True)
class Match:
    """The answer for a context."""

    context_length: int
    """Tokens of the context that were seen before."""
    continuations: Continuations

    @property
    def token_id(self) -> int:
        return self.continuations.best

    @property
    def score(self) -> float:
        return self.continuations.score(self.token_id)

    @property
    def is_filler(self) -> bool:
        """The token never followed; a model found it likely."""
        return self.token_id not in self.continuations.counts


class NgramStore:
    """Counts of k-grams, k from 2 to n. Every operation costs O(n), whatever is stored.

    Args:
        n: length of the longest k-grams; their contexts have n - 1 tokens.
        kind: one of `STORES`.
        max_entries: most pairs of a context and a token, guessed ones included; beyond it the
            contexts that were not used for longest are forgotten.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, n: int, kind: str = "basic", max_entries: int = 100_000) -> None:
        if n < 2:
            raise ValueError(f"n must be at least 2, got {n}")
        if kind not in STORES:
            raise ValueError(f"store must be one of {', '.join(STORES)}, got {kind!r}")
        if max_entries < 1:
            raise ValueError(f"max_entries must be at least 1, got {max_entries}")
        self.n, self.max_entries = n, max_entries
        self._lengths = range(n - 1, 0, -1) if kind == "basic" else range(n - 1, n - 2, -1)
        self._entries: OrderedDict[tuple[int, ...], Continuations] = OrderedDict()
        self._num_entries = 0

    def __len__(self) -> int:
        """Pairs of a context and a token."""
        return self._num_entries

    def update(self, token_ids: Sequence[int], start: int) -> None:
        """Count the tokens from index `start` on, each after the tokens before it."""
        for end in range(max(start, 1), len(token_ids)):
            for key in self._keys(token_ids[max(0, end + 1 - self.n) : end]):
                with self._at(key) as continuations:
                    continuations.count(token_ids[end])

    def fill(
        self, context: Sequence[int], token_ids: Sequence[int], said: int | None = None
    ) -> None:
        """Note the tokens, the likeliest first, that a model could have said after the context;
        the one that it `said` there is left to `update`."""
        if set(token_ids) <= {said}:
            return
        for key in self._keys(context):
            with self._at(key) as continuations:
                continuations.fill(token_ids, said)

    def lookup(self, context: Sequence[int]) -> Match | None:
        """The best token after the longest suffix of the context that was seen."""
        for key in self._keys(context):
            continuations = self._entries.get(key)
            if continuations is not None:
                self._entries.move_to_end(key)
                return Match(len(key), continuations)
        return None

    def count(self, ngram: Sequence[int]) -> int:
        """How often the last token of the n-gram has followed the tokens before it."""
        continuations = self._entries.get(tuple(ngram[:-1]))
        return 0 if continuations is None else continuations.counts.get(ngram[-1], 0)

    def has_gram(self, ngram: Sequence[int]) -> bool:
        """Whether the last token of the n-gram has followed the tokens before it."""
        return self.count(ngram) > 0

    def _keys(self, context: Sequence[int]) -> list[tuple[int, ...]]:
        """The suffixes of a context that have an entry of their own, the longest first."""
        return [tuple(context[-length:]) for length in self._lengths if length <= len(context)]

    @contextmanager
    def _at(self, key: tuple[int, ...]) -> Iterator[Continuations]:
        """The continuations of a context, to be changed; then the bound is kept."""
        continuations = self._entries.setdefault(key, Continuations())
        self._entries.move_to_end(key)
        before = len(continuations)
        yield continuations
        self._num_entries += len(continuations) - before
        while self._num_entries > self.max_entries:
            _, forgotten = self._entries.popitem(last=False)
            self._num_entries -= len(forgotten)
