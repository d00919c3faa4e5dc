"""A proposal fits its tree, and loses nodes without losing track of the others."""

import pytest
import torch

from folospec.core.token_tree import TokenTree
from folospec.spec.proposal import Proposal

TREE = TokenTree([5, 6, 7, 8], [-1, 0, -1, 1])


def test_proposal_may_be_empty():
    proposal = Proposal(TokenTree([], []), draft_probs=torch.empty(0, 10))
    assert len(proposal) == proposal.num_draft_tokens == 0


def test_proposal_counts_only_nodes_that_are_verified():
    proposal = Proposal(TREE, candidate=[True, False, True, False])
    assert len(proposal) == 4
    assert proposal.num_draft_tokens == 2
    assert [proposal.is_candidate(node) for node in range(4)] == [True, False, True, False]
    assert Proposal(TREE).num_draft_tokens == 4


def test_pruned_proposal_keeps_what_belongs_to_its_nodes():
    probs = torch.rand(4, 10)
    proposal = Proposal(
        TREE,
        draft_probs=probs,
        confidence=[0.9, 0.8, 0.7, 0.6],
        candidate=[True, True, False, True],
        draft_slots={"mine": [1, 2, None, 4]},
    )
    pruned = proposal.prune([0, 2])
    assert list(pruned.tree.token_ids) == [5, 7]
    assert list(pruned.tree.parents) == [-1, -1]
    assert torch.equal(pruned.draft_probs, probs[[0, 2]])
    assert pruned.confidence == (0.9, 0.7)
    assert pruned.candidate == (True, False)
    assert pruned.draft_slots == {"mine": (1, None)}
    assert len(proposal) == 4


def test_pruned_proposal_drops_what_hung_under_a_dropped_node():
    assert list(Proposal(TREE).prune([0, 2, 3]).tree.token_ids) == [5, 7]


def test_proposal_pruned_to_nothing_is_empty():
    pruned = Proposal(TREE, draft_probs=torch.rand(4, 10)).prune([])
    assert len(pruned) == 0
    assert pruned.draft_probs.shape == (0, 10)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"confidence": [0.5]}, "confidence .* 4 nodes, got 1"),
        ({"candidate": [True] * 5}, "candidate .* 4 nodes, got 5"),
        ({"draft_slots": {"mine": []}}, "draft_slots.* 4 nodes, got 0"),
        ({"draft_probs": torch.rand(3, 10)}, r"\[4, vocab_size\], got \[3, 10\]"),
        ({"draft_probs": torch.rand(4)}, r"\[4, vocab_size\], got \[4\]"),
    ],
)
def test_proposal_that_does_not_fit_its_tree_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Proposal(TREE, **fields)
