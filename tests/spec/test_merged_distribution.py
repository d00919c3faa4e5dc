"""Merged proposals keep the distribution: enumeration in float64, and the mistakes that it must
see.

Under `rejection` the drafts of several drafters stand side by side, each with its own distribution.
That is exact as long as they are independent of each other and nobody chose among them by their
tokens.
"""

import random
from dataclasses import replace
from itertools import product

import pytest
import torch
from enumeration import (
    TOYS,
    Toy,
    distance,
    draft,
    most_likely,
    sampled,
    sampled_then_likely,
    without_replacement,
)
from test_distribution import all_trees, prefix_mismatches

from folospec.core.token_tree import TokenTree
from folospec.spec.merge import merge_proposals
from folospec.spec.proposal import Proposal
from folospec.spec.verify import verify_coupled, verify_rejection

EXACT, SEEN = 1e-12, 1e-4
ONE, CHAIN, FORK, TWIG = [-1], [-1, 0], [-1, -1], [-1, -1, 0]
CROWDED_TOYS = [Toy("dense", seed, vocab_size=3) for seed in range(300, 308)]
each_toy = pytest.mark.parametrize("toy", TOYS, ids=lambda toy: f"{toy.kind}-{toy.seed}")


def other(toy, number=1):
    """The same target's second drafter: its distributions are others."""
    return replace(toy, seed=toy.seed + 1000 * number)


def without_draft_probs(toy, parents, choices):
    """Deterministic drafts that leave it open that their distributions are one-hot."""
    return Proposal(draft(toy, parents, most_likely, choices).tree)


def merged(toy, *proposals, max_nodes=99, max_draft_tokens=99, max_depth=99):
    return merge_proposals(
        proposals,
        max_nodes=max_nodes,
        max_draft_tokens=max_draft_tokens,
        max_depth=max_depth,
        unite=False,
        vocab_size=toy.vocab_size,
    )[0]


def two_chains(toy, choices):
    parts = [draft(toy, CHAIN, sampled, choices), draft(other(toy), CHAIN, sampled, choices)]
    return merged(toy, *parts)


def two_trees(toy, choices):
    first = draft(toy, TWIG, without_replacement, choices)
    return merged(toy, first, draft(other(toy), FORK, without_replacement, choices))


def one_hot_before_sampled(toy, choices):
    return merged(
        toy, without_draft_probs(toy, TWIG, choices), draft(other(toy), CHAIN, sampled, choices)
    )


def one_hot_after_sampled(toy, choices):
    return merged(
        toy, draft(other(toy), CHAIN, sampled, choices), without_draft_probs(toy, TWIG, choices)
    )


def one_hot_after_its_own_distribution(toy, choices):
    """The drafter's likeliest tokens beside its samples: duplicates are the rule."""
    return merged(toy, draft(toy, FORK, sampled, choices), without_draft_probs(toy, CHAIN, choices))


def one_hot_twice(toy, choices):
    return merged(
        toy, without_draft_probs(toy, TWIG, choices), without_draft_probs(toy, TWIG, choices)
    )


def the_same_distribution_twice(toy, choices):
    """Two drafters with one model and noise of their own."""
    return merged(toy, *(draft(toy, CHAIN, sampled, choices) for _ in range(2)))


def three_drafters(toy, choices):
    parts = [draft(other(toy, number), ONE, sampled, choices) for number in range(3)]
    return merged(toy, *parts)


def mixed_distributions_of_one_drafter(toy, choices):
    first = draft(toy, FORK, sampled_then_likely, choices)
    return merged(toy, first, draft(other(toy), ONE, sampled, choices))


MERGES = (
    two_chains,
    two_trees,
    one_hot_before_sampled,
    one_hot_after_sampled,
    one_hot_after_its_own_distribution,
    one_hot_twice,
    the_same_distribution_twice,
    three_drafters,
    mixed_distributions_of_one_drafter,
)


@pytest.mark.parametrize("merge", MERGES, ids=lambda merge: merge.__name__)
@each_toy
def test_a_merged_proposal_keeps_the_distribution_under_rejection(toy, merge):
    assert distance(toy, lambda choices: merge(toy, choices), verify_rejection, 3) < EXACT


@pytest.mark.parametrize(
    "limits",
    [{"max_nodes": 3}, {"max_nodes": 2}, {"max_depth": 1}, {"max_draft_tokens": 4}],
    ids=str,
)
def test_leaving_out_what_does_not_fit_keeps_the_distribution(limits):
    for toy in TOYS[::2]:

        def drafter(choices, toy=toy):
            first = draft(toy, TWIG, without_replacement, choices)
            second = draft(other(toy), CHAIN, sampled, choices)
            return merged(toy, first, second, **limits)

        assert distance(toy, drafter, verify_rejection, 3) < EXACT


def test_a_cut_that_depends_on_how_much_the_first_had_to_say_keeps_the_distribution():
    """Where its distribution runs out of tokens, the first drafter leaves more room to the
    second."""
    lengths = set()
    for toy in TOYS:

        def drafter(choices, toy=toy):
            first = draft(toy, FORK, without_replacement, choices)
            possible = [n for n in (0, 1) if toy.draft(())[first.tree.token_ids[n]] > 0]
            second = draft(other(toy), CHAIN, sampled, choices)
            proposal = merged(toy, first.prune(possible), second, max_nodes=3)
            lengths.add(len(possible))
            return proposal

        assert distance(toy, drafter, verify_rejection, 3) < EXACT
    assert lengths == {1, 2}


# Mistakes


def distances(drafter, toys=CROWDED_TOYS):
    return sorted(
        distance(toy, lambda choices, toy=toy: drafter(toy, choices), verify_rejection, 3)
        for toy in toys
    )


def assert_seen(drafter, most):
    """At least half of the toys show the bias, and one shows it plainly."""
    found = distances(drafter)
    assert found[len(found) // 2 - 1] > SEEN, found
    assert found[-1] > most, found


def test_one_node_for_equal_drafts_of_two_drafters_is_seen():
    """Uniting them keeps one distribution and loses the other's trial."""

    def drafter(toy, choices):
        parts = [draft(toy, ONE, sampled, choices), draft(other(toy), ONE, sampled, choices)]
        proposal, sources = merge_proposals(
            parts,
            max_nodes=9,
            max_draft_tokens=9,
            max_depth=9,
            unite=True,
            vocab_size=toy.vocab_size,
        )
        distributions = torch.zeros(len(proposal), toy.vocab_size, dtype=torch.float64)
        for part, nodes in reversed(list(zip(parts, sources, strict=True))):
            for node, place in nodes.items():
                distributions[place] = part.draft_probs[node]
        return replace(proposal, draft_probs=distributions)

    assert_seen(drafter, 0.05)


def test_two_drafters_that_share_their_noise_are_seen():
    """They draw the same token, and report it as two independent draws."""

    def drafter(toy, choices):
        proposal = draft(toy, ONE, sampled, choices)
        return merged(toy, proposal, proposal)

    assert_seen(drafter, 0.05)


def likeliest_sample(toy, choices):
    """A dynamic tree of sampled drafts: each node's own token decides whether it is verified."""
    parts = [draft(toy, ONE, sampled, choices), draft(other(toy), ONE, sampled, choices)]
    proposal = merged(toy, *parts)
    chances = [float(proposal.draft_probs[n, proposal.tree.token_ids[n]]) for n in (0, 1)]
    return proposal.prune([chances.index(max(chances))])


def test_a_tree_that_keeps_its_likeliest_samples_is_seen():
    assert_seen(likeliest_sample, 0.1)


@each_toy
def test_a_tree_that_keeps_its_likeliest_samples_is_exact_if_they_are_called_one_hot(toy):
    def drafter(choices):
        return replace(likeliest_sample(toy, choices), draft_probs=None)

    assert distance(toy, drafter, verify_rejection, 2) < EXACT


def test_one_hot_drafts_with_the_distribution_of_a_sampled_one_are_seen():
    """The distribution of the model whose likeliest token was taken stands for that of the
    choice."""

    def drafter(toy, choices):
        proposal = one_hot_after_sampled(toy, choices)
        distributions = proposal.draft_probs.clone()
        for node in proposal.tree.children()[1:]:
            distributions[node] = torch.tensor(toy.draft(()))
        return replace(proposal, draft_probs=distributions)

    assert_seen(drafter, 0.1)


# Coupled


def united(*trees):
    proposals = [Proposal(tree) for tree in trees]
    limits = {"max_nodes": 99, "max_draft_tokens": 99, "max_depth": 99}
    return merge_proposals(proposals, unite=True, vocab_size=9, **limits)[0].tree


@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 2), (3, 1)])
def test_united_trees_emit_what_plain_sampling_emits(sizes):
    for trees in product(*(all_trees(size, 2) for size in sizes)):
        assert prefix_mismatches(united(*trees), 2) == 0


def test_united_trees_with_rows_out_of_place_are_seen():
    """Control: the rows of the merged tree in the order of the last proposal first."""

    def reversed_rows(token_ids):
        return [token_ids[0], *token_ids[:0:-1]]

    pairs = list(product(all_trees(2, 2), repeat=2))
    trees = [tree for tree in (united(*pair) for pair in pairs) if len(tree) > 1]
    seen = [prefix_mismatches(tree, 2, rows_of=reversed_rows) > 0 for tree in trees]
    assert sum(seen) > len(seen) / 2


def target_rows(tree, plain):
    """What the target draws at each row: a function of the tokens above it."""
    return [plain(()), *(plain(tuple(tree.path_token_ids(node))) for node in range(len(tree)))]


def test_a_united_tree_accepts_what_the_luckiest_of_its_parts_would():
    rng = random.Random(7)
    longest, gains = 0, 0
    for seed in range(400):
        trees = [
            TokenTree(
                [rng.randrange(2) for _ in range(5)], [rng.randint(-1, n - 1) for n in range(5)]
            )
            for _ in range(3)
        ]

        def plain(context, seed=seed):
            return random.Random(f"{seed} {context}").randrange(2)

        emitted = [
            verify_coupled(tree, target_rows(tree, plain)).token_ids(tree)
            for tree in (united(*trees), *trees)
        ]
        assert emitted[0] == max(emitted[1:], key=len)
        longest = max(longest, len(emitted[0]))
        gains += len(emitted[0]) > len(emitted[1])
    assert longest >= 4
    assert gains > 100, "the other parts never helped"
