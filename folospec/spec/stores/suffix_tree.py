"""Counts what followed which tokens in many texts, in a suffix tree of bounded depth.

It is the structure under SuffixDecoding (arXiv 2411.04975, section 3.1).

Every substring of at most `max_depth` tokens is a path from the root. Paths are compressed: an edge
holds as many tokens as follow each other without a choice, read from a text that has them. A count
says how many places of the texts have the node's path up to the first token of its edge.

    text  a b a b c         root -- ab (2) --- abc (1)
                              |        `------ c (1)
                              |---- b (2) ---- abc (1)
                              |        `------ c (1)
                              `---- c (1)

Texts are written token by token (Ukkonen's order). Only the suffixes of the text that occurred
before have to be followed; each of them is a `Point`. When the next token sets one apart it becomes
a leaf, whose edge goes on as the text does. The points are also the matches of a lookup, so growing
and looking up are one thing, at O(max_depth) a token whatever the length of the texts.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

BYTES_PER_TOKEN = 4
BYTES_PER_NODE = 180
"""About what a node takes, with its share of the dicts (measured on source code)."""


class Node:
    """The end of an edge. Its path is `text[start : start + depth]`; a leaf of a text that is still
    being written may be longer than the text is yet."""

    __slots__ = ("children", "count", "depth", "start", "text")

    def __init__(self, text: array[int], start: int, depth: int, count: int) -> None:
        self.text, self.start, self.depth, self.count = text, start, depth, count
        self.children: dict[int, Node] | None = None


@dataclass(slots=True)
class Point:
    """A place in the tree, `depth` tokens below the root: on the edge into `node`, or at its
    end."""

    node: Node
    depth: int

    def advance(self, token_id: int) -> bool:
        """Go on by a token, or stay where it never followed."""
        node = self.node
        if self.depth < node.depth:
            place = node.start + self.depth
            if place >= len(node.text) or node.text[place] != token_id:
                return False
        else:
            child = node.children.get(token_id) if node.children else None
            if child is None:
                return False
            self.node = child
        self.depth += 1
        return True

    def continuations(self) -> Iterator[tuple[int, int, int, Point]]:
        """What has followed: (token id, how often, how often anything did, the point after it),
        the tokens that were first seen here last coming first."""
        node = self.node
        if self.depth < node.depth:
            place = node.start + self.depth
            if place < len(node.text):
                yield node.text[place], node.count, node.count, Point(node, self.depth + 1)
        elif node.children:
            total = sum(child.count for child in node.children.values())
            for token_id, child in reversed(node.children.items()):
                yield token_id, child.count, total, Point(child, self.depth + 1)


class SuffixTree:
    """The tree of the texts that were written to it and not removed.

    Args:
        max_depth: most tokens of a path; a match of n tokens can be continued by `max_depth` - n.
    """

    def __init__(self, max_depth: int) -> None:
        self.max_depth = max_depth
        self.root = Node(array("i"), 0, 0, 0)
        self.num_nodes = 0
        """The root excluded."""
        self.version = 0
        """Changes whenever points that a `Reader` holds may have become wrong."""

    def count(self, token_ids: list[int]) -> int:
        """How often the closed texts have these tokens, at most `max_depth` of them."""
        point = Point(self.root, 0)
        found = len(token_ids) > 0 and all(point.advance(token_id) for token_id in token_ids)
        return point.node.count if found else 0

    def remove(self, text: array[int]) -> None:
        """Take back a closed text: afterwards the tree is as if it had never been written."""
        self.version += 1
        for start in range(len(text)):
            self._remove_suffix(text, start, min(self.max_depth, len(text) - start))

    def _remove_suffix(self, text: array[int], start: int, length: int) -> None:
        node = self.root
        path: list[Node] = []
        while node.depth < length:
            assert node.children is not None
            token_id = text[start + node.depth]
            child = node.children[token_id]
            child.count -= 1
            if child.count == 0:
                del node.children[token_id]
                self.num_nodes -= 1
                break
            path.append(child)
            node = child
        # What others share must not be read from a text that is gone; it is copied once per suffix.
        stale = [other for other in path if other.text is text]
        if stale:
            copy = text[start : start + stale[-1].depth]
            for other in stale:
                other.text, other.start = copy, 0
        if path:
            self._compress(node)

    def _compress(self, node: Node) -> None:
        """Make one edge of two if nothing ends or branches at the node between them."""
        if not node.children:
            node.children = None
        elif len(node.children) == 1:
            (child,) = node.children.values()
            if child.count == node.count:
                node.text, node.start, node.depth = child.text, child.start, child.depth
                node.children = child.children
                self.num_nodes -= 1


class Writer:
    """Adds a text to a tree, token by token. One writer at a time.

    `points` are the suffixes of the text that occurred before, the longest first; a suffix as long
    as `max_depth` is not among them, as nothing is known of what follows it.
    """

    def __init__(self, tree: SuffixTree) -> None:
        self.tree = tree
        self.text = array("i")
        self.points: list[Point] = []

    def append(self, token_id: int) -> None:
        """Add a token; all suffixes grow by it."""
        tree, text = self.tree, self.text
        text.append(token_id)
        tree.version += 1
        self.points.append(Point(tree.root, 0))
        matched = []
        for point in self.points:
            node = point.node
            if not point.advance(token_id):
                self._branch(point, token_id)
                continue
            if point.node is not node:
                node = point.node
                node.count += 1
            if point.depth == node.depth:
                # The newest text that has the path: it will be there for longest.
                node.text, node.start = text, len(text) - point.depth
            if point.depth < tree.max_depth:
                matched.append(point)
        self.points = matched

    def close(self) -> array[int]:
        """End the text, at the tokens it has: every suffix gets a node of its own."""
        for point in self.points:
            self._split(point)
        self.points = []
        for start in range(max(0, len(self.text) - self.tree.max_depth), len(self.text)):
            node, length = self.tree.root, len(self.text) - start
            while node.depth < length:
                assert node.children is not None
                node = node.children[self.text[start + node.depth]]
            node.depth = length
        self.tree.version += 1
        return self.text

    def _branch(self, point: Point, token_id: int) -> None:
        """The suffix at `point` has gone its own way: what it is from here on is a leaf."""
        self._split(point)
        node, tree = point.node, self.tree
        if node.children is None:
            node.children = {}
        start = len(self.text) - 1 - point.depth
        node.children[token_id] = Node(self.text, start, tree.max_depth, 1)
        tree.num_nodes += 1

    def _split(self, point: Point) -> None:
        """Make the end of a node of a place on an edge. Suffixes that have not come further than
        this place were counted for the whole edge; below it they no longer are."""
        upper, depth = point.node, point.depth
        if depth == upper.depth:
            return
        lower = Node(upper.text, upper.start, upper.depth, upper.count)
        lower.children = upper.children
        for other in self.points:
            if other.node is upper:
                if other.depth > depth:
                    other.node = lower
                else:
                    lower.count -= 1
        upper.depth = depth
        upper.children = {upper.text[upper.start + depth]: lower}
        self.tree.num_nodes += 1


class Reader:
    """Follows a text through a tree without adding to it.

    `points` are the suffixes of the text that are in the tree, the longest first, without one as
    long as `max_depth`. They are found anew from the last tokens after the tree has changed.
    """

    def __init__(self, tree: SuffixTree) -> None:
        self.tree = tree
        self._recent: deque[int] = deque(maxlen=tree.max_depth - 1)
        self._points: list[Point] = []
        self._version = tree.version

    def append(self, token_id: int) -> None:
        """Follow the text by a token."""
        self._recent.append(token_id)
        if self._version == self.tree.version:
            self._advance(token_id)

    @property
    def points(self) -> list[Point]:
        if self._version != self.tree.version:
            self._version, self._points = self.tree.version, []
            for token_id in self._recent:
                self._advance(token_id)
        return self._points

    def _advance(self, token_id: int) -> None:
        points = [*self._points, Point(self.tree.root, 0)]
        longest = self.tree.max_depth - 1
        self._points = [p for p in points if p.advance(token_id) and p.depth <= longest]
