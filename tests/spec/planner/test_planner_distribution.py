"""Pruning keeps the distribution of sampled drafts: enumeration in float64, with the planner
itself."""

from __future__ import annotations

import pytest
import torch
from enumeration import TOYS, Toy, distance, draft, most_likely, sampled, without_replacement

from folospec.core.token_tree import TokenTree
from folospec.spec.planner.plan_terms import Source
from folospec.spec.planner.planner import Planner
from folospec.spec.planner.step_cost import CostCurve, StepShape
from folospec.spec.proposal import Proposal
from folospec.spec.verify import verify_block, verify_rejection

EXACT, SEEN = 1e-12, 0.05
SHAPE = StepShape(1, 1)
DEAR = CostCurve({1: 1.0, 2: 1.42, 64: 1.0 + 63 * 0.42})
"""A row that is accepted with a chance of less than about 0.42 does not pay."""
PAIRS = CostCurve({1: 1.0, 2: 1.8, 64: 1.8})
"""A row beside the root does not pay, and more of them cost nothing on top."""
EACH_TOY = pytest.mark.parametrize("toy", TOYS[::2], ids=lambda toy: f"{toy.kind}-{toy.seed}")


def pruned(proposal, confidence, *, curve=DEAR, follows_draws=False):
    """What the planner leaves of a proposal, given what is stated of its nodes."""
    planner = Planner([Source("draft", 8, False)], curve)
    tree = proposal.tree
    scored = planner.score(
        "draft", "s", tree.parents, tree.depths, confidence, follows_draws=follows_draws
    )
    planner.prune([scored], SHAPE, 0.0)
    return proposal.prune(scored.kept)


def by_rank(parents, chances):
    """Chances that look at a node's place among its siblings and at nothing else."""
    ranks = [sum(parents[n] == parent for n in range(i)) for i, parent in enumerate(parents)]
    return [chances[rank] for rank in ranks]


def by_token(toy, proposal):
    """What a drafter must not say of drawn tokens: how likely they are."""
    tree = proposal.tree
    paths = [tuple(tree.path_token_ids(node)) for node in range(len(tree))]
    return [toy.draft(path[:-1])[path[-1]] for path in paths]


SHAPES = {"chain": [-1, 0, 1], "fork": [-1, -1], "tree": [-1, -1, 0, 0, 1]}


@EACH_TOY
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("drawing", [sampled, without_replacement], ids=lambda d: d.__name__)
def test_pruning_by_rank_keeps_the_distribution(toy, shape, drawing):
    parents, sizes = SHAPES[shape], set()

    def drafter(choices):
        proposal = pruned(draft(toy, parents, drawing, choices), by_rank(parents, [0.7, 0.2, 0.1]))
        sizes.add(len(proposal))
        return proposal

    assert distance(toy, drafter, verify_rejection, 3) < EXACT
    assert len(sizes) == 1
    assert 0 < sizes.pop() < len(parents)


@EACH_TOY
def test_pruning_a_chain_by_depth_keeps_the_distribution_of_block_verification(toy):
    def drafter(choices):
        return pruned(draft(toy, SHAPES["chain"], sampled, choices), [0.7, 0.7, 0.5])

    assert distance(toy, drafter, verify_block, 3) < EXACT


@EACH_TOY
def test_deterministic_drafts_may_be_pruned_by_their_tokens(toy):
    def drafter(choices):
        proposal = draft(toy, SHAPES["tree"], most_likely, choices)
        return pruned(proposal, by_token(toy, proposal))

    assert distance(toy, drafter, verify_rejection, 3) < EXACT


def test_control_pruning_drawn_tokens_by_their_probability_is_seen():
    def drafter_of(toy):
        def drafter(choices):
            proposal = draft(toy, [-1], sampled, choices)
            return pruned(proposal, by_token(toy, proposal))

        return drafter

    toys = [Toy("dense", seed, vocab_size=4) for seed in range(200, 210)]
    distances = sorted(distance(toy, drafter_of(toy), verify_rejection, 2) for toy in toys)
    assert distances[len(distances) // 2] > SEEN


def phrase_behind_even_tokens(toy, *, follows_draws, sizes):
    """A drafter of one drawn token, and behind an even one another that is certain."""

    def drafter(choices):
        root = draft(toy, [-1], sampled, choices)
        token_id = root.tree.token_ids[0]
        proposal = root
        if token_id % 2 == 0:
            phrase = torch.zeros_like(root.draft_probs)
            phrase[0, 1] = 1.0
            distributions = torch.cat([root.draft_probs, phrase])
            proposal = Proposal(TokenTree([token_id, 1], [-1, 0]), draft_probs=distributions)
        left = pruned(proposal, None, curve=PAIRS, follows_draws=follows_draws)
        sizes.add((len(proposal), len(left)))
        return left

    return drafter


FOUR_TOKENS = [Toy("dense", seed, vocab_size=4) for seed in range(200, 204)]


@pytest.mark.parametrize("toy", FOUR_TOKENS, ids=lambda toy: str(toy.seed))
def test_a_draft_whose_shape_follows_a_drawn_token_is_kept_whole_and_keeps_the_distribution(toy):
    sizes = set()
    drafter = phrase_behind_even_tokens(toy, follows_draws=True, sizes=sizes)
    assert distance(toy, drafter, verify_rejection, 3) < EXACT
    assert sizes == {(1, 1), (2, 2)}


def test_control_pruning_by_a_shape_that_follows_a_drawn_token_is_seen():
    sizes = set()
    distances = [
        distance(
            toy,
            phrase_behind_even_tokens(toy, follows_draws=False, sizes=sizes),
            verify_rejection,
            3,
        )
        for toy in FOUR_TOKENS
    ]
    assert sizes == {(1, 0), (2, 2)}
    assert max(distances) > SEEN


@pytest.mark.parametrize("follows_draws", [True, False])
def test_what_a_draft_counts_for_beside_others_looks_at_its_shape_only_if_that_is_fixed(
    follows_draws,
):
    worths = set()
    for parents in ([-1], [-1, 0, 1, 2]):
        planner = Planner([Source("draft", 8, False)], DEAR)
        scored = planner.score(
            "draft", "s", parents, range(1, len(parents) + 1), None, follows_draws=follows_draws
        )
        worths.add(scored.net(0.1))
    assert len(worths) == (1 if follows_draws else 2)
