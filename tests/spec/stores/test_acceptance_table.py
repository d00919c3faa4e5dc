"""The estimates of drafters without a model, and which of their nodes were put to the test."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folospec.core.token_tree import ROOT, TokenTree
from folospec.spec.drafters.base import StepResult
from folospec.spec.proposal import Proposal
from folospec.spec.stores.acceptance_table import AcceptanceTable, share_among_siblings, tried_nodes
from folospec.spec.verify import Verdict

#   root -- 0 -- 1 -- 2
#     `---- 3 -- 4
TREE = TokenTree([7, 8, 9, 6, 5], [-1, 0, 1, -1, 3])


def test_an_unknown_kind_is_estimated_by_the_prior():
    table = AcceptanceTable(prior=0.3)
    assert table.estimate("rare") == pytest.approx(0.3)
    assert table.estimate("rare", prior=0.8) == pytest.approx(0.8)
    assert len(table) == 0


def test_the_prior_is_worth_its_weight_in_trials():
    table = AcceptanceTable(prior=0.25, weight=4.0)
    for accepted in (True, True, False):
        table.record("seen", accepted)
    assert table.estimate("seen") == pytest.approx((0.25 * 4 + 2) / (4 + 3))
    assert table.estimate("seen", prior=0.5) == pytest.approx((0.5 * 4 + 2) / (4 + 3))
    assert table.estimate("other") == pytest.approx(0.25)


@given(st.lists(st.booleans(), max_size=60), st.floats(0.01, 0.99), st.floats(0.1, 50.0))
def test_an_estimate_lies_between_the_prior_and_what_was_seen(trials, prior, weight):
    table = AcceptanceTable(prior, weight)
    for accepted in trials:
        table.record(("match", 3), accepted)
    seen = sum(trials) / len(trials) if trials else prior
    estimate = table.estimate(("match", 3))
    assert min(prior, seen) - 1e-9 <= estimate <= max(prior, seen) + 1e-9
    assert 0.0 < estimate < 1.0


def test_many_trials_outweigh_the_prior():
    table = AcceptanceTable(prior=0.9)
    for number in range(4000):
        table.record("seen", number % 5 == 0)
    assert table.estimate("seen") == pytest.approx(0.2, abs=0.005)


def test_kinds_beyond_the_limit_share_one_entry():
    table = AcceptanceTable(prior=0.5, weight=1.0, limit=2)
    for key in ("a", "b", "c", "d"):
        for _ in range(100):
            table.record(key, key in "ac")
    assert len(table) == 3
    assert table.estimate("a") > 0.9
    assert table.estimate("b") < 0.1
    assert table.estimate("c") == table.estimate("d") == table.estimate("e")
    assert 0.4 < table.estimate("c") < 0.6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prior": 0.0}, "prior must be in \\(0, 1\\), got 0.0"),
        ({"prior": 1.0}, "got 1.0"),
        ({"prior": float("nan")}, "got nan"),
        ({"weight": 0.0}, "weight must be above 0, got 0.0"),
    ],
)
def test_a_table_that_could_not_learn_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        AcceptanceTable(**arguments)


# Which nodes were tried


def outcome(path, candidate=None, own_nodes=None):
    own_nodes = {n: n for n in range(5)} if own_nodes is None else own_nodes
    proposal = Proposal(TREE, candidate=candidate)
    return StepResult("s", proposal, Verdict(path, 0), [], own_nodes=own_nodes)


@pytest.mark.parametrize(
    ("path", "tried"),
    [
        ([], {0: False, 3: False}),
        ([0], {0: True, 3: False, 1: False}),
        ([0, 1, 2], {0: True, 3: False, 1: True, 2: True}),
        ([3, 4], {0: False, 3: True, 4: True}),
    ],
)
def test_a_node_was_tried_if_its_parent_was_accepted(path, tried):
    assert dict(tried_nodes(outcome(path))) == tried


def test_scratch_nodes_were_not_tried():
    assert dict(tried_nodes(outcome([0], [True, True, True, False, True]))) == {0: True, 1: False}


def test_nodes_are_named_as_the_drafter_knows_them():
    """In the merged tree its node 0 is node 3, its node 1 is node 4, and node 2 was left out."""
    assert dict(tried_nodes(outcome([3], own_nodes={0: 3, 1: 4}))) == {0: True, 1: False}
    assert dict(tried_nodes(outcome([0, 1], own_nodes={0: 3, 1: 4}))) == {0: False}
    assert dict(tried_nodes(outcome([0], own_nodes={}))) == {}


def test_nothing_was_tried_where_nothing_was_verified():
    assert list(tried_nodes(StepResult("s", None, None, [1], own_nodes={0: 0}))) == []
    assert list(tried_nodes(StepResult("s", Proposal(TREE), None, [1], own_nodes={0: 0}))) == []


# Siblings


@given(st.lists(st.tuples(st.integers(-1, 3), st.floats(0.0, 1.0)), max_size=12))
def test_shared_chances_of_siblings_add_up_to_at_most_one(nodes):
    parents = [min(parent, number - 1) for number, (parent, _) in enumerate(nodes)]
    chances = [chance for _, chance in nodes]
    shared = share_among_siblings(parents, chances)
    for parent in set(parents):
        before = [c for p, c in zip(parents, chances, strict=True) if p == parent]
        after = [c for p, c in zip(parents, shared, strict=True) if p == parent]
        assert sum(after) <= 1.0 + 1e-9
        if sum(before) <= 1.0:
            assert after == before
        else:
            assert after == pytest.approx([chance / sum(before) for chance in before])


def test_chances_of_cousins_are_not_shared():
    assert share_among_siblings([ROOT, ROOT, 0, 1], [0.8, 0.8, 0.9, 0.9]) == [0.5, 0.5, 0.9, 0.9]
