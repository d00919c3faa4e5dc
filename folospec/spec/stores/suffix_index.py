"""Answers the suffix drafter from its trees, and takes in finished texts.

    draft(asks)   new tokens go into the sequence's own tree; the best match of its end, there or in
                  the shared tree of finished texts, is continued
    add(text)     a finished text goes into the shared tree, the least recently used ones leave it
    drop(seq_id)  a sequence's own tree goes

`SuffixIndex` says in Python what that means. Where the native kernels run, `make_index` gives their
form of it, whose drafts are the same to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from folospec.kernels import native_suffix
from folospec.kernels.native_suffix import (
    NativeSuffixIndex,
    SuffixAsk,
    SuffixDraft,
    SuffixRules,
    SuffixStats,
)
from folospec.spec.stores.suffix_store import SuffixStore
from folospec.spec.stores.suffix_tree import (
    BYTES_PER_NODE,
    BYTES_PER_TOKEN,
    Point,
    Reader,
    SuffixTree,
    Writer,
)
from folospec.spec.trees.best_first import Grown, grow_best_first


@dataclass(slots=True)
class Continuation:
    """A point of a suffix tree that a draft has reached, and the counts on the way there."""

    point: Point
    count: int = 0
    total: int = 0
    """How often this token, and how often any token, followed the point before."""


@dataclass(slots=True)
class Match:
    """The last `length` tokens of a sequence, found in a tree."""

    point: Point
    length: int
    source: str
    """"request" or "shared"."""
    max_nodes: int
    bound: int
    """No draft from here scores more: as deep as it can be."""


class _Sequence:
    """One sequence's own tree, and its place in the shared one."""

    def __init__(self, max_depth: int, shared: SuffixTree) -> None:
        self.writer = Writer(SuffixTree(max_depth))
        self.reader = Reader(shared)

    def update(self, token_ids: Sequence[int]) -> None:
        for place in range(len(self.writer.text), len(token_ids)):
            token_id = token_ids[place]
            self.writer.append(token_id)
            self.reader.append(token_id)


class SuffixIndex:
    """The trees of the sequences and that of finished texts, in Python.

    Args:
        rules: what matches, and what may be drafted under a match.
    """

    def __init__(self, rules: SuffixRules) -> None:
        self.rules = rules
        self.store = SuffixStore(rules.max_depth, rules.max_tokens)
        self._sequences: dict[str, _Sequence] = {}

    def draft(self, asks: Sequence[SuffixAsk]) -> list[SuffixDraft | None]:
        """Take in the new tokens of every sequence, and find the best draft for it."""
        return [self._draft(ask) for ask in asks]

    def _draft(self, ask: SuffixAsk) -> SuffixDraft | None:
        sequence = self._sequences.get(ask.seq_id)
        if sequence is None:
            sequence = _Sequence(self.rules.max_depth, self.store.tree)
            self._sequences[ask.seq_id] = sequence
        sequence.update(ask.token_ids)
        match, grown = self._best_draft(ask, sequence)
        if match is None:
            return None
        if match.source == "shared":
            self.store.touch(match.point.node.text)
        # Once out of once is no certainty.
        ratios = [state.count / (state.total + 1) for state in grown.states]
        return SuffixDraft(grown.token_ids, grown.parents, ratios, match.length, match.source)

    def _best_draft(
        self, ask: SuffixAsk, sequence: _Sequence
    ) -> tuple[Match | None, Grown[Continuation]]:
        """The draft with the highest score; of equal ones that with the longest match, and of these
        the request's own."""
        best: Match | None = None
        draft: Grown[Continuation] = Grown()
        best_score = 0.0
        matches = list(self._matches(ask, sequence))
        for match in sorted(matches, key=lambda m: (-m.bound, -m.length)):
            if match.bound <= best_score:
                break
            grown = grow_best_first(
                Continuation(match.point),
                _children,
                max_nodes=match.max_nodes,
                max_depth=match.bound,
                min_joint=self.rules.min_joint,
                is_chain=self.rules.is_chain,
            )
            score = 0.0
            for joint in grown.joint:
                score += joint  # one by one: `sum` rounds otherwise from Python 3.12 on
            if score > best_score:
                best, draft, best_score = match, grown, score
        return (best, draft) if best_score >= self.rules.min_score else (None, Grown())

    def _matches(self, ask: SuffixAsk, sequence: _Sequence) -> Iterator[Match]:
        rules = self.rules
        for source, points in (
            ("request", sequence.writer.points),
            ("shared", sequence.reader.points),
        ):
            for point in points:
                length = point.depth
                allowed = rules.spec_factor * length + rules.spec_offset
                max_nodes = math.floor(min(allowed, ask.max_nodes))
                bound = min(max_nodes, ask.max_depth, rules.max_depth - length)
                yield Match(point, length, source, max_nodes, bound)

    def add(self, token_ids: Sequence[int]) -> None:
        """Keep a finished text, and let the least recently used go until all fit."""
        self.store.add(token_ids)

    def drop(self, seq_id: str) -> None:
        """Forget a sequence."""
        self._sequences.pop(seq_id, None)

    @property
    def texts(self) -> list[list[int]]:
        """The token ids of every finished text, the least recently used first."""
        return self.store.texts

    def stats(self) -> SuffixStats:
        """The sizes of the trees; bytes are an estimate."""
        writers = [sequence.writer for sequence in self._sequences.values()]
        num_nodes = self.store.tree.num_nodes + sum(writer.tree.num_nodes for writer in writers)
        num_tokens = self.store.num_tokens + sum(len(writer.text) for writer in writers)
        return SuffixStats(
            num_stored_requests=len(self.store),
            num_stored_tokens=self.store.num_tokens,
            num_stored_nodes=self.store.tree.num_nodes,
            num_evictions=self.store.num_evictions,
            num_sequences=len(writers),
            num_tokens=num_tokens,
            num_nodes=num_nodes,
            num_bytes=num_tokens * BYTES_PER_TOKEN + num_nodes * BYTES_PER_NODE,
        )


def make_index(rules: SuffixRules) -> SuffixIndex | NativeSuffixIndex:
    """An index, native where the kernels are."""
    return native_suffix.make(rules) or SuffixIndex(rules)


def _children(state: Continuation) -> Iterator[tuple[int, float, Continuation]]:
    for token_id, count, total, point in state.point.continuations():
        yield token_id, count / total, Continuation(point, count, total)
