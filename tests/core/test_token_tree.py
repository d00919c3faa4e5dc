import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from folospec.core import TokenTree

# root -- 0 -- 2, 0 -- 3, root -- 1
BUSH = TokenTree([17, 4, 9, 9], [-1, -1, 0, 0])


@st.composite
def trees(draw: st.DrawFn) -> TokenTree:
    parents = [draw(st.integers(-1, i - 1)) for i in range(draw(st.integers(0, 8)))]
    return TokenTree([draw(st.integers(0, 5)) for _ in parents], parents)


def test_chain_is_a_tree_with_one_branch() -> None:
    chain = TokenTree.chain([5, 6, 7])
    assert chain.is_chain
    assert chain.parents == (-1, 0, 1)
    assert chain.depths == (1, 2, 3)
    assert not BUSH.is_chain


def test_an_empty_tree_is_legal() -> None:
    empty = TokenTree.chain([])
    assert len(empty) == 0
    assert empty.is_chain
    assert empty.children() == ()
    assert empty.ancestor_mask().tolist() == [[True]]
    assert empty.render() == "root"


def test_depths_and_paths_follow_parents() -> None:
    assert BUSH.depths == (1, 1, 2, 2)
    assert BUSH.path(3) == [0, 3]
    assert BUSH.path_token_ids(3) == [17, 9]
    assert BUSH.path(-1) == []


def test_children_come_in_row_order() -> None:
    assert BUSH.children() == (0, 1)
    assert BUSH.children(0) == (2, 3)
    assert BUSH.children(3) == ()


def test_siblings_may_have_the_same_token() -> None:
    assert [BUSH.token_ids[i] for i in BUSH.children(0)] == [9, 9]


def test_ancestor_mask_of_a_chain_is_causal() -> None:
    mask = TokenTree.chain([1, 2, 3]).ancestor_mask()
    assert mask.dtype == np.bool_
    assert (mask == np.tri(4, dtype=bool)).all()


@given(trees())
def test_ancestor_mask_is_self_root_and_path(tree: TokenTree) -> None:
    mask = tree.ancestor_mask()
    assert mask.shape == (len(tree) + 1, len(tree) + 1)
    for node in range(len(tree)):
        assert set(np.flatnonzero(mask[node + 1])) == {0} | {i + 1 for i in tree.path(node)}


@given(trees(), st.sets(st.integers(0, 7)))
def test_prune_keeps_the_paths_of_what_it_keeps(tree: TokenTree, keep: set[int]) -> None:
    keep = {node for node in keep if node < len(tree)}
    pruned, kept = tree.prune(keep)
    assert kept == [i for i in range(len(tree)) if set(tree.path(i)) <= keep]
    for node, old in enumerate(kept):
        assert pruned.path_token_ids(node) == tree.path_token_ids(old)
        assert [kept[i] for i in pruned.path(node)] == tree.path(old)


def test_prune_drops_a_node_whose_parent_is_dropped() -> None:
    pruned, kept = BUSH.prune([1, 2])
    assert kept == [1]
    assert pruned == TokenTree([4], [-1])


def test_render_draws_one_node_a_line() -> None:
    assert BUSH.render().splitlines() == [
        "root",
        "|-- 0: 17",
        "|   |-- 2: 9",
        "|   `-- 3: 9",
        "`-- 1: 4",
    ]
    assert "1: <4>" in BUSH.render(lambda node: f"<{BUSH.token_ids[node]}>")


@pytest.mark.parametrize(
    ("token_ids", "parents", "words"),
    [
        ([1, 2], [-1], "equally long, got 2 and 1"),
        ([1], [0], r"parents\[0\] must be in \[-1, 0\), got 0"),
        ([1, 2], [-1, -2], r"parents\[1\] must be in \[-1, 1\), got -2"),
        ([1, -7], [-1, 0], r"token_ids\[1\] must be at least 0, got -7"),
    ],
)
def test_a_malformed_tree_is_refused(token_ids: list[int], parents: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TokenTree(token_ids, parents)


@pytest.mark.parametrize("node", [-2, 4])
def test_a_node_that_is_not_there_is_refused(node: int) -> None:
    with pytest.raises(ValueError, match=f"got {node}"):
        BUSH.path(node)
    with pytest.raises(ValueError, match=f"got {node}"):
        BUSH.children(node)
    with pytest.raises(ValueError, match=f"got {node}"):
        BUSH.prune([node])
