"""Drafts from candidates that the target did not take in earlier steps (arXiv 2408.08696).

This is Token Recycling (section 3).

    adjacency   a: [b c .]          what the target found likeliest after a, when it last had a row
                b: [d e .]          for a; every verified row is such a row, accepted or not
                c: [b . .]

    tree        root a -+- b -+- d          the same shape at every step, filled by following the
                        |     `- e          matrix from the root: child number r of a node is
                        `- c --- b          candidate number r of its token

The shape holds the nodes that are most likely reached if a candidate of rank r is right with
probability FIRST * FALL^r, given its parent: many children for the first ranks near the root, and a
long branch of first candidates. It is built once, best node first, so that a smaller budget takes a
prefix of it.

The paper decodes one sequence at a time. Here a sequence follows the rows that it saw itself, and
the matrix of the engine, which has the last rows of all sequences, for tokens that are new to it:
with one matrix for a batch, each sequence would write over what the others are about to use.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from folospec.core.token_tree import ROOT, TokenTree
from folospec.spec.acceptance import ACCEPTANCE
from folospec.spec.drafters.base import (
    Drafter,
    DrafterContext,
    DrafterNeeds,
    DraftRequest,
    StepResult,
    check_count,
)
from folospec.spec.proposal import Proposal
from folospec.spec.stores.acceptance_table import AcceptanceTable, share_among_siblings, tried_nodes
from folospec.spec.trees.tree_shapes import sequoia

FIRST, FALL = 0.6, 0.4
"""Chance of the first candidate, given its parent, and of each next one relative to it: with these
they add up to 1."""
UNKNOWN = -1


class TokenRecyclingDrafter(Drafter):
    """Drafts trees from the last candidates after each token.

    Options:
        top_k: candidates kept per token, the most children of a node.
        max_depth: levels of the tree.

    Raises:
        ValueError: an option is out of range.
    """

    default_num_speculative_tokens = 32

    def __init__(self, context: DrafterContext) -> None:
        super().__init__(context)
        context.refuse_model()
        options = context.read_options({"top_k": 8, "max_depth": 6})
        for name, value in options.items():
            check_count(name, value)
        self.top_k = min(options["top_k"], context.vocab_size)
        width = self.top_k if ACCEPTANCE[context.acceptance].takes_trees else 1
        self._shape = sequoia(
            [FIRST * FALL**rank for rank in range(width)],
            max_nodes=self.num_speculative_tokens,
            max_depth=options["max_depth"],
        )
        self.default_num_speculative_tokens = len(self._shape)
        self._adjacency = np.full((context.vocab_size, self.top_k), UNKNOWN, dtype=np.int32)
        self._own: dict[str, dict[int, list[int]]] = {}
        """Per sequence, its rows of the matrix."""
        self._roots: dict[str, int] = {}
        self._kinds: dict[str, list[tuple[int, int]]] = {}
        """Per node of a sequence's last draft: depth, rank."""
        self._acceptance = AcceptanceTable()

    @property
    def needs(self) -> DrafterNeeds:
        return DrafterNeeds(num_top_tokens=self.top_k)

    def propose(self, requests: list[DraftRequest]) -> list[Proposal | None]:
        return [self._propose(row) for row in requests]

    def _propose(self, row: DraftRequest) -> Proposal | None:
        self._roots[row.seq_id] = row.token_ids[-1]
        tree, kinds = self._fill_shape(row)
        self._kinds[row.seq_id] = kinds
        if len(tree) == 0:
            return None
        chances = [self._acceptance.estimate(k, prior=FIRST * FALL ** k[1]) for k in kinds]
        return Proposal(tree, confidence=share_among_siblings(tree.parents, chances))

    def _fill_shape(self, row: DraftRequest) -> tuple[TokenTree, list[tuple[int, int]]]:
        """Follow the matrix from the root; what it does not know has no child there."""
        shape = self._shape
        here = {ROOT: ROOT}  # node of the shape -> node
        token_ids: list[int] = []
        parents: list[int] = []
        kinds: list[tuple[int, int]] = []
        own = self._own.setdefault(row.seq_id, {})

        def candidates_after(token_id: int) -> list[int]:
            known = own.get(token_id)
            return self._adjacency[token_id].tolist() if known is None else known

        candidates = {ROOT: candidates_after(self._roots[row.seq_id])}
        for place in range(min(len(shape), row.max_draft_tokens)):
            above, rank, depth = shape.parents[place], shape.token_ids[place], shape.depths[place]
            if above not in here or depth > row.max_depth:
                continue
            if above not in candidates:
                candidates[above] = candidates_after(token_ids[here[above]])
            token_id = candidates[above][rank]
            if token_id != UNKNOWN:
                here[place] = len(token_ids)
                token_ids.append(token_id)
                parents.append(here[above])
                kinds.append((depth, rank))
        return TokenTree(token_ids, parents), kinds

    def observe(self, results: list[StepResult]) -> None:
        for result in results:
            kinds = self._kinds.pop(result.seq_id, [])
            for node, accepted in tried_nodes(result):
                self._acceptance.record(kinds[node], accepted)
            self._recycle(result)
            if result.seq_id in self._roots and result.new_token_ids:
                self._roots[result.seq_id] = result.new_token_ids[-1]

    def _recycle(self, result: StepResult) -> None:
        """Take over the candidates after every verified row; of several rows with one token the
        latest on the accepted path is kept, or else the last."""
        rows: list[tuple[int, int]] = []  # (token, its row)
        if result.seq_id in self._roots:  # else it was never asked about: its root is not known
            rows.append((self._roots[result.seq_id], 0))
        if result.proposal is not None and result.verdict is not None:
            token_ids, path = result.proposal.tree.token_ids, result.verdict.path
            verified = [n for n in range(len(token_ids)) if result.proposal.is_candidate(n)]
            missed = [node for node in verified if node not in path]
            rows = [(token_ids[node], node + 1) for node in missed] + rows
            rows += [(token_ids[node], node + 1) for node in path]
        if result.top_token_ids is None or not rows:
            return
        candidates = result.top_token_ids.tolist()
        latest = {token_id: candidates[row] for token_id, row in rows}
        self._adjacency[list(latest), : len(candidates[0])] = list(latest.values())
        if result.seq_id in self._own:
            self._own[result.seq_id].update(latest)

    def drop(self, seq_id: str) -> None:
        self._roots.pop(seq_id, None)
        self._kinds.pop(seq_id, None)
        self._own.pop(seq_id, None)

    def stats(self) -> dict[str, Any]:
        return {
            "adjacency_bytes": self._adjacency.nbytes,
            "num_own_rows": sum(len(own) for own in self._own.values()),
            "num_known_tokens": int((self._adjacency[:, 0] != UNKNOWN).sum()),
        }
