"""What a merged tree is made of: its paths, their order, what is cut, and what goes with a node."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from folospec.core.token_tree import ROOT, TokenTree
from folospec.spec.merge import merge_proposals
from folospec.spec.proposal import Proposal

VOCAB_SIZE = 5

#   a: root - 1 - 2        b: root - 1 - 3
#                                 `- 4
A, B = TokenTree([1, 2], [-1, 0]), TokenTree([1, 4, 3], [-1, -1, 0])


@st.composite
def trees(draw, duplicates=True):
    token_ids, parents, seen = [], [], set()
    for node in range(draw(st.integers(1, 7))):
        parent, token_id = draw(st.integers(-1, node - 1)), draw(st.integers(0, 2))
        if not duplicates and (parent, token_id) in seen:
            return TokenTree(token_ids, parents)
        seen.add((parent, token_id))
        token_ids.append(token_id)
        parents.append(parent)
    return TokenTree(token_ids, parents)


several = st.lists(trees(), min_size=1, max_size=3)
each_way = pytest.mark.parametrize("unite", [True, False], ids=["united", "side by side"])


def merge(proposals, unite, max_nodes=99, max_draft_tokens=99, max_depth=99):
    proposals = [Proposal(p) if isinstance(p, TokenTree) else p for p in proposals]
    return merge_proposals(
        proposals,
        max_nodes=max_nodes,
        max_draft_tokens=max_draft_tokens,
        max_depth=max_depth,
        unite=unite,
        vocab_size=VOCAB_SIZE,
    )


def paths(tree):
    return [tuple(tree.path_token_ids(node)) for node in range(len(tree))]


def nested(tree, node=ROOT):
    """The tree as (token, what is below it) in the order of the siblings."""
    return [(tree.token_ids[child], nested(tree, child)) for child in tree.children(node)]


# The tree


def test_equal_paths_become_one_node():
    proposal, sources = merge([A, B], unite=True)
    assert nested(proposal.tree) == [(1, [(2, []), (3, [])]), (4, [])]
    assert sources == [{0: 0, 1: 1}, {0: 0, 1: 2, 2: 3}]


def test_side_by_side_equal_paths_stay_siblings():
    proposal, sources = merge([A, B], unite=False)
    assert nested(proposal.tree) == [(1, [(2, [])]), (1, [(3, [])]), (4, [])]
    assert sources == [{0: 0, 1: 1}, {0: 2, 1: 3, 2: 4}]


@given(several)
def test_a_united_tree_has_every_path_of_its_parts_once(parts):
    tree = merge(parts, unite=True)[0].tree
    assert len(set(paths(tree))) == len(tree)
    assert set(paths(tree)) == {path for part in parts for path in paths(part)}


@given(several)
def test_side_by_side_the_parts_stay_as_they_are(parts):
    tree = merge(parts, unite=False)[0].tree
    assert nested(tree) == [branch for part in parts for branch in nested(part)]


@each_way
@given(parts=several)
def test_a_node_is_found_again_with_its_path(unite, parts):
    proposal, sources = merge(parts, unite)
    found = paths(proposal.tree)
    for part, nodes in zip(parts, sources, strict=True):
        assert {node: found[place] for node, place in nodes.items()} == dict(enumerate(paths(part)))
    used = [place for nodes in sources for place in nodes.values()]
    assert set(used) == set(range(len(proposal)))
    if not unite:
        assert len(used) == len(proposal)


@given(several)
def test_united_siblings_are_tried_in_the_order_in_which_they_were_first_proposed(parts):
    tree = merge(parts, unite=True)[0].tree
    for path in [(), *paths(tree)]:
        expected = list(dict.fromkeys(p for part in parts for p in paths(part) if p[:-1] == path))
        node = paths(tree).index(path) if path else ROOT
        assert [(*path, tree.token_ids[child]) for child in tree.children(node)] == expected


# Limits


@each_way
@given(parts=several, max_nodes=st.integers(0, 12))
def test_of_too_many_nodes_the_last_are_left_out(unite, parts, max_nodes):
    whole, _ = merge(parts, unite)
    cut, sources = merge(parts, unite, max_nodes=max_nodes)
    assert cut.tree == whole.tree.prune(range(min(max_nodes, len(whole))))[0]
    found = paths(cut.tree)
    for part, nodes in zip(parts, sources, strict=True):
        assert all(found[place] == paths(part)[node] for node, place in nodes.items())
        if unite:
            assert set(nodes) == {n for n, path in enumerate(paths(part)) if path in found}


@each_way
@given(parts=several, max_depth=st.integers(0, 4))
def test_nodes_that_are_too_deep_are_left_out(unite, parts, max_depth):
    shallow = [
        part.prune([n for n in range(len(part)) if part.depths[n] <= max_depth])[0]
        for part in parts
    ]
    cut, sources = merge(parts, unite, max_depth=max_depth)
    assert cut.tree == merge(shallow, unite)[0].tree
    for part, nodes in zip(parts, sources, strict=True):
        assert set(nodes) == {n for n in range(len(part)) if part.depths[n] <= max_depth}


@each_way
@given(parts=several, data=st.data(), limit=st.integers(0, 8))
def test_no_more_nodes_are_verified_than_may_be(unite, parts, data, limit):
    """Scratch nodes have slots, and no share in the budget of draft tokens."""
    wanted = [data.draw(st.lists(st.booleans(), min_size=len(p), max_size=len(p))) for p in parts]
    proposals = [Proposal(p, candidate=c) for p, c in zip(parts, wanted, strict=True)]
    proposal, sources = merge(proposals, unite, max_draft_tokens=limit)
    assert proposal.num_draft_tokens <= limit
    for node in range(len(proposal)):
        asked = [
            candidate[own]
            for candidate, nodes in zip(wanted, sources, strict=True)
            for own, place in nodes.items()
            if place == node
        ]
        assert proposal.is_candidate(node) == any(asked)
    if limit >= sum(map(sum, wanted)):
        assert proposal.tree == merge(proposals, unite)[0].tree


@each_way
def test_the_deep_nodes_of_the_first_leave_their_room_to_the_second(unite):
    first, second = TokenTree.chain([0, 1, 2]), TokenTree.chain([3, 4])
    tree = merge([first, second], unite, max_nodes=4, max_depth=2)[0].tree
    assert nested(tree) == [(0, [(1, [])]), (3, [(4, [])])]


# What goes with a node


@each_way
@given(parts=st.lists(trees(duplicates=False), min_size=1, max_size=3), data=st.data())
def test_every_drafter_finds_its_slots(unite, parts, data):
    offset = st.none() | st.integers(1, 20)
    slots = [data.draw(st.lists(offset, min_size=len(p), max_size=len(p))) for p in parts]
    owners = [f"owner {number}" for number in range(len(parts))]
    proposals = [
        Proposal(part, draft_slots={owner: values})
        for part, owner, values in zip(parts, owners, slots, strict=True)
    ]
    proposal, sources = merge(proposals, unite, max_nodes=8)
    assert set(proposal.draft_slots) == set(owners)
    for owner, values, nodes in zip(owners, slots, sources, strict=True):
        expected = [None] * len(proposal)
        for node, place in nodes.items():
            expected[place] = values[node]
        assert proposal.draft_slots[owner] == tuple(expected)


@pytest.mark.parametrize("slots", [[1, None, 2], [None, 1, 2]])
def test_a_node_of_two_duplicates_has_the_slot_of_the_one_that_was_run(slots):
    duplicates = Proposal(TokenTree([3, 3, 4], [-1, -1, 0]), draft_slots={"model": slots})
    assert merge([duplicates, A], unite=True)[0].draft_slots["model"][:2] == (1, 2)


def test_a_drafter_without_kv_adds_no_slots():
    proposals = [A, Proposal(B, draft_slots={"model": [2, None, 1]})]
    slots = [merge(proposals, unite)[0].draft_slots for unite in (True, False)]
    assert slots == [{"model": (2, None, None, 1)}, {"model": (None, None, 2, None, 1)}]


def test_the_surest_proposer_of_a_node_gives_its_confidence():
    proposals = [Proposal(A, confidence=[0.5, 0.4]), Proposal(B, confidence=[0.7, 0.2, 0.6])]
    assert merge(proposals, unite=True)[0].confidence == (0.7, 0.4, 0.2, 0.6)
    assert merge(proposals[::-1], unite=True)[0].confidence == (0.7, 0.2, 0.6, 0.4)


@each_way
def test_confidences_of_merged_siblings_add_up_to_at_most_one(unite):
    proposals = [Proposal(A, confidence=[0.8, 0.4]), Proposal(B, confidence=[0.8, 0.2, 0.6])]
    proposal, _ = merge(proposals, unite)
    for node in (ROOT, *range(len(proposal))):
        siblings = [proposal.confidence[child] for child in proposal.tree.children(node)]
        assert sum(siblings) <= 1.0 + 1e-9
    side_by_side = [0.8 / 1.8, 0.4, 0.8 / 1.8, 0.2 / 1.8, 0.6]
    assert proposal.confidence == pytest.approx([0.8, 0.4, 0.2, 0.6] if unite else side_by_side)


def test_a_proposer_without_opinion_adds_no_confidence():
    proposals = [Proposal(A), Proposal(B, confidence=[0.7, 0.2, 0.6])]
    assert merge(proposals, unite=True)[0].confidence == (0.7, 0.0, 0.2, 0.6)
    assert merge([A, B], unite=True)[0].confidence is None


def test_a_node_is_verified_if_one_of_its_proposers_wants_it_verified():
    proposals = [Proposal(A, candidate=[True, False]), Proposal(B, candidate=[False, True, False])]
    assert merge(proposals, unite=True)[0].candidate == (True, False, True, False)
    assert merge(proposals, unite=False)[0].candidate == (True, False, False, True, False)
    proposals[0] = Proposal(A)
    assert merge(proposals, unite=True)[0].candidate == (True, True, True, False)
    assert merge([A, B], unite=True)[0].candidate is None


@given(several, st.data())
def test_side_by_side_every_node_keeps_its_distribution(parts, data):
    torch.manual_seed(0)
    proposals = [
        Proposal(
            part,
            draft_probs=torch.rand(len(part), VOCAB_SIZE) if data.draw(st.booleans()) else None,
        )
        for part in parts
    ]
    proposal, sources = merge(proposals, unite=False, max_nodes=10)
    if all(p.draft_probs is None for p in proposals):
        assert proposal.draft_probs is None
        return
    assert proposal.draft_probs.shape == (len(proposal), VOCAB_SIZE)
    for part, nodes in zip(proposals, sources, strict=True):
        for node, place in nodes.items():
            one_hot = torch.eye(VOCAB_SIZE)[part.tree.token_ids[node]]
            distribution = one_hot if part.draft_probs is None else part.draft_probs[node]
            assert torch.equal(proposal.draft_probs[place], distribution)


def test_united_nodes_have_no_distributions():
    distributions = torch.full((2, VOCAB_SIZE), 1 / VOCAB_SIZE)
    assert merge([Proposal(A, draft_probs=distributions), B], unite=True)[0].draft_probs is None


def test_the_merged_proposal_is_named_after_its_drafters():
    proposals = [Proposal(A, drafter=name) for name in ("suffix", "ngram", "suffix")]
    assert merge(proposals, unite=True)[0].drafter == "suffix+ngram"
