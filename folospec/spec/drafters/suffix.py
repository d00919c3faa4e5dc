"""SuffixDecoding (arXiv 2411.04975): continue the last tokens as they were continued before, here
or in another request.

Two suffix trees count what has followed what: one of the request itself, prompt and output, and one
of finished requests. Every match of the last p tokens in either tree is a candidate (section 3.2):

    ... x y z | root = z    p = 1   z      -> a (5 of 8), b (3 of 8)      at most f * p + o tokens
                            p = 2   y z    -> a (2 of 2)                  follow a match of p
                            p = 3   x y z  -> a (1 of 1)

Below a match the tree of drafts grows greedily by the estimated probability of its nodes, the
product of the count ratios along the path, as long as it is at least `min_token_prob`. The score of
a draft is the sum of these probabilities, the tokens expected to be accepted; the best one counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folospec.core.token_tree import TokenTree
from folospec.spec.acceptance_table import AcceptanceTable, share_among_siblings, tried_nodes
from folospec.spec.best_first import (
    Grown,
    grow_best_first,
    read_tree_option,
)
from folospec.spec.drafters.base import Drafter, DrafterContext, DraftRow, Outcome, check_count
from folospec.spec.proposal import Proposal
from folospec.spec.suffix_store import SuffixStore, check_token_ids, load_texts, save_texts
from folospec.spec.suffix_tree import (
    BYTES_PER_NODE,
    BYTES_PER_TOKEN,
    Point,
    Reader,
    SuffixTree,
    Writer,
)

_OPTIONS: dict[str, Any] = {
    "max_tree_depth": 64,
    "max_cached_tokens": 100_000,
    "max_spec_factor": 2.0,
    "max_spec_offset": 2.0,
    "min_token_prob": 0.1,
    "min_score": 0.0,
    "tree": None,
    "preload": (),
    "load": None,
}


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
        self.keys: list[tuple] = []
        """Kind of evidence of each node that was proposed last."""

    def update(self, token_ids: Sequence[int]) -> None:
        for place in range(len(self.writer.text), len(token_ids)):
            token_id = token_ids[place]
            self.writer.append(token_id)
            self.reader.append(token_id)


class SuffixDrafter(Drafter):
    """Drafts trees, or chains, from suffix trees.

    Options: `max_tree_depth`, tokens of a match and its draft together; `max_cached_tokens` of
    finished requests, 0 for none; `max_spec_factor` and `max_spec_offset`, draft tokens allowed per
    matched token and besides; `min_token_prob`, the joint probability below which nothing is
    drafted; `min_score`, the score below which the row is left to the next drafter of a list, as
    the paper's hybrid leaves it to a model; `tree`, by default wherever the acceptance rule takes
    trees; `preload`, texts or lists of token ids to begin with, and `load`, a file of them that
    `save` wrote::

        llm.drafter("suffix").save("corpus.npz")
        LLM(model, speculative={"method": "suffix", "load": "corpus.npz"})
    """

    default_num_speculative_tokens = 24

    def __init__(self, context: DrafterContext) -> None:
        super().__init__(context)
        context.refuse_model()
        options = context.read_options(_OPTIONS)
        _check(options)
        self.max_depth = options["max_tree_depth"]
        self.spec_factor, self.spec_offset = options["max_spec_factor"], options["max_spec_offset"]
        self.min_token_prob = options["min_token_prob"]
        self.min_score = options["min_score"]
        self.is_chain = not read_tree_option(options["tree"], context.acceptance)
        self.vocab_size = context.vocab_size
        self.store = SuffixStore(self.max_depth, options["max_cached_tokens"])
        self._acceptance = AcceptanceTable()
        self._sequences: dict[str, _Sequence] = {}
        self._fill_store(_read_preload(options["preload"], context))
        if options["load"] is not None:
            self._fill_store(load_texts(options["load"], self.vocab_size))

    def _fill_store(self, texts: list[list[int]]) -> None:
        num_tokens = self.store.num_tokens + sum(len(text) for text in texts)
        if num_tokens > self.store.max_tokens:
            raise ValueError(
                f"max_cached_tokens must be at least the {num_tokens} tokens of preload and load, "
                f"got {self.store.max_tokens}"
            )
        for text in texts:
            self.store.add(text)

    def propose(self, rows: list[DraftRow]) -> list[Proposal | None]:
        return [self._propose(row) for row in rows]

    def _propose(self, row: DraftRow) -> Proposal | None:
        sequence = self._sequences.get(row.seq_id)
        if sequence is None:
            sequence = _Sequence(self.max_depth, self.store.tree)
            self._sequences[row.seq_id] = sequence
        sequence.update(row.token_ids)
        match, grown = self._best_draft(row, sequence)
        if match is None:
            return None
        if match.source == "shared":
            self.store.touch(match.point.node.text)
        keys, chances = [], []
        for state in grown.states:
            ratio = state.count / (state.total + 1)  # once out of once is no certainty
            keys.append((match.source, match.length.bit_length(), round(8 * ratio)))
            chances.append(self._acceptance.estimate(keys[-1], prior=ratio))
        sequence.keys = keys
        return Proposal(
            TokenTree(grown.token_ids, grown.parents),
            confidence=share_among_siblings(grown.parents, chances),
        )

    def _best_draft(
        self, row: DraftRow, sequence: _Sequence
    ) -> tuple[Match | None, Grown[Continuation]]:
        """The draft with the highest score; of equal ones that with the longest match, and of these
        the request's own."""
        best: Match | None = None
        draft: Grown[Continuation] = Grown()
        best_score = 0.0
        matches = list(self._matches(row, sequence))
        for match in sorted(matches, key=lambda m: (-m.bound, -m.length)):
            if match.bound <= best_score:
                break
            grown = grow_best_first(
                Continuation(match.point),
                _children,
                max_nodes=match.max_nodes,
                max_depth=match.bound,
                min_joint=self.min_token_prob,
                is_chain=self.is_chain,
            )
            score = sum(grown.joint)
            if score > best_score:
                best, draft, best_score = match, grown, score
        return (best, draft) if best_score >= self.min_score else (None, Grown())

    def _matches(self, row: DraftRow, sequence: _Sequence) -> Iterator[Match]:
        for source, points in (
            ("request", sequence.writer.points),
            ("shared", sequence.reader.points),
        ):
            for point in points:
                length = point.depth
                allowed = math.floor(self.spec_factor * length + self.spec_offset)
                max_nodes = min(allowed, row.max_draft_tokens)
                bound = min(max_nodes, row.max_depth, self.max_depth - length)
                yield Match(point, length, source, max_nodes, bound)

    def observe(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            sequence = self._sequences.get(outcome.seq_id)
            if sequence is not None:
                for node, accepted in tried_nodes(outcome):
                    self._acceptance.record(sequence.keys[node], accepted)

    def finish(self, seq_id: str, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Keep the output, behind as much of the prompt as a match can reach back, so that the same
        prompt finds it from the first token on."""
        if len(token_ids) > num_prompt_tokens:
            self.store.add(token_ids[max(0, num_prompt_tokens - self.max_depth) :])

    def drop(self, seq_id: str) -> None:
        self._sequences.pop(seq_id, None)

    def save(self, path: str | Path) -> None:
        """Write the texts of finished requests to a file that the option `load` takes."""
        save_texts(path, self.store.texts, self.vocab_size)

    def stats(self) -> dict[str, Any]:
        trees = [sequence.writer for sequence in self._sequences.values()]
        num_nodes = self.store.tree.num_nodes + sum(writer.tree.num_nodes for writer in trees)
        num_tokens = self.store.num_tokens + sum(len(writer.text) for writer in trees)
        return {
            "num_stored_requests": len(self.store),
            "num_stored_tokens": self.store.num_tokens,
            "num_stored_nodes": self.store.tree.num_nodes,
            "num_evictions": self.store.num_evictions,
            "num_sequences": len(trees),
            "num_tokens": num_tokens,
            "num_nodes": num_nodes,
            "num_bytes": num_tokens * BYTES_PER_TOKEN + num_nodes * BYTES_PER_NODE,
        }


def _children(state: Continuation) -> Iterator[tuple[int, float, Continuation]]:
    for token_id, count, total, point in state.point.continuations():
        yield token_id, count / total, Continuation(point, count, total)


def _check(options: dict[str, Any]) -> None:
    for name, least in (("max_tree_depth", 2), ("max_cached_tokens", 0)):
        check_count(name, options[name], least)
    unbounded = ("max_spec_factor", "max_spec_offset", "min_score")
    for name, most in (*((name, None) for name in unbounded), ("min_token_prob", 1)):
        value = options[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name} must be a number, got {value!r}")
        if not (0 <= value < math.inf if most is None else 0 <= value <= most):
            wanted = "finite and at least 0" if most is None else f"in [0, {most}]"
            raise ValueError(f"{name} must be {wanted}, got {value!r}")
    longest = options["max_tree_depth"] - 1
    if options["max_spec_factor"] * longest + options["max_spec_offset"] < 1:
        raise ValueError(
            "max_spec_factor and max_spec_offset must allow a token after a match of "
            f"{longest}, got {options['max_spec_factor']} and {options['max_spec_offset']}"
        )


def _read_preload(preload: object, context: DrafterContext) -> list[list[int]]:
    """The token ids of each text of the option `preload`."""
    if isinstance(preload, str) or not isinstance(preload, Sequence):
        raise ValueError(f"preload must be a list of texts or token id lists, got {preload!r}")
    texts = []
    for text in preload:
        if isinstance(text, str):
            if context.encode is None:
                raise ValueError("texts in preload need a tokenizer; give token ids instead")
            text = context.encode(text)
        if not isinstance(text, Sequence):
            raise ValueError(f"preload must hold texts or token id lists, got {text!r}")
        check_token_ids(text, context.vocab_size, "preload")
        texts.append(list(text))
    return texts
