"""Chooses how a drafter with a model drafts: a chain or which tree, and how children are drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from operator import mul
from typing import Any

from folospec.core.token_tree import TokenTree
from folospec.spec.acceptance import ACCEPTANCE
from folospec.spec.trees.children import CHILDREN
from folospec.spec.trees.tree_shapes import check_rank_acceptance, expansion, sequoia

DRAFTING_OPTIONS: Mapping[str, Any] = {
    "tree": None,
    "children": None,
    "depth": 6,
    "branching": 4,
    "threshold": 0.0,
    "rank_acceptance": None,
}
"""The options that every drafter with a model has, and their defaults.

    tree             None: a chain. [3, 2, 1]: that many children at each level. "sequoia": the best
                     static tree for the acceptance measured so far. "dynamic": the likeliest nodes.
    children         one of `children.CHILDREN`; None is the best that the rule allows.
    depth            most levels of a sequoia or dynamic tree.
    branching        most children of a node there, and nodes expanded per level of a dynamic tree.
    threshold        a dynamic tree stops growing below this joint probability.
    rank_acceptance  for sequoia: acceptance by rank, instead of the measured one.
"""


MAX_NODES = 1024
"""Of a tree that is given by its widths."""


@dataclass(frozen=True, slots=True)
class Drafting:
    """How a draft grows: the options, read and checked."""

    kind: str
    """"chain", "expansion", "sequoia" or "dynamic"."""
    widths: tuple[int, ...]
    children: str
    depth: int
    branching: int
    threshold: float
    shares_noise: bool
    """Of the acceptance rule."""

    @property
    def is_sampled(self) -> bool:
        """Whether drafts of a sampled request are drawn, and not a function of the context."""
        return self.children != "top_k"

    @property
    def uses_target_noise(self) -> bool:
        return self.children == "coupled"

    @property
    def default_num_nodes(self) -> int:
        if self.kind == "expansion":
            return sum(accumulate(self.widths, mul))
        return 5 if self.kind == "chain" else 16

    def num_scratch_slots(self, num_nodes: int) -> int:
        """Slots for nodes that are run and may not be proposed in the end."""
        if self.kind != "dynamic":
            return 0
        return max(0, self.branching * (self.depth - 1) - num_nodes)

    def shape(
        self, max_nodes: int, max_depth: int, rank_acceptance: tuple[float, ...]
    ) -> TokenTree:
        """The shape of a static tree within the budget."""
        if self.kind == "expansion":
            return _expansion(self.widths[:max_depth], max_nodes)
        return _sequoia(rank_acceptance[: self.branching], max_nodes, min(max_depth, self.depth))


@lru_cache(maxsize=256)
def _expansion(widths: tuple[int, ...], max_nodes: int) -> TokenTree:
    return expansion(widths, max_nodes)


@lru_cache(maxsize=256)
def _sequoia(rank_acceptance: tuple[float, ...], max_nodes: int, max_depth: int) -> TokenTree:
    return sequoia(rank_acceptance, max_nodes, max_depth)


def read_drafting(options: Mapping[str, Any], acceptance: str) -> Drafting:
    """Check the options of `DRAFTING_OPTIONS`.

    Raises:
        ValueError: one is out of range, has no effect on the kind of tree, or does not go with the
            acceptance rule.
    """
    rule = ACCEPTANCE[acceptance]
    tree, children = options["tree"], options["children"]
    kind = tree if isinstance(tree, str) else "chain" if tree is None else "expansion"
    if kind not in ("chain", "expansion", "sequoia", "dynamic"):
        raise ValueError(
            f"tree must be None, a list of widths, 'sequoia' or 'dynamic', got {tree!r}"
        )
    if kind != "chain" and not rule.takes_trees:
        raise ValueError(f"acceptance={acceptance!r} verifies chains, got tree={tree!r}")
    if children is None:
        children = "coupled" if rule.shares_noise else "without_replacement"
    if children not in CHILDREN:
        raise ValueError(f"children must be one of {', '.join(CHILDREN)}, got {children!r}")
    if children == "coupled" and not rule.shares_noise:
        raise ValueError(
            f"children='coupled' use the target's noise, which acceptance={acceptance!r} forbids"
        )
    if kind == "dynamic" and not rule.shares_noise and children != "top_k":
        raise ValueError(
            "a dynamic tree chooses among drawn tokens, which biases the output under "
            f"acceptance={acceptance!r}; use 'coupled', or children='top_k'"
        )
    _check_ranges(options, kind)
    return Drafting(
        kind=kind,
        widths=tuple(tree) if kind == "expansion" else (),
        children=children,
        depth=options["depth"],
        branching=options["branching"],
        threshold=float(options["threshold"]),
        shares_noise=rule.shares_noise,
    )


def _check_ranges(options: Mapping[str, Any], kind: str) -> None:
    widths = options["tree"] if kind == "expansion" else [1]
    ok = isinstance(widths, (list, tuple)) and len(widths) > 0 and all(map(_is_count, widths))
    if not ok:
        raise ValueError(f"tree must have widths of at least 1, got {widths!r}")
    if (num_nodes := sum(accumulate(widths, mul))) > MAX_NODES:
        raise ValueError(f"tree must have at most {MAX_NODES} nodes, {widths!r} has {num_nodes}")
    used = {"sequoia": ("depth", "branching"), "dynamic": ("depth", "branching", "threshold")}
    for name in ("depth", "branching"):
        if not _is_count(options[name]):
            raise ValueError(f"{name} must be an integer of at least 1, got {options[name]!r}")
    threshold = options["threshold"]
    if not isinstance(threshold, (int, float)) or not 0 <= threshold < 1:
        raise ValueError(f"threshold must be in [0, 1), got {threshold!r}")
    for name in ("depth", "branching", "threshold"):
        if name not in used.get(kind, ()) and options[name] != DRAFTING_OPTIONS[name]:
            raise ValueError(
                f"{name} has no effect with tree={options['tree']!r}, got {options[name]!r}"
            )
    if options["rank_acceptance"] is not None:
        if kind != "sequoia":
            raise ValueError(f"rank_acceptance has no effect with tree={options['tree']!r}")
        check_rank_acceptance(options["rank_acceptance"])
        if len(options["rank_acceptance"]) > options["branching"]:
            raise ValueError(
                f"rank_acceptance must have at most branching={options['branching']} ranks, got "
                f"{options['rank_acceptance']}"
            )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


class RankAcceptance:
    """How often the child of each rank was accepted, given that its parent was: what Sequoia builds
    its tree from. It starts from a guess and is measured as drafts are verified; the figures that
    shapes are made from change only when twice as much has been seen, so that shapes last.

    Args:
        fixed: figures that replace the measured ones.
    """

    PRIOR = (0.6, 0.12, 0.05, 0.03, 0.02, 0.015, 0.01, 0.01)
    WEIGHT = 64.0

    def __init__(self, fixed: Sequence[float] | None = None) -> None:
        self._fixed = fixed is not None
        self._figures = tuple(fixed) if fixed is not None else self.PRIOR
        self._tried = [0] * len(self.PRIOR)
        self._accepted = [0] * len(self.PRIOR)
        self._next_update = 64

    def estimates(self) -> tuple[float, ...]:
        """Acceptance by rank, not increasing."""
        return self._figures

    def record(self, trials: Iterable[tuple[int, bool]]) -> None:
        """Count (rank, accepted) of nodes whose parent was accepted."""
        for rank, accepted in trials:
            if rank < len(self._tried):
                self._tried[rank] += 1
                self._accepted[rank] += accepted
        if not self._fixed and self._tried[0] >= self._next_update:
            self._next_update = 2 * self._tried[0]
            measured = [
                (prior * self.WEIGHT + accepted) / (self.WEIGHT + tried)
                for prior, tried, accepted in zip(
                    self.PRIOR, self._tried, self._accepted, strict=True
                )
            ]
            self._figures = tuple(min(measured[: rank + 1]) for rank in range(len(measured)))


class Sharpness:
    """How sharply a draft model's scores tell the target's token (`children._chances`), measured as
    drafts are verified.

    A first child's confidence rises with the sharpness, so there is one with which first children
    are accepted as often as they were expected to be. Every verified draft moves it a little
    towards that, the first ones more than the later ones.
    """

    START, RANGE = 1.25, (0.2, 20.0)
    STEPS = (0.05, 0.01)
    """How far a surprise of 1 moves its logarithm, at first and at last."""

    def __init__(self) -> None:
        self.value = self.START
        self._num_seen = 0

    def record(self, trials: Iterable[tuple[float, bool]]) -> None:
        """Learn from (confidence, accepted) of first children whose parent was accepted."""
        (first, last), (low, high) = self.STEPS, self.RANGE
        for confidence, accepted in trials:
            step = max(last, first / (1.0 + self._num_seen / 200.0))
            moved = self.value * math.exp(step * (accepted - confidence))
            self.value = min(max(moved, low), high)
            self._num_seen += 1
