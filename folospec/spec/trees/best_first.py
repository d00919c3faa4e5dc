"""Grows trees at their most likely node, where evidence gives probabilities at no cost.

root -- a .9 -- b .8      the next node is always the one with the highest joint chance, the
  `---- c .1              product along its path: a (.9), b (.72), ... and at last c (.1)
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from folospec.core.token_tree import ROOT
from folospec.spec.acceptance import ACCEPTANCE

State = TypeVar("State")


@dataclass(slots=True)
class Grown(Generic[State]):
    """The nodes of a tree in the order in which they were added; parents come first."""

    token_ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    joint: list[float] = field(default_factory=list)
    """Chance of each node and all above it."""
    states: list[State] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.token_ids)


def grow_best_first(
    root: State,
    children: Callable[[State], Iterable[tuple[int, float, State]]],
    *,
    max_nodes: int,
    max_depth: int,
    min_joint: float,
    is_chain: bool,
) -> Grown[State]:
    """Add the likeliest node until the budget is spent, or none has a joint chance of `min_joint`.

    Args:
        children: from the state of a node to its children: token id, chance given the node, state.
            Of equally likely ones the first is preferred; no two may have the same token.
        is_chain: give every node one child at most, the likeliest.
    """
    grown: Grown[State] = Grown()
    heap: list[tuple[float, int, int, int, int, State]] = []
    num_seen = 0

    def offer(state: State, parent: int, joint: float, depth: int) -> None:
        nonlocal num_seen
        if depth > max_depth:
            return
        found = list(children(state))
        if is_chain and found:
            found = [max(found, key=lambda child: child[1])]
        for token_id, chance, after in found:
            if joint * chance >= min_joint:
                num_seen += 1  # orders what is equally likely, and keeps states from being compared
                heapq.heappush(heap, (-joint * chance, num_seen, token_id, parent, depth, after))

    if max_nodes > 0:
        offer(root, ROOT, 1.0, 1)
    while heap and len(grown) < max_nodes:
        negative, _, token_id, parent, depth, state = heapq.heappop(heap)
        grown.token_ids.append(token_id)
        grown.parents.append(parent)
        grown.joint.append(-negative)
        grown.states.append(state)
        if len(grown) < max_nodes:
            offer(state, len(grown) - 1, -negative, depth + 1)
    return grown


def read_tree_option(tree: object, acceptance: str) -> bool:
    """Whether to draft trees: as the option `tree` says, None being where the rule takes them.

    Raises:
        ValueError: it is no bool, or the rule verifies chains.
    """
    takes_trees = ACCEPTANCE[acceptance].takes_trees
    if tree is None:
        return takes_trees
    if not isinstance(tree, bool):
        raise ValueError(f"tree must be None, True or False, got {tree!r}")
    if tree and not takes_trees:
        raise ValueError(f"acceptance={acceptance!r} verifies chains, got tree=True")
    return tree
