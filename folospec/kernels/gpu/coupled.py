"""Verifies trees under `coupled` on the device: from the drawn tokens to the accepted paths.

    row      0 (root)  1   2   3          tokens of the nodes, -1: not to be accepted
    parent   -         0   0   1
    drawn    a         b   .   c          node rows 1 and 2 both have the token a: duplicates

    {0} --a--> {1, 2} --b--> {3} --c--> nothing has it: the path is 1, 3 and the token c

A level is the set of rows that spell the tokens so far, as in `spec.verify.verify_coupled`. The
token is that of its first row, and the path leads to the first row of the last level. First is the
row whose path comes first: of the child with the lowest number, of its child likewise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from folospec.kernels.gpu import sampling_arrays

COLUMNS = tl.constexpr(sampling_arrays.COLUMNS)


@triton.jit
def verify_kernel(trees, nodes, tokens, row_peaks, result, num_trees, ROWS: tl.constexpr):
    """Verify one tree in each program.

    Args:
        trees: int64 [trees, 4]; (root row of logits, position, begin, size), see `PackedTrees`.
        nodes: int64; from `begin` on the tokens of a tree's nodes, then their parents.
        tokens: int64, drawn at the rows of all trees, in their order.
        row_peaks: float32, their largest logits.
        result: int64 [COLUMNS * num_trees + nodes]; the paths lie behind the columns, each
            where the nodes of its tree are.
        ROWS: a power of two, at least 1 + the nodes of any tree.
    """
    tree = tl.program_id(0).to(tl.int64)
    begin, size = tl.load(trees + 4 * tree + 2), tl.load(trees + 4 * tree + 3)
    first_node = begin // 2  # of all trees
    first_row = first_node + tree
    row = tl.arange(0, ROWS)
    is_node = (row > 0) & (row <= size)
    token = tl.load(nodes + begin + row - 1, mask=is_node, other=-1)
    parent = tl.load(nodes + begin + size + row - 1, mask=is_node, other=-1).to(tl.int32) + 1
    drawn = tl.load(tokens + first_row + row, mask=row <= size, other=-1)

    level = (row == 0).to(tl.int32)
    end = tl.zeros([], tl.int32)
    length = tl.zeros([], tl.int64)
    found = end == 0
    while found:
        next_token = tl.sum(tl.where(row == end, drawn, 0), 0)
        below = is_node & (tl.gather(level, parent, 0) > 0) & (token == next_token) & (token >= 0)
        found = tl.max(below.to(tl.int32), 0) > 0
        level = below.to(tl.int32)
        if found:
            end = _first_of_level(level, row, parent, length, ROWS)
            length += 1

    out = result + COLUMNS * tree
    tl.store(out, tl.sum(tl.where(row == end, drawn, 0), 0))
    tl.store(out + 1, length)
    peak = tl.load(row_peaks + first_row + end)
    tl.store(out + 2, peak.to(tl.int32, bitcast=True).to(tl.int64))
    path = result + COLUMNS * num_trees + first_node
    place = length
    while place > 0:
        place -= 1
        tl.store(path + place, (end - 1).to(tl.int64))
        end = tl.sum(tl.where(row == end, parent, 0), 0)


@triton.jit
def _first_of_level(level, row, parent, up, ROWS: tl.constexpr):
    """The row of a level whose path comes first; `up` is how far it lies below the top level."""
    while (up > 0) & (tl.sum(level, 0) > 1):
        ancestor = row
        for _ in range(0, up):
            ancestor = tl.gather(parent, ancestor, 0)
        first = tl.min(tl.where(level > 0, ancestor, ROWS), 0)
        level = tl.where(ancestor == first, level, 0)
        up -= 1
    return tl.min(tl.where(level > 0, row, ROWS), 0)
