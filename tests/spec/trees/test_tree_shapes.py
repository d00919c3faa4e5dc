"""Static shapes: their nodes and order, and that no tree beats `sequoia`'s."""

from functools import cache
from itertools import pairwise
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folospec.core.token_tree import ROOT, TokenTree
from folospec.spec.trees.tree_shapes import expansion, sequoia

VECTORS = [
    (0.6, 0.2),
    (0.9, 0.05, 0.01),
    (0.4, 0.35, 0.3, 0.25),
    (0.8, 0.64, 0.5),  # a second child is as likely as a first grandchild
    (0.5, 0.5, 0.5, 0.5),
    (0.5, 0.25, 0.25, 0.125),
    (0.7,),
    (1.0, 1.0),
    (1.0, 0.0),
    (0.6, 0.0, 0.0),
    (0.0, 0.0),
]
MOST_NODES = 6

falling = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=5).map(
    lambda values: sorted(values, reverse=True)
)


def expected_accepted(shape, rank_acceptance):
    """The expected number of accepted nodes of a shape."""
    reached = []
    for rank, parent in zip(shape.token_ids, shape.parents, strict=True):
        above = 1.0 if parent == ROOT else reached[parent]
        reached.append(above * rank_acceptance[rank])
    return sum(reached)


@cache
def forests(num_nodes: int, max_depth: int) -> tuple[tuple, ...]:
    """Every ordered forest, a tree being the tuple of the trees below it."""
    if num_nodes == 0:
        return ((),)
    if max_depth == 0:
        return ()
    return tuple(
        (first, *others)
        for size in range(num_nodes)
        for first in forests(size, max_depth - 1)
        for others in forests(num_nodes - 1 - size, max_depth)
    )


def value(forest: tuple, acceptance: tuple[float, ...]) -> float:
    """The expected number of accepted nodes, by recursion; -1 if a node has too many children."""
    if len(forest) > len(acceptance):
        return -1.0
    below = [value(tree, acceptance) for tree in forest]
    if min(below, default=0.0) < 0.0:
        return -1.0
    return sum(a * (1.0 + b) for a, b in zip(acceptance, below, strict=False))


def assert_well_formed(shape: TokenTree) -> None:
    """Parents come first, and the n-th child of a node has rank n."""
    for node in range(ROOT, len(shape)):
        children = shape.children(node)
        assert [shape.token_ids[child] for child in children] == list(range(len(children)))
        assert all(child > node for child in children)


def test_the_brute_force_has_every_tree():
    catalan = [1, 1, 2, 5, 14, 42, 132]
    assert [len(set(forests(n, n))) for n in range(7)] == catalan
    assert len(forests(4, 1)) == 1
    assert len(forests(4, 2)) == 8  # the ways to cut a row of four: 2 ** 3


@pytest.mark.parametrize("acceptance", VECTORS, ids=str)
def test_no_tree_of_as_many_nodes_beats_sequoia(acceptance):
    for num_nodes in range(MOST_NODES + 1):
        for max_depth in range(1, MOST_NODES + 1):
            shape = sequoia(acceptance, num_nodes, max_depth)
            assert_well_formed(shape)
            assert len(shape) <= num_nodes
            assert max(shape.depths, default=0) <= max_depth
            best = max(
                value(forest, acceptance)
                for size in range(num_nodes + 1)
                for forest in forests(size, max_depth)
            )
            assert expected_accepted(shape, acceptance) == pytest.approx(best, abs=1e-12)


def test_a_tree_that_takes_another_order_is_beaten():
    """Control: what the brute force finds is more than chains and fans have."""
    for acceptance in [(0.6, 0.2), (0.4, 0.35, 0.3, 0.25)]:
        best = expected_accepted(sequoia(acceptance, 6, 6), acceptance)
        for other in (expansion([1] * 6), expansion([2, 2])):
            assert expected_accepted(other, acceptance) < best - 0.01


def test_sequoia_spends_the_whole_budget_where_depth_and_children_allow():
    assert len(sequoia((0.6, 0.2), 40, 6)) == 40
    assert len(sequoia((0.6, 0.2), 40, 3)) == 2 + 4 + 8
    assert len(sequoia((0.5,), 40, 3)) == 3


def test_ties_go_to_the_shallow_node():
    assert sequoia((0.5, 0.25), 3, 3).parents == (ROOT, ROOT, 0)


def test_no_depth_and_no_nodes_are_an_empty_tree():
    assert len(sequoia((0.6, 0.2), 8, 0)) == 0
    assert len(sequoia((0.6, 0.2), 0, 8)) == 0


@given(falling, st.integers(0, 24), st.integers(0, 5))
def test_sequoia_is_well_formed_and_takes_the_likeliest_nodes_first(acceptance, nodes, depth):
    shape = sequoia(acceptance, nodes, depth)
    assert_well_formed(shape)
    assert len(shape) <= nodes
    assert max(shape.depths, default=0) <= depth
    reached = [prod(acceptance[r] for r in shape.path_token_ids(n)) for n in range(len(shape))]
    assert all(a >= b - 1e-12 for a, b in pairwise(reached))


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ([], "not increase, got \\[\\]"),
        ([0.2, 0.3], "got \\[0.2, 0.3\\]"),
        ([1.5], "got \\[1.5\\]"),
        ([0.5, -0.1], "in \\[0, 1\\]"),
        ([float("nan")], "nan"),
        (0.5, "a list of numbers in \\[0, 1\\] that do not increase, got 0.5"),
        (["0.5"], "got \\['0.5'\\]"),
    ],
)
def test_bad_acceptances_are_refused(bad, said):
    with pytest.raises(ValueError, match=said):
        sequoia(bad, 4, 4)


def test_expansion_gives_every_node_of_a_level_as_many_children():
    shape = expansion([2, 2, 1])
    assert shape.parents == (-1, -1, 0, 0, 1, 1, 2, 3, 4, 5)
    assert shape.token_ids == (0, 1, 0, 1, 0, 1, 0, 0, 0, 0)
    assert shape.depths == (1, 1, 2, 2, 2, 2, 3, 3, 3, 3)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_expansion_has_the_product_of_the_widths_at_each_level(widths):
    shape = expansion(widths)
    assert_well_formed(shape)
    for depth in range(1, len(widths) + 1):
        assert shape.depths.count(depth) == prod(widths[:depth])
    for node, depth in [(ROOT, 0), *enumerate(shape.depths)]:
        assert len(shape.children(node)) == (widths[depth] if depth < len(widths) else 0)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 40))
def test_a_cut_expansion_keeps_the_nodes_nearest_to_the_root(widths, max_nodes):
    whole, cut = expansion(widths), expansion(widths, max_nodes)
    assert_well_formed(cut)
    assert cut == whole.prune(range(min(max_nodes, len(whole))))[0]
    assert list(cut.depths) == sorted(whole.depths)[:max_nodes]


def test_a_cut_expansion_costs_what_is_kept():
    """The whole tree would have four billion nodes."""
    assert len(expansion([4] * 16, 8)) == 8
