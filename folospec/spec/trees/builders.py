"""Builds a draft level by level: which nodes get children, how many, and what is kept.

A chain only goes on or ends. Static trees (expansion, sequoia) follow a shape. A dynamic tree
follows the tokens: every level, the likeliest nodes get children, and in the end the likeliest
nodes of all are proposed (EAGLE-2's expand and rerank, arXiv 2406.16858; OPT-Tree, 2406.17276). A
node's joint probability is the product of the confidences along its path.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from folospec.core.token_tree import ROOT, TokenTree
from folospec.models.forward import Rows
from folospec.spec.proposal import Proposal
from folospec.spec.stores.acceptance_table import share_among_siblings
from folospec.spec.trees.children import Children
from folospec.spec.trees.drafting import Drafting, RankAcceptance
from folospec.spec.trees.drawing import DraftPosition, DraftSampling

if TYPE_CHECKING:
    from folospec.spec.drafters.base import DraftRequest


@dataclass(slots=True)
class Chain:
    """The draft of one sequence while it grows by a token in every pass."""

    row: DraftRequest
    sampling: DraftSampling
    min_probability: float
    """Of a path that is less likely the end is not drafted on."""
    token_ids: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    draft_probs: list[Tensor] = field(default_factory=list)
    joint: float = 1.0
    is_done: bool = False

    def __post_init__(self) -> None:
        self.is_done = self.length < 1

    @property
    def length(self) -> int:
        """Draft tokens that are wanted."""
        return min(self.row.max_draft_tokens, self.row.max_depth)

    def add(self, children: Children) -> None:
        """Take the drawn token, if there is one."""
        if not children.token_ids:
            self.is_done = True
            return
        self.token_ids += children.token_ids
        self.confidence += children.confidence
        if children.draft_probs is not None:
            self.draft_probs.append(children.draft_probs[0])
        self.joint *= self.confidence[-1]
        self.is_done = len(self.token_ids) == self.length or self.joint < self.min_probability

    def finish(
        self, kv_owner: str | None, *, with_draft_probs: bool
    ) -> tuple[Proposal | None, list[int]]:
        """The proposal, and the rank of each of its nodes among its siblings."""
        count = len(self.token_ids)
        if count == 0:
            return None, []
        # The last token was drawn, and not run.
        proposal = Proposal(
            TokenTree.chain(self.token_ids),
            draft_probs=torch.stack(self.draft_probs)
            if with_draft_probs and self.draft_probs
            else None,
            confidence=self.confidence,
            draft_slots={} if kv_owner is None else {kv_owner: [*range(1, count), None]},
        )
        return proposal, [0] * count


@dataclass(slots=True)
class TreeBuilder:
    """The tree of one sequence while it grows. `frontier` holds the nodes whose children are drawn
    next."""

    row: DraftRequest
    sampling: DraftSampling
    min_probability: float
    """Nodes that are reached with a smaller chance have no children."""
    plan: Drafting
    ranks: RankAcceptance
    frontier: list[int] = field(default_factory=lambda: [ROOT])
    token_ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)
    """The draft tokens from under the root down to each node."""
    offsets: list[int | None] = field(default_factory=list)
    """The draft slot of each node, from the root's; None: it was not run."""
    _node_ranks: list[int] = field(default_factory=list)
    _confidence: list[float] = field(default_factory=list)
    _joint: list[float] = field(default_factory=list)
    _draft_probs: list[Tensor] = field(default_factory=list)
    _run_token_ids: list[int] = field(default_factory=list)
    """Of the root and the nodes that were run, or are to be run in the next pass, by slot."""
    _run_parents: list[int] = field(default_factory=lambda: [-1])
    _num_done: int = 1
    """Of them, those that were run."""
    _shape: TokenTree | None = None
    _shape_nodes: list[int] = field(default_factory=list)
    """Static: the node of the shape that each node stands for."""
    _level: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        row = self.row
        self._run_token_ids.append(row.token_ids[-1])
        if self.plan.kind != "dynamic":
            ranks = self.ranks.estimates()
            self._shape = self.plan.shape(row.max_draft_tokens, row.max_depth, ranks)
        if min(row.max_draft_tokens, row.max_depth) < 1:
            self.frontier = []

    def draft_position(self, node: int) -> DraftPosition:
        """A frontier node, as one whose children are to be drawn."""
        path = () if node == ROOT else self.paths[node]
        if self._shape is None:
            return DraftPosition(self.sampling, path, node + 1, self.plan.branching)
        return DraftPosition(
            self.sampling, path, node + 1, len(self._shape.children(self._shape_node(node)))
        )

    def _shape_node(self, node: int) -> int:
        return ROOT if node == ROOT else self._shape_nodes[node]

    def add(self, parent: int, children: Children) -> None:
        """Hang the drawn children under a frontier node."""
        first, count = len(self.token_ids), len(children.token_ids)
        above, path = (1.0, []) if parent == ROOT else (self._joint[parent], self.paths[parent])
        self._level += range(first, first + count)
        self.token_ids += children.token_ids
        self.parents += [parent] * count
        self.paths += [[*path, token_id] for token_id in children.token_ids]
        self.offsets += [None] * count
        self._node_ranks += range(count)
        self._confidence += children.confidence
        self._joint += [above * chance for chance in children.confidence]
        if children.draft_probs is not None:
            self._draft_probs += children.draft_probs
        if self._shape is not None:
            self._shape_nodes += self._shape.children(self._shape_node(parent))[:count]

    def advance(self) -> None:
        """Choose the next frontier from the level that was added last."""
        level, self._level = self._level, []
        shape, joint = self._shape, self._joint
        if shape is None:
            self.frontier = self._beam(level)
        else:
            self.frontier = [
                node
                for node in level
                if shape.children(self._shape_nodes[node]) and joint[node] >= self.min_probability
            ]
        self._num_done = len(self._run_token_ids)
        for node in self.frontier:
            parent = self.parents[node]
            self.offsets[node] = len(self._run_token_ids)
            self._run_token_ids.append(self.token_ids[node])
            self._run_parents.append(0 if parent == ROOT else self.offsets[parent] or 0)

    def _beam(self, level: list[int]) -> list[int]:
        """The likeliest nodes of a level, as far as there are slots to run them in."""
        row, plan, joint = self.row, self.plan, self._joint
        if not level or len(self.paths[level[0]]) >= min(row.max_depth, plan.depth):
            return []
        room = max(0, min(plan.branching, row.num_slots + 1 - len(self._run_token_ids)))
        likely = [node for node in level if joint[node] > plan.threshold]
        best = sorted(likely, key=lambda node: -joint[node])[:room]
        min_probability = max(self._kept_joint(), self.min_probability)
        return sorted(node for node in best if joint[node] >= min_probability)

    def _kept_joint(self) -> float:
        """The joint probability below which a node is not proposed whatever follows: its children
        are no likelier than itself."""
        budget = self.row.max_draft_tokens
        if len(self._joint) < budget:
            return 0.0
        return sorted(self._joint, reverse=True)[budget - 1]

    def next_rows(self) -> Rows:
        """The frontier as rows of the draft model."""
        return Rows(
            self._run_token_ids,
            self.row.root_position,
            self.row.block_table,
            num_logits=len(self.frontier),
            parents=self._run_parents,
            num_computed=self._num_done,
        )

    def finish(
        self, kv_owner: str | None, *, with_draft_probs: bool
    ) -> tuple[Proposal | None, list[int]]:
        """The proposal, and the rank of each of its nodes among its siblings."""
        if not self.token_ids:
            return None, []
        proposal = Proposal(
            TokenTree(self.token_ids, self.parents),
            draft_probs=torch.stack(self._draft_probs)
            if with_draft_probs and self._draft_probs
            else None,
            confidence=share_among_siblings(self.parents, self._confidence),
            draft_slots={} if kv_owner is None else {kv_owner: self.offsets},
        )
        if len(proposal) <= self.row.max_draft_tokens:
            return proposal, self._node_ranks
        # A parent is at least as likely as its child and comes before it, so ties keep it too.
        order = sorted(range(len(proposal)), key=lambda node: (-self._joint[node], node))
        keep = sorted(order[: self.row.max_draft_tokens])
        return proposal.prune(keep), [self._node_ranks[node] for node in keep]
