"""The output of every rule has exactly the distribution of plain sampling: enumeration in float64.

The same measure must see the well-known wrong rules: `test_wrong_rules.py`.
"""

import random
from itertools import product

import pytest
import torch
from enumeration import (
    DENSE_TOYS,
    DRAFTINGS,
    TOYS,
    distance,
    draft,
    drafter_of,
    explore,
    most_likely,
    plain_distribution,
    sampled,
    sampled_then_likely,
    steps,
    total_variation,
    without_replacement,
)

from folospec.core.token_tree import TokenTree
from folospec.spec.proposal import Proposal
from folospec.spec.verify import verify_block, verify_coupled, verify_rejection

EXACT = 1e-12
CHAIN, LONG_CHAIN = [-1, 0], [-1, 0, 1]
CHILDREN = [-1, -1, -1]
BUSHY = [-1, -1, 0, 1, 0]  # rows of different parents interleaved
each_toy = pytest.mark.parametrize("toy", TOYS, ids=lambda toy: f"{toy.kind}-{toy.seed}")
each_drafting = pytest.mark.parametrize("drafting", DRAFTINGS, ids=lambda d: d.__name__)


def random_shape(seed, num_nodes=4):
    rng = random.Random(seed)
    return [rng.randint(-1, node - 1) for node in range(num_nodes)]


def depth_of(parents):
    depths = [0]
    for parent in parents:
        depths.append(depths[parent + 1] + 1)
    return max(depths)


@each_drafting
@each_toy
def test_rejection_keeps_the_distribution_on_chains_and_trees(toy, drafting):
    for parents in (CHAIN, CHILDREN, *(random_shape(toy.seed + 50 * i) for i in range(3))):
        drafter = drafter_of(toy, parents, drafting)
        assert distance(toy, drafter, verify_rejection, depth_of(parents) + 1) < EXACT


@each_drafting
def test_rejection_keeps_the_distribution_on_a_bushy_tree(drafting):
    for toy in TOYS[:-2:2]:
        assert distance(toy, drafter_of(toy, BUSHY, drafting), verify_rejection, 3) < EXACT


@each_drafting
@each_toy
def test_block_keeps_the_distribution_on_chains(toy, drafting):
    for parents in (CHAIN, LONG_CHAIN):
        drafter = drafter_of(toy, parents, drafting)
        assert distance(toy, drafter, verify_block, len(parents) + 1) < EXACT


@pytest.mark.parametrize("rule", [verify_rejection, verify_block], ids=lambda j: j.__name__)
def test_no_draft_distribution_means_one_hot_drafts(rule):
    for toy in TOYS:

        def drafter(choices, toy=toy):
            return Proposal(tree=draft(toy, CHAIN, most_likely, choices).tree)

        assert distance(toy, drafter, rule, 3) < EXACT


@pytest.mark.parametrize("rule", [verify_rejection, verify_block], ids=lambda j: j.__name__)
def test_scratch_rows_do_not_change_the_distribution(rule):
    for toy in TOYS[::3]:
        for candidate in product((True, False), repeat=3):

            def drafter(choices, toy=toy, candidate=candidate):
                proposal = draft(toy, LONG_CHAIN, sampled, choices)
                return Proposal(proposal.tree, proposal.draft_probs, candidate=list(candidate))

            assert distance(toy, drafter, rule, 4) < EXACT


def test_scratch_siblings_are_not_verified_under_rejection():
    for toy in TOYS[::3]:

        def drafter(choices, toy=toy):
            proposal = draft(toy, CHILDREN, sampled, choices)
            return Proposal(proposal.tree, proposal.draft_probs, candidate=[True, False, True])

        assert distance(toy, drafter, verify_rejection, 2) < EXACT


@pytest.mark.parametrize("drafting", [sampled, without_replacement, sampled_then_likely])
@each_toy
def test_pruning_by_ancestors_keeps_the_distribution(toy, drafting):
    parents = [-1, 0, 0, 1]

    def drafter(choices):
        proposal = draft(toy, parents, drafting, choices)
        first, second = proposal.tree.token_ids[:2]
        keep = [0, 1, 2, 3] if second == 0 else [0, 1, 2]
        return proposal.prune(keep if first != 1 else [0])

    assert distance(toy, drafter, verify_rejection, 4) < EXACT


def mean_accepted(toy, parents, drafting, rule):
    drafter = drafter_of(toy, parents, drafting)
    return sum(weight * len(path) for weight, path, _ in steps(toy, drafter, rule))


@each_toy
def test_one_sampled_child_is_accepted_with_the_overlap_of_the_distributions(toy):
    overlap = sum(map(min, toy.target(()), toy.draft(())))
    assert mean_accepted(toy, [-1], sampled, verify_rejection) == pytest.approx(overlap, abs=EXACT)


def test_the_enumeration_sees_accepted_and_rejected_drafts_at_every_depth():
    for rule in (verify_rejection, verify_block):
        for toy in DENSE_TOYS:
            drafter = drafter_of(toy, LONG_CHAIN, sampled)
            lengths = {len(path) for weight, path, _ in steps(toy, drafter, rule) if weight > 0}
            assert lengths == {0, 1, 2, 3}


def test_block_accepts_at_least_as_many_tokens_as_rejection():
    gains = [
        mean_accepted(toy, LONG_CHAIN, sampled, verify_block)
        - mean_accepted(toy, LONG_CHAIN, sampled, verify_rejection)
        for toy in TOYS
    ]
    assert min(gains) > -EXACT
    assert max(gains) > 0.01


def test_more_children_are_accepted_more_often_and_most_without_replacement():
    for toy in DENSE_TOYS:
        one = mean_accepted(toy, [-1], sampled, verify_rejection)
        independent = mean_accepted(toy, [-1, -1], sampled, verify_rejection)
        distinct = mean_accepted(toy, [-1, -1], without_replacement, verify_rejection)
        assert one < independent < distinct


def test_a_greedy_target_is_emitted_whatever_the_drafter_says():
    toy = next(toy for toy in TOYS if toy.kind == "greedy target")
    wrong_probs = torch.tensor([[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]], dtype=torch.float64)
    for rule, token_ids in product((verify_rejection, verify_block), product(range(3), repeat=2)):
        proposal = Proposal(TokenTree.chain(list(token_ids)), draft_probs=wrong_probs)
        assert distance(toy, lambda choices, proposal=proposal: proposal, rule, 3) < EXACT


# Coupled: the tokens are those of plain sampling, so the distribution needs no separate proof.


def all_trees(num_nodes, vocab_size):
    shapes = product(*(range(-1, node) for node in range(num_nodes)))
    for parents, token_ids in product(shapes, product(range(vocab_size), repeat=num_nodes)):
        yield TokenTree(list(token_ids), list(parents))


def prefix_mismatches(tree, vocab_size, candidate=None, rows_of=lambda token_ids: token_ids):
    """For every outcome of the target's draws: is the verdict a prefix of plain sampling, and does
    it reach as deep as the tree allows? Returns the number of outcomes where not."""
    contexts = [(), *(tuple(tree.path_token_ids(node)) for node in range(len(tree)))]
    verified = reachable(tree, candidate)

    def step(choices):
        drawn = {}  # plain sampling: one token for each context, whoever asks
        for context in contexts:
            if context not in drawn:
                drawn[context] = choices.choose((1.0 / vocab_size,) * vocab_size)
        verdict = verify_coupled(tree, rows_of([drawn[c] for c in contexts]), candidate)
        emitted = tuple(verdict.token_ids(tree))
        plain = ()
        while len(plain) < len(emitted) and plain in drawn:
            plain = (*plain, drawn[plain])
        is_path = verdict.path == ([] if not verdict.path else tree.path(verdict.path[-1]))
        return emitted == plain and is_path and emitted not in verified

    return sum(not fine for _, fine in explore(step))


def reachable(tree, candidate):
    """Token paths that verified nodes spell."""
    paths = (tree.path(node) for node in range(len(tree)))
    return {
        tuple(tree.token_ids[node] for node in path)
        for path in paths
        if candidate is None or all(candidate[node] for node in path)
    }


@pytest.mark.parametrize(("num_nodes", "vocab_size"), [(0, 3), (1, 3), (2, 3), (3, 3), (4, 2)])
def test_coupled_emits_what_plain_sampling_emits_for_every_tree(num_nodes, vocab_size):
    for tree in all_trees(num_nodes, vocab_size):
        assert prefix_mismatches(tree, vocab_size) == 0


def test_coupled_emits_what_plain_sampling_emits_with_scratch_rows():
    for tree in all_trees(3, 2):
        for candidate in product((True, False), repeat=3):
            assert prefix_mismatches(tree, 2, list(candidate)) == 0


def test_coupled_with_rows_out_of_place_is_seen():
    def one_row_late(token_ids):
        return [token_ids[0], *token_ids[:-1]]

    seen = [prefix_mismatches(tree, 2, rows_of=one_row_late) > 0 for tree in all_trees(3, 2)]
    assert sum(seen) > len(seen) / 2


@each_toy
def test_coupled_keeps_the_distribution_with_a_drafter_that_knows_the_noise(toy):
    """The drafter sees every draw of the target and proposes by it, right or wrong on purpose."""
    distribution = {}

    def step(choices):
        first = choices.choose(toy.target(()))
        second = choices.choose(toy.target((first,)))
        token_ids = [first, second] if first == 0 else [(first + 1) % 3, second]
        verdict = verify_coupled(TokenTree.chain(token_ids), [first, second, second])
        return tuple(verdict.token_ids(TokenTree.chain(token_ids))), (first, second)

    for weight, (emitted, drawn) in explore(step):
        tokens = (*emitted, *drawn[len(emitted) :])[:2]
        distribution[tokens] = distribution.get(tokens, 0.0) + weight
    assert total_variation(distribution, plain_distribution(toy, 2, toy.target)) < EXACT
