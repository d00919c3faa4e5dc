"""Pruning keeps the law of sampled drafts: enumeration in float64, with the planner itself."""

from __future__ import annotations

import pytest
import torch
from enumeration import TOYS, Toy, distance, draft, most_likely, sampled, without_replacement

from folospec.spec.plan_terms import Source
from folospec.spec.planner import Planner
from folospec.spec.step_cost import CostCurve, StepShape
from folospec.spec.verify import verify_block, verify_rejection

torch.set_num_threads(1)

EXACT, SEEN = 1e-12, 0.05
SHAPE = StepShape(1, 1)
DEAR = CostCurve({1: 1.0, 2: 1.42, 64: 1.0 + 63 * 0.42})
"""A row that is accepted with a chance of less than about 0.42 does not pay."""
EACH_TOY = pytest.mark.parametrize("toy", TOYS[::2], ids=lambda toy: f"{toy.kind}-{toy.seed}")


def pruned(proposal, stated):
    """What the planner leaves of a proposal, given what is stated of its nodes."""
    planner = Planner([Source("draft", 8, False)], DEAR)
    tree = proposal.tree
    offer = planner.offer("draft", "s", tree.parents, tree.depths, stated)
    planner.prune([offer], SHAPE, 0.0)
    return proposal.prune(offer.kept)


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
def test_pruning_by_rank_keeps_the_law(toy, shape, drawing):
    parents, sizes = SHAPES[shape], set()

    def drafter(walk):
        proposal = pruned(draft(toy, parents, drawing, walk), by_rank(parents, [0.7, 0.2, 0.1]))
        sizes.add(len(proposal))
        return proposal

    assert distance(toy, drafter, verify_rejection, 3) < EXACT
    assert len(sizes) == 1
    assert 0 < sizes.pop() < len(parents)


@EACH_TOY
def test_pruning_a_chain_by_depth_keeps_the_law_of_block_verification(toy):
    def drafter(walk):
        return pruned(draft(toy, SHAPES["chain"], sampled, walk), [0.7, 0.7, 0.5])

    assert distance(toy, drafter, verify_block, 3) < EXACT


@EACH_TOY
def test_deterministic_drafts_may_be_pruned_by_their_tokens(toy):
    def drafter(walk):
        proposal = draft(toy, SHAPES["tree"], most_likely, walk)
        return pruned(proposal, by_token(toy, proposal))

    assert distance(toy, drafter, verify_rejection, 3) < EXACT


def test_control_pruning_drawn_tokens_by_their_probability_is_seen():
    def drafter_of(toy):
        def drafter(walk):
            proposal = draft(toy, [-1], sampled, walk)
            return pruned(proposal, by_token(toy, proposal))

        return drafter

    toys = [Toy("dense", seed, vocab_size=4) for seed in range(200, 210)]
    distances = sorted(distance(toy, drafter_of(toy), verify_rejection, 2) for toy in toys)
    assert distances[len(distances) // 2] > SEEN
