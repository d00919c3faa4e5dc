"""Token recycling: which rows fill the matrix, whose rows a sequence follows, and the tree's
shape."""

from __future__ import annotations

import pytest
from lookup_rows import ask, make, num_read_per_step, row_of, tell

from folospec.core.token_tree import TokenTree
from folospec.spec.drafters import token_recycling
from folospec.spec.drafters.token_recycling import FALL, FIRST
from folospec.spec.proposal import Proposal


def teach(drafter, adjacency, seq_id="teacher"):
    """Let the target have rows after these tokens, all children of one root."""
    tree = TokenTree(list(adjacency), [-1] * len(adjacency))
    tops = [
        [0] * drafter.top_k,
        *([*row, *[0] * (drafter.top_k - len(row))] for row in adjacency.values()),
    ]
    tell(drafter, Proposal(tree), top_token_ids=tops, seq_id=seq_id, is_own=False)


def test_the_tree_follows_the_candidates_from_the_root():
    drafter = make("token_recycling", top_k=2, num_speculative_tokens=5)
    teach(drafter, {1: [2, 3], 2: [4, 5], 4: [6, 7]})
    tree = ask(drafter, [9, 1], max_depth=2).tree
    #    root - 2 - 4
    #       |     `- 5
    #       `- 3         nothing is known after 3
    assert sorted(tuple(tree.path_token_ids(node)) for node in range(len(tree))) == [
        (2,),
        (2, 4),
        (2, 5),
        (3,),
    ]


def test_an_unknown_token_has_no_children():
    drafter = make("token_recycling")
    assert ask(drafter, [1, 2]) is None
    teach(drafter, {2: [3]})
    assert ask(drafter, [1, 2], max_draft_tokens=1).tree.token_ids == (3,)
    assert ask(drafter, [1, 5]) is None


def test_every_verified_row_fills_the_matrix_accepted_or_not_and_no_scratch_row():
    drafter = make("token_recycling", top_k=2)
    ask(drafter, [8, 1])
    tree = TokenTree([10, 11, 12, 13], [-1, 0, -1, 2])
    proposal = Proposal(tree, candidate=[True, True, True, False])
    tops = [[10, 20], [11, 21], [31, 32], [22, 23], [41, 42]]
    tell(drafter, proposal, [0, 1], 31, tops, is_own=False)
    rows = {token: drafter._adjacency[token].tolist() for token in (1, 10, 11, 12, 13)}
    assert rows == {1: [10, 20], 10: [11, 21], 11: [31, 32], 12: [22, 23], 13: [-1, -1]}
    assert drafter.stats()["num_known_tokens"] == 4
    tell(drafter, None, next_token_id=33, top_token_ids=[[33, 34]])
    assert drafter._adjacency[31].tolist() == [33, 34], "the root of a step without a draft"


def test_of_rows_with_one_token_the_accepted_one_is_kept():
    drafter = make("token_recycling", top_k=2)
    ask(drafter, [8, 1])
    tree = TokenTree([10, 12, 10], [-1, -1, 1])
    tops = [[10, 12], [50, 51], [0, 1], [60, 61]]
    tell(drafter, Proposal(tree), [0], 50, tops, is_own=False)
    assert drafter._adjacency[10].tolist() == [50, 51]
    tell(drafter, Proposal(tree), [1], 10, tops, is_own=False)
    assert drafter._adjacency[10].tolist() == [60, 61]


def test_a_sequence_follows_its_own_rows_and_else_those_of_all():
    drafter = make("token_recycling", top_k=1, num_speculative_tokens=1)
    ask(drafter, [9, 9], seq_id="a")
    teach(drafter, {1: [5], 2: [6]}, seq_id="a")
    teach(drafter, {1: [7]}, seq_id="b")
    assert ask(drafter, [9, 1], seq_id="a").tree.token_ids == (5,)
    assert ask(drafter, [9, 1], seq_id="c").tree.token_ids == (7,)
    assert ask(drafter, [9, 2], seq_id="c").tree.token_ids == (6,)
    drafter.drop("a")
    assert ask(drafter, [9, 1], seq_id="a").tree.token_ids == (7,)


def test_a_sequence_that_was_never_asked_about_teaches_its_nodes_but_not_its_root():
    drafter = make("token_recycling", top_k=1)
    tell(drafter, None, next_token_id=3, top_token_ids=[[3]])
    tell(drafter, Proposal(TokenTree.chain([7])), [], 3, [[3], [4]], is_own=False)
    assert drafter.stats()["num_known_tokens"] == 1
    assert drafter._adjacency[7].tolist() == [4]


def test_the_shape_takes_the_likeliest_nodes_and_a_smaller_budget_a_part_of_it():
    drafter = make("token_recycling", num_speculative_tokens=24)
    teach(drafter, {token: list(range(token, token + 8)) for token in range(40)})
    large = ask(drafter, [0], max_draft_tokens=24)
    small = ask(drafter, [0], max_draft_tokens=9)
    assert len(large.tree) == 24
    assert small.tree == TokenTree(large.tree.token_ids[:9], large.tree.parents[:9])
    children = [len(large.tree.children(node)) for node in (-1, *large.tree.children())]
    assert children[0] >= 4
    assert children[1:] == sorted(children[1:], reverse=True)
    reached = []
    for node in range(24):
        path = large.tree.path(node)
        above = [-1, *path]
        ranks = [large.tree.children(p).index(n) for p, n in zip(above, path, strict=False)]
        reached.append(FIRST ** len(path) * FALL ** sum(ranks))
    assert reached == sorted(reached, reverse=True)


def test_the_tree_keeps_to_the_limits_of_the_row():
    drafter = make("token_recycling")
    teach(drafter, {token: list(range(8)) for token in range(8)})
    assert len(ask(drafter, [0], max_draft_tokens=7).tree) == 7
    assert max(ask(drafter, [0], max_draft_tokens=32, max_depth=2).tree.depths) == 2
    flat = make("token_recycling", max_depth=1)
    teach(flat, {0: list(range(8))})
    assert set(ask(flat, [0], max_draft_tokens=32).tree.depths) == {1}


def test_a_rule_for_chains_gets_the_first_candidates():
    drafter = make("token_recycling", acceptance="block")
    teach(drafter, {token: [token + 1, 0] for token in range(8)})
    tree = ask(drafter, [1], max_draft_tokens=32).tree
    assert tree == TokenTree.chain([2, 3, 4, 5, 6, 7])
    assert drafter.num_speculative_tokens == 6


def test_confidence_follows_what_was_accepted_and_siblings_share_at_most_one():
    drafter = make("token_recycling", top_k=4, num_speculative_tokens=4, max_depth=1)
    teach(drafter, {1: [2, 3, 4, 5]})
    before = ask(drafter, [1]).confidence
    assert before == pytest.approx([FIRST * FALL**rank for rank in range(4)])
    tops = [[2, 3, 4, 5]] * 5
    for _ in range(40):
        tell(drafter, ask(drafter, [1]), [1], 1, tops)
    after = ask(drafter, [1]).confidence
    assert after[1] > 0.8
    assert max(after[0], *after[2:]) < 0.1
    assert sum(after) <= 1.0 + 1e-12


def test_a_step_does_not_read_the_context():
    assert {num_read_per_step(make("token_recycling"), n) for n in (70, 7000)} == {1}


def test_sizes_are_reported_and_a_dropped_sequence_leaves_nothing_of_its_own():
    drafter = make("token_recycling", vocab_size=100)
    ask(drafter, [1], seq_id="a")
    teach(drafter, {1: [2], 3: [4]}, seq_id="a")
    sizes = {"adjacency_bytes": 100 * 8 * 4, "num_known_tokens": 2, "num_own_rows": 2}
    assert drafter.stats() == sizes
    drafter.drop("a")
    assert drafter.stats()["num_own_rows"] == 0
    assert not drafter._roots


def test_a_vocabulary_smaller_than_the_rows_is_served():
    drafter = make("token_recycling", vocab_size=3)
    assert drafter.needs.num_top_tokens == 3
    teach(drafter, {1: [2, 0, 1]})
    assert set(ask(drafter, [1], max_draft_tokens=3).tree.token_ids) <= {0, 1, 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "top_k must be an integer of at least 1, got 0"),
        ({"max_depth": True}, "max_depth must be an integer of at least 1, got True"),
        ({"width": 1}, "unknown option"),
        ({"model": "x"}, "has no model"),
    ],
)
def test_bad_options_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make("token_recycling", **settings)


def test_rows_are_answered_in_their_order():
    drafter = make("token_recycling", top_k=1, num_speculative_tokens=1)
    teach(drafter, {1: [5], 2: [6]})
    asked = [row_of([1], "a"), row_of([3], "b"), row_of([2], "c")]
    answers = drafter.propose(asked)
    assert [a and a.tree.token_ids for a in answers] == [(5,), None, (6,)]
    assert token_recycling.UNKNOWN == -1
