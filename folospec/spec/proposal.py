"""Defines what a drafter proposes for one sequence: a token tree and its draft distributions.

A proposal knows nothing of KV, requests or batches. It is made in `propose`, may lose nodes to the
planner, and is verified by one of the rules in `spec.verify`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from folospec.core.token_tree import TokenTree


@dataclass(frozen=True, slots=True)
class Proposal:
    """Draft tokens of one sequence, as nodes of a tree under its last committed token. Lists become
    tuples; the engine checks and copies what a drafter hands over, see `spec.checks`.

    Siblings are tried in row order. Under the rules `rejection` and `block` that order must be the
    order in which they were drawn, and every row of `draft_probs` must be the distribution that its
    node was drawn from; where either is wrong, the output no longer has the target's distribution.
    Under `coupled` neither matters.

    Raises:
        ValueError: a list or tensor does not fit the tree; the message says which and how.
    """

    tree: TokenTree
    draft_probs: torch.Tensor | None = None  # [num_nodes, vocab_size], float
    """Row i is the distribution that node i was drawn from, given its context *and its earlier
    siblings*: the same row for i.i.d. children, earlier siblings zeroed and renormalised for
    children without replacement, one-hot for a child that is a function of its context. None: all
    are one-hot."""
    confidence: Sequence[float] | None = None  # [num_nodes]
    """The chance that a node is accepted, given that its parent was: in [0, 1], as far as the
    drafter can tell before the target's pass. Siblings exclude each other, so theirs add up to at
    most 1. None when it has no opinion."""
    candidate: Sequence[bool] | None = None  # [num_nodes]
    """False: the row is computed but never verified (scratch). None: all are verified."""
    draft_slots: Mapping[str, Sequence[int | None]] = field(default_factory=dict)  # [num_nodes]
    """By KV owner, where the drafter's own KV row of each node lies, as an offset from the root's
    slot index (node i's own row is at i + 1); None for a node it has not run."""
    drafter: str = ""
    """Name of the drafter, for metrics and traces; the engine fills it in."""
    own_nodes: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    """By the name of each drafter that had a part in a merged proposal: node of its own proposal ->
    node of this one. The engine fills it in."""

    def __post_init__(self) -> None:
        num_nodes = len(self.tree)
        if self.confidence is not None:
            confidence = _per_node("confidence", self.confidence, num_nodes)
            object.__setattr__(self, "confidence", confidence)
        if self.candidate is not None:
            candidate = _per_node("candidate", self.candidate, num_nodes)
            object.__setattr__(self, "candidate", candidate)
        own = {
            owner: _per_node(f"draft_slots[{owner!r}]", slots, num_nodes)
            for owner, slots in self.draft_slots.items()
        }
        object.__setattr__(self, "draft_slots", own)
        if self.draft_probs is not None and (
            self.draft_probs.dim() != 2 or self.draft_probs.shape[0] != num_nodes
        ):
            raise ValueError(
                f"draft_probs must have the shape [{num_nodes}, vocab_size], "
                f"got {list(self.draft_probs.shape)}"
            )

    def __len__(self) -> int:
        return len(self.tree)

    def is_candidate(self, node: int) -> bool:
        """Whether the node is verified; one under a scratch node is never reached."""
        return self.candidate is None or self.candidate[node]

    @property
    def num_draft_tokens(self) -> int:
        """Nodes that are verified."""
        return len(self) if self.candidate is None else sum(self.candidate)

    def copy(self) -> Proposal:
        """The same proposal, in which nothing is shared that can be changed."""
        return Proposal(
            tree=TokenTree(self.tree.token_ids, self.tree.parents),
            draft_probs=None if self.draft_probs is None else self.draft_probs.clone(),
            confidence=self.confidence,
            candidate=self.candidate,
            draft_slots=self.draft_slots,
            drafter=self.drafter,
        )

    def prune(self, keep: Iterable[int]) -> Proposal:
        """Keep these nodes, as far as all their ancestors are kept too; their order stays.

        What may decide about a node depends on the rule. Under `coupled`, and for one-hot drafts,
        anything known before the target's forward may. For sampled drafts under `rejection` and
        `block` the decision must not depend on the node's own token, nor on those of its later
        siblings or descendants: dropping a draft because its token is unlikely biases the output.

        Raises:
            ValueError: `keep` names a node that does not exist.
        """
        tree, rows = self.tree.prune(keep)
        return Proposal(
            tree=tree,
            draft_probs=None if self.draft_probs is None else self.draft_probs[rows],
            confidence=_pick(self.confidence, rows),
            candidate=_pick(self.candidate, rows),
            draft_slots={o: [s[row] for row in rows] for o, s in self.draft_slots.items()},
            drafter=self.drafter,
            own_nodes=self._own_nodes_in(rows),
        )

    def _own_nodes_in(self, rows: list[int]) -> dict[str, dict[int, int]]:
        place = {node: index for index, node in enumerate(rows)}
        return {
            name: {own: place[node] for own, node in nodes.items() if node in place}
            for name, nodes in self.own_nodes.items()
        }


def _per_node(name: str, values: Iterable, num_nodes: int) -> tuple:
    values = tuple(values)
    if len(values) != num_nodes:
        raise ValueError(
            f"{name} must have one entry for each of the {num_nodes} nodes, got {len(values)}"
        )
    return values


def _pick(values: Sequence | None, rows: list[int]) -> list | None:
    return None if values is None else [values[row] for row in rows]
