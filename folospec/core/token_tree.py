"""Defines the shape of every draft: a tree of token ids under the last committed token.

        root            last committed token, row 0
        |-- 0: 17       node 0, row 1, depth 1
        |   `-- 2: 9    node 2, row 3, depth 2
        `-- 1: 4        node 1, row 2, depth 1

Node i is row i + 1 of the step. Parents come before children, and the order of siblings is the
order of their trial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from operator import lt

import numpy as np
import numpy.typing as npt

ROOT = -1
"""The parent of the nodes right under the last committed token."""


@dataclass(frozen=True)
class TokenTree:
    """Draft tokens and the parent of each: an earlier node, or `ROOT`. It may be empty.

    Raises:
        ValueError: the lists differ in length, a parent does not come before its child, or a token
            id is negative.
    """

    token_ids: Sequence[int] = ()
    parents: Sequence[int] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", tuple(self.token_ids))
        object.__setattr__(self, "parents", tuple(self.parents))
        if len(self.token_ids) != len(self.parents):
            raise ValueError(
                "token_ids and parents must be equally long, "
                f"got {len(self.token_ids)} and {len(self.parents)}"
            )
        ids, parents = self.token_ids, self.parents
        if ids and not (min(ids) >= 0 and min(parents) >= ROOT and all(map(lt, parents, count()))):
            self._refuse()

    def _refuse(self) -> None:
        for node, (token_id, parent) in enumerate(zip(self.token_ids, self.parents, strict=True)):
            if token_id < 0:
                raise ValueError(f"token_ids[{node}] must be at least 0, got {token_id}")
            if not ROOT <= parent < node:
                raise ValueError(f"parents[{node}] must be in [-1, {node}), got {parent}")

    @classmethod
    def chain(cls, token_ids: Iterable[int]) -> TokenTree:
        """A tree with one branch: each token is the child of the one before it."""
        token_ids = tuple(token_ids)
        return cls(token_ids, tuple(range(-1, len(token_ids) - 1)))

    def __len__(self) -> int:
        return len(self.token_ids)

    @cached_property
    def is_chain(self) -> bool:
        """Whether every node has at most one child, and the root too. True for an empty tree."""
        return self.parents == tuple(range(-1, len(self) - 1))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Depth of each node; 1 right under the root."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def _children(self) -> tuple[tuple[int, ...], ...]:
        # Entry 0 is the root's, entry i + 1 is node i's.
        children: list[list[int]] = [[] for _ in range(len(self) + 1)]
        for node, parent in enumerate(self.parents):
            children[parent + 1].append(node)
        return tuple(map(tuple, children))

    def children(self, node: int = ROOT) -> tuple[int, ...]:
        """The children of a node (-1: the root) in the order of their trial."""
        self._check_node(node, lowest=ROOT)
        return self._children[node + 1]

    def path(self, node: int) -> list[int]:
        """The nodes from under the root down to `node`, itself included; empty for the root."""
        self._check_node(node, lowest=ROOT)
        path = []
        while node != ROOT:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def path_token_ids(self, node: int) -> list[int]:
        """The draft tokens from under the root down to `node`: its history beyond the root."""
        return [self.token_ids[i] for i in self.path(node)]

    def ancestor_mask(self) -> npt.NDArray[np.bool_]:
        """bool [num_nodes + 1, num_nodes + 1] over rows: each sees itself and its ancestors.

        Row 0 is the root, row i + 1 is node i.
        """
        mask = np.eye(len(self) + 1, dtype=np.bool_)
        for node, parent in enumerate(self.parents):
            mask[node + 1] |= mask[parent + 1]
        return mask

    def prune(self, keep: Iterable[int]) -> tuple[TokenTree, list[int]]:
        """Keep the given nodes as far as all their ancestors are kept too; order stays.

        Returns:
            the smaller tree, and for each of its nodes the node it was in this tree.
        """
        wanted = set(keep)
        for node in wanted:
            self._check_node(node, lowest=0)
        new_index = {ROOT: ROOT}
        kept: list[int] = []
        for node, parent in enumerate(self.parents):
            if node in wanted and parent in new_index:
                new_index[node] = len(kept)
                kept.append(node)
        parents = [new_index[self.parents[node]] for node in kept]
        return TokenTree([self.token_ids[node] for node in kept], parents), kept

    def render(self, label: Callable[[int], str] | None = None) -> str:
        """The tree drawn with ASCII lines, one node a line; `label(node)` replaces the token id."""
        lines = ["root"]

        def draw(node: int, indent: str) -> None:
            children = self.children(node)
            for child in children:
                last = child == children[-1]
                text = str(self.token_ids[child]) if label is None else label(child)
                lines.append(f"{indent}{'`--' if last else '|--'} {child}: {text}")
                draw(child, indent + ("    " if last else "|   "))

        draw(ROOT, "")
        return "\n".join(lines)

    def _check_node(self, node: int, lowest: int) -> None:
        if not lowest <= node < len(self):
            raise ValueError(f"node must be in [{lowest}, {len(self)}), got {node}")


EMPTY_TREE = TokenTree()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a step emits for one sequence: the tokens of the path, then `next_token_id`."""

    path: list[int]
    """Accepted nodes, from the root's child downwards; empty if no draft token was accepted."""
    next_token_id: int
    """The token after the path: it has no KV yet and is the next root."""

    @property
    def num_accepted(self) -> int:
        """Accepted draft tokens, the next token excluded."""
        return len(self.path)

    def token_ids(self, tree: TokenTree) -> list[int]:
        """The tokens emitted, in order: `num_accepted + 1` of them."""
        return [*(tree.token_ids[node] for node in self.path), self.next_token_id]
