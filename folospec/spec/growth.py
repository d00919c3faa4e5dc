"""A draft tree while it grows: which nodes get children next, how many, and what is kept.

Static trees (chain, expansion, sequoia) follow a shape. A dynamic tree follows the tokens: every
level, the likeliest nodes get children, and in the end the likeliest nodes of all are proposed
(EAGLE-2's expand and rerank, arXiv 2406.16858; OPT-Tree, 2406.17276). A node's joint probability is
the product of the confidences along its path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from folospec.core.token_tree import ROOT, TokenTree
from folospec.spec.acceptance_table import share_among_siblings
from folospec.spec.children import Children
from folospec.spec.draft_runner import Rows
from folospec.spec.drafting import Drafting, RankAcceptance
from folospec.spec.proposal import Proposal

if TYPE_CHECKING:
    from folospec.spec.drafters.base import DraftRow


@dataclass(slots=True)
class Growth:
    """The draft of one sequence. `frontier` holds the nodes whose children are drawn next."""

    row: DraftRow
    plan: Drafting
    ranks: RankAcceptance
    frontier: list[int] = field(default_factory=lambda: [ROOT])
    token_ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    _depths: list[int] = field(default_factory=list)
    _node_ranks: list[int] = field(default_factory=list)
    _confidence: list[float] = field(default_factory=list)
    _joint: list[float] = field(default_factory=list)
    _laws: list[Tensor] = field(default_factory=list)
    _run: list[int] = field(default_factory=list)
    """Nodes that were run, or are to be run in the next pass, in the order of their slots."""
    _num_done: int = 0
    """Of them, those that were run."""
    _shape: TokenTree | None = None
    _shape_nodes: list[int] = field(default_factory=list)
    """Static: the node of the shape that each node stands for."""
    _level: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        row = self.row
        if self.plan.kind != "dynamic":
            ranks = self.ranks.estimates()
            self._shape = self.plan.shape(row.max_draft_tokens, row.max_depth, ranks)
        if min(row.max_draft_tokens, row.max_depth) < 1:
            self.frontier = []

    def path_token_ids(self, node: int) -> list[int]:
        """The draft tokens from under the root down to `node`."""
        path = []
        while node != ROOT:
            path.append(self.token_ids[node])
            node = self.parents[node]
        return path[::-1]

    def width(self, node: int) -> int:
        """How many children a frontier node is to have."""
        if self._shape is None:
            return self.plan.branching
        return len(self._shape.children(self._shape_node(node)))

    def _shape_node(self, node: int) -> int:
        return ROOT if node == ROOT else self._shape_nodes[node]

    def add(self, parent: int, children: Children) -> None:
        """Hang the drawn children under a frontier node."""
        places: Sequence[int] = ()
        if self._shape is not None:
            places = self._shape.children(self._shape_node(parent))
        above = 1.0 if parent == ROOT else self._joint[parent]
        for rank, (token_id, chance) in enumerate(
            zip(children.token_ids, children.confidence, strict=True)
        ):
            self._level.append(len(self.token_ids))
            self.token_ids.append(token_id)
            self.parents.append(parent)
            self._depths.append(1 if parent == ROOT else self._depths[parent] + 1)
            self._node_ranks.append(rank)
            self._confidence.append(chance)
            self._joint.append(above * chance)
            if children.laws is not None:
                self._laws.append(children.laws[rank])
            if self._shape is not None:
                self._shape_nodes.append(places[rank])

    def advance(self) -> None:
        """Choose the next frontier from the level that was added last."""
        level, self._level = self._level, []
        if self._shape is not None:
            shape = self._shape
            self.frontier = [n for n in level if shape.children(self._shape_nodes[n])]
        else:
            self.frontier = self._beam(level)
        self._num_done = len(self._run)
        self._run += self.frontier

    def _beam(self, level: list[int]) -> list[int]:
        """The likeliest nodes of a level, as far as there are slots to run them in."""
        row, plan = self.row, self.plan
        if not level or self._depths[level[0]] >= min(row.max_depth, plan.depth):
            return []
        room = max(0, min(plan.branching, row.num_slots - len(self._run)))
        likely = [node for node in level if self._joint[node] > plan.threshold]
        best = sorted(likely, key=lambda node: -self._joint[node])[:room]
        kept = self._kept_joint()
        return sorted(node for node in best if self._joint[node] >= kept)

    def _kept_joint(self) -> float:
        """The joint probability below which a node is not proposed whatever follows: its children
        are no likelier than itself."""
        budget = self.row.max_draft_tokens
        if len(self._joint) < budget:
            return 0.0
        return sorted(self._joint, reverse=True)[budget - 1]

    def next_rows(self, fit: Callable[[Sequence[int]], list[int]]) -> Rows:
        """The frontier as rows of the draft model; `fit` maps token ids to its vocabulary."""
        row, run, done = self.row, self._run, self._num_done
        if len(self.frontier) == 1 and self._run_is_chain():
            token_ids = fit([self.token_ids[run[-1]]])
            return Rows(token_ids, row.root_position + len(run), row.block_table)
        place = {node: slot for slot, node in enumerate(run, start=1)}
        parents = [-1, *(place.get(self.parents[node], 0) for node in run)]
        token_ids = fit([row.token_ids[-1], *(self.token_ids[node] for node in run)])
        return Rows(
            token_ids,
            row.root_position,
            row.block_table,
            num_logits=len(run) - done,
            parents=parents,
            num_computed=1 + done,
        )

    def _run_is_chain(self) -> bool:
        above = [ROOT, *self._run]
        return all(
            self.parents[node] == before for node, before in zip(self._run, above, strict=False)
        )

    def finish(self, kv_owner: str | None, *, with_laws: bool) -> tuple[Proposal | None, list[int]]:
        """The proposal, and the rank of each of its nodes among its siblings."""
        if not self.token_ids:
            return None, []
        slots: list[int | None] = [None] * len(self.token_ids)
        for slot, node in enumerate(self._run, start=1):
            slots[node] = slot
        proposal = Proposal(
            TokenTree(self.token_ids, self.parents),
            draft_probs=torch.stack(self._laws) if with_laws and self._laws else None,
            confidence=share_among_siblings(self.parents, self._confidence),
            draft_slots={} if kv_owner is None else {kv_owner: slots},
        )
        if len(proposal) <= self.row.max_draft_tokens:
            return proposal, self._node_ranks
        # A parent is at least as likely as its child and comes before it, so ties keep it too.
        order = sorted(range(len(proposal)), key=lambda node: (-self._joint[node], node))
        keep = sorted(order[: self.row.max_draft_tokens])
        return proposal.prune(keep), [self._node_ranks[node] for node in keep]
