"""Estimates acceptance by how often drafts with similar evidence were accepted.

A drafter without a model has no probabilities of its own. It has evidence: how long the match was,
how often the continuation was seen, how deep the node is. Each kind of evidence is a key, and the
estimate is the mean of a Beta distribution: (prior + accepted) / (prior weight + tried).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING

from folospec.core.token_tree import ROOT

if TYPE_CHECKING:
    from folospec.spec.drafters.base import StepResult


class AcceptanceTable:
    """Counts of tried and accepted nodes by key. A node counts as tried if its parent was accepted:
    what is estimated is the chance of a node given its parent.

    Args:
        prior: the estimate before anything was seen, in (0, 1).
        weight: how many trials the prior is worth.
        limit: most keys; beyond it new keys share one entry.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, prior: float = 0.5, weight: float = 4.0, limit: int = 4096) -> None:
        if not 0.0 < prior < 1.0:
            raise ValueError(f"prior must be in (0, 1), got {prior}")
        if weight <= 0.0:
            raise ValueError(f"weight must be above 0, got {weight}")
        self._prior, self._weight, self._limit = prior, weight, limit
        self._counts: dict[Hashable, list[float]] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def estimate(self, key: Hashable, prior: float | None = None) -> float:
        """The chance that a node of this kind is accepted, given its parent; `prior` replaces the
        table's for a kind that has an expectation of its own."""
        tried, accepted = self._counts.get(self._place(key), (0.0, 0.0))
        expected = self._prior if prior is None else prior
        return (expected * self._weight + accepted) / (self._weight + tried)

    def record(self, key: Hashable, accepted: bool) -> None:
        """Count one node whose parent was accepted."""
        counts = self._counts.setdefault(self._place(key), [0.0, 0.0])
        counts[0] += 1.0
        counts[1] += accepted

    def _place(self, key: Hashable) -> Hashable:
        return key if key in self._counts or len(self._counts) < self._limit else None


def tried_nodes(result: StepResult) -> Iterator[tuple[int, bool]]:
    """The drafter's own nodes that were put to the test, and whether each was accepted: those whose
    parent is the root or was accepted."""
    if result.proposal is None or result.verdict is None:
        return
    tree, path = result.proposal.tree, {ROOT, *result.verdict.path}
    for own, node in result.own_nodes.items():
        if tree.parents[node] in path and result.proposal.is_candidate(node):
            yield own, node in path


def share_among_siblings(parents: Sequence[int], chances: Sequence[float]) -> list[float]:
    """Scale down the chances of siblings where they add up to more than 1: at most one of them is
    accepted."""
    totals = dict.fromkeys(parents, 0.0)
    for parent, chance in zip(parents, chances, strict=True):
        totals[parent] += chance
    return [
        c / total if (total := totals[p]) > 1.0 else c
        for p, c in zip(parents, chances, strict=True)
    ]
