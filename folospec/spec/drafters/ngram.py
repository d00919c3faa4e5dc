"""Drafts what followed the last time these tokens were seen (arXiv 2304.04487).

This is LLMA, or prompt lookup decoding.

The last n tokens of the sequence are looked up among its own earlier tokens, n from
`prompt_lookup_max` down to `prompt_lookup_min`; of several places the most recent counts, and what
follows it is the draft. A copy that runs into the end of the sequence goes on with its own drafts,
so a repeated pattern is continued at any length.

With `num_matches` > 1 that many places are copied from, and the copies are merged into one tree:

    ... a b c d ... a b x y ... a b c e | a b          root -+- c -+- e
                                                             |     `- d
    latest match: c e; then x y; then c d                    `- x --- y

Siblings stand in the order of their matches: the longest first, the most recent first among equals.
The tree grows level by level, so all copies get about as deep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from folospec.core.token_tree import ROOT, TokenTree
from folospec.option_names import OptionNames
from folospec.spec.acceptance import ACCEPTANCE
from folospec.spec.drafters.base import (
    Drafter,
    DrafterContext,
    DraftRequest,
    StepResult,
    check_count,
)
from folospec.spec.proposal import Proposal
from folospec.spec.stores.acceptance_table import AcceptanceTable, share_among_siblings, tried_nodes

_NAMES = OptionNames(
    owner="the ngram drafter",
    same={
        "ngram_prompt_lookup_min": "prompt_lookup_min",
        "ngram_prompt_lookup_max": "prompt_lookup_max",
        "max_matching_ngram_size": "prompt_lookup_max",
    },
)
_Match = tuple[int, int]
"""Index of the token after an n-gram that matches the end of the sequence, and n."""


class NgramIndex:
    """Where each n-gram of one sequence was last continued: n-gram -> indices of the tokens after
    it, the latest first, `num_places` of them at most.

    It follows a sequence as it grows, at a cost of O(new tokens), whatever the length of the
    context.
    """

    def __init__(self, min_n: int, max_n: int, num_places: int = 1) -> None:
        self.min_n, self.max_n, self.num_places = min_n, max_n, num_places
        self._next: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._num_indexed = 0

    def __len__(self) -> int:
        """Different n-grams."""
        return len(self._next)

    def update(self, token_ids: Sequence[int]) -> None:
        """Index the n-grams that have a token after them; those that end the sequence have none
        yet."""
        for end in range(self._num_indexed, len(token_ids) - 1):
            for n in range(self.min_n, min(self.max_n, end + 1) + 1):
                ngram = tuple(token_ids[end + 1 - n : end + 1])
                earlier = self._next.get(ngram, ())
                self._next[ngram] = (end + 1, *earlier[: self.num_places - 1])
        self._num_indexed = max(self._num_indexed, len(token_ids) - 1)

    def lookup(self, token_ids: Sequence[int]) -> list[_Match]:
        """Return where the suffixes were last continued: the longest match first, the latest first
        among equals, each place once, `num_places` in all."""
        lengths: dict[int, int] = {}
        for n in range(min(self.max_n, len(token_ids)), self.min_n - 1, -1):
            for place in self._next.get(tuple(token_ids[-n:]), ()):
                lengths.setdefault(place, n)
            if len(lengths) >= self.num_places:
                break
        return list(lengths.items())[: self.num_places]


class NgramDrafter(Drafter):
    """Drafts by prompt lookup: chains, or trees of several matches. State: an n-gram index per
    sequence, which only ever sees committed tokens.

    Options:
        prompt_lookup_min, prompt_lookup_max: shortest and longest match.
        num_matches: most places that are copied from; 1 makes chains. More places have a larger
            budget of nodes by default.

    Raises:
        ValueError: an option is out of range, or asks for trees under a rule for chains.
    """

    def __init__(self, context: DrafterContext) -> None:
        super().__init__(context)
        context.refuse_model()
        options = context.read_options(
            {"prompt_lookup_min": 2, "prompt_lookup_max": 4, "num_matches": 1}, _NAMES
        )
        self.min_n, self.max_n = options["prompt_lookup_min"], options["prompt_lookup_max"]
        self.num_matches = options["num_matches"]
        for name, value in options.items():
            check_count(name, value)
        if self.min_n > self.max_n:
            raise ValueError(
                f"prompt_lookup_min must be at most prompt_lookup_max={self.max_n}, got "
                f"{self.min_n}"
            )
        if self.num_matches > 1 and not ACCEPTANCE[context.acceptance].takes_trees:
            raise ValueError(
                f"num_matches must be 1 with acceptance={context.acceptance!r}, which verifies "
                f"chains, got {self.num_matches}"
            )
        self.default_num_speculative_tokens *= self.num_matches
        self._indexes: dict[str, NgramIndex] = {}
        self._evidence: dict[str, list[tuple[int, int, int]]] = {}
        """Per node of a sequence's last draft: match length, rank among siblings, depth."""
        self._acceptance = AcceptanceTable()

    def propose(self, requests: list[DraftRequest]) -> list[Proposal | None]:
        return [self._propose(row) for row in requests]

    def _propose(self, row: DraftRequest) -> Proposal | None:
        index = self._indexes.get(row.seq_id)
        if index is None:
            index = self._indexes[row.seq_id] = NgramIndex(self.min_n, self.max_n, self.num_matches)
        index.update(row.token_ids)
        matches = index.lookup(row.token_ids)
        if not matches:
            return None
        tree, evidence = _merged_copies(row, matches)
        self._evidence[row.seq_id] = evidence
        chances = [self._acceptance.estimate(kind) for kind in evidence]
        return Proposal(tree, confidence=share_among_siblings(tree.parents, chances))

    def observe(self, results: list[StepResult]) -> None:
        for result in results:
            evidence = self._evidence.pop(result.seq_id, [])
            for node, accepted in tried_nodes(result):
                self._acceptance.record(evidence[node], accepted)

    def drop(self, seq_id: str) -> None:
        self._indexes.pop(seq_id, None)
        self._evidence.pop(seq_id, None)

    def stats(self) -> dict[str, Any]:
        return {"num_ngrams": sum(len(index) for index in self._indexes.values())}


def _merged_copies(
    row: DraftRequest, matches: list[_Match]
) -> tuple[TokenTree, list[tuple[int, int, int]]]:
    """Copy from all places at once, a level at a time; equal paths are one. Evidence per node."""
    known = len(row.token_ids)
    nodes: dict[tuple[int, int], int] = {}  # (parent, token) -> node
    num_children: dict[int, int] = {}
    evidence: list[tuple[int, int, int]] = []
    copies = [(place, length, ROOT, list[int]()) for place, length in matches]
    for depth in range(row.max_depth):
        if not copies:
            break
        growing = []
        for place, length, parent, copied in copies:
            source = place + depth
            token_id = row.token_ids[source] if source < known else copied[source - known]
            if (parent, token_id) not in nodes:
                if len(nodes) == row.max_draft_tokens:
                    continue
                rank = num_children.get(parent, 0)
                num_children[parent] = rank + 1
                nodes[parent, token_id] = len(nodes)
                evidence.append((length, min(rank, 3), min(depth, 7)))
            copied.append(token_id)
            growing.append((place, length, nodes[parent, token_id], copied))
        copies = growing
    return TokenTree([t for _, t in nodes], [parent for parent, _ in nodes]), evidence
