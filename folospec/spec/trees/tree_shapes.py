"""Computes the shapes of static draft trees, before any token is drawn.

    expansion([2, 2])      root -+- a -+- a.a       every node of a level has as many children
                                 |     `- a.b
                                 `- b -+- b.a
                                       `- b.b

    sequoia([.6, .2], 4)   root -+- a -+- a.a - a.a.a     the nodes that are most likely reached
                                 `- b

A shape is a `TokenTree` whose token ids are ranks: 0 is a node's first child. Since a shape looks
at no token, any rule may verify what grows in it.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from folospec.core.token_tree import ROOT, TokenTree


def expansion(widths: Sequence[int], max_nodes: int | None = None) -> TokenTree:
    """Every node of depth d has `widths[d]` children (SpecInfer, arXiv 2305.09781, section 3.1).

    Args:
        widths: children of the root, of each of them, and so on.
        max_nodes: keep this many nodes, the ones nearest to the root.
    """
    ranks: list[int] = []
    parents: list[int] = []
    level = [ROOT]
    for width in widths:
        next_level = []
        for parent in level:
            for rank in range(width):
                if len(ranks) == max_nodes:
                    return TokenTree(ranks, parents)
                next_level.append(len(ranks))
                ranks.append(rank)
                parents.append(parent)
        level = next_level
    return TokenTree(ranks, parents)


def sequoia(rank_acceptance: Sequence[float], max_nodes: int, max_depth: int) -> TokenTree:
    """The tree with the greatest expected number of accepted nodes (Sequoia, arXiv 2402.12374,
    section 3.1), where a child of rank r is accepted with probability `rank_acceptance[r]`, given
    its parent.

    A node is reached with the product of the acceptances along its path, and the expectation is the
    sum over the nodes. A child is never likelier than its parent nor than the sibling before it, so
    the best nodes, taken one at a time, always form a tree: no search over shapes is needed.

    Args:
        rank_acceptance: not increasing; its length is the most children a node can have.
        max_nodes, max_depth: the budget.

    Raises:
        ValueError: an acceptance is not in [0, 1], or larger than the one before it.
    """
    check_rank_acceptance(rank_acceptance)
    ranks: list[int] = []
    parents: list[int] = []
    # (-probability, depth, parent, rank): the next child of each node; ties go to the shallow ones.
    heap = [(-rank_acceptance[0], 1, ROOT, 0)] if max_depth > 0 else []
    while heap and len(ranks) < max_nodes:
        negated, depth, parent, rank = heapq.heappop(heap)
        node = len(ranks)
        ranks.append(rank)
        parents.append(parent)
        if rank + 1 < len(rank_acceptance) and rank_acceptance[rank] > 0:
            sibling = negated / rank_acceptance[rank] * rank_acceptance[rank + 1]
            heapq.heappush(heap, (sibling, depth, parent, rank + 1))
        if depth < max_depth:
            heapq.heappush(heap, (negated * rank_acceptance[0], depth + 1, node, 0))
    return TokenTree(ranks, parents)


def check_rank_acceptance(rank_acceptance: Sequence[float]) -> None:
    """Raise ValueError for what cannot be acceptances by rank."""
    ok = isinstance(rank_acceptance, (list, tuple)) and len(rank_acceptance) > 0
    ok = ok and all(isinstance(value, (int, float)) for value in rank_acceptance)
    ok = ok and all(0.0 <= value <= 1.0 for value in rank_acceptance)
    if not ok or any(a < b for a, b in zip(rank_acceptance, rank_acceptance[1:], strict=False)):
        raise ValueError(
            "rank_acceptance must be a list of numbers in [0, 1] that do not increase, got "
            f"{rank_acceptance!r}"
        )
