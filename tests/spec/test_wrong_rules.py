"""Mistakes that real engines have made, each made on purpose: the enumeration must see it.

A wrong rule is often close to the right one, and a proof that never failed proves nothing.
"""

import pytest
import torch
from enumeration import (
    Toy,
    distance,
    draft,
    drafter_of,
    most_likely,
    normalised,
    one_hot,
    output_distribution,
    sampled,
    total_variation,
    without_replacement,
)

from folospec.core.token_tree import TokenTree
from folospec.spec.proposal import Proposal
from folospec.spec.verify import Verdict, verify_block, verify_rejection

CHAIN, LONG_CHAIN = [-1, 0], [-1, 0, 1]
TOYS = [Toy("dense", seed, vocab_size=4) for seed in range(200, 210)]


def assert_biased(distances, usual, most):
    """At least half of the toys show the bias well, and one shows it plainly."""
    assert sorted(distances)[len(distances) // 2] > usual, distances
    assert max(distances) > most, distances


def test_resampling_from_the_target_after_a_rejection_is_seen():
    def rule(proposal, target_probs, coins):
        coins.draw_from = lambda residual, row: target_probs[row]
        return verify_rejection(proposal, target_probs, coins)

    distances = [distance(t, drafter_of(t, CHAIN, sampled), rule, 3) for t in TOYS]
    assert_biased(distances, 0.1, 0.2)


def test_the_rule_for_independent_children_on_distinct_ones_is_seen():
    def drafter_of_wrong_probs(toy):
        def drafter(choices):
            proposal = draft(toy, [-1, -1], without_replacement, choices)
            distribution = torch.tensor([toy.draft(())] * 2, dtype=torch.float64)
            return Proposal(proposal.tree, distribution)

        return drafter

    distances = [distance(t, drafter_of_wrong_probs(t), verify_rejection, 2) for t in TOYS]
    assert_biased(distances, 0.01, 0.08)


@pytest.mark.parametrize("rule", [verify_rejection, verify_block], ids=lambda j: j.__name__)
def test_an_argmax_draft_with_the_distribution_of_a_sampled_one_is_seen(rule):
    def drafter_of_wrong_probs(toy):
        def drafter(choices):
            tree = draft(toy, CHAIN, most_likely, choices).tree
            contexts = [(), (tree.token_ids[0],)]
            distribution = torch.tensor([toy.draft(c) for c in contexts], dtype=torch.float64)
            return Proposal(tree, distribution)

        return drafter

    distances = [distance(t, drafter_of_wrong_probs(t), rule, 3) for t in TOYS]
    assert_biased(distances, 0.3, 0.5)


@pytest.mark.parametrize("rule", [verify_rejection, verify_block], ids=lambda j: j.__name__)
def test_dropping_a_draft_for_its_low_probability_is_seen(rule):
    def drafter_of_timid(toy):
        def drafter(choices):
            proposal = draft(toy, [-1], sampled, choices)
            unlikely = toy.draft(())[proposal.tree.token_ids[0]] < 0.34
            return proposal.prune([] if unlikely else [0])

        return drafter

    distances = [distance(t, drafter_of_timid(t), rule, 2) for t in TOYS]
    assert_biased(distances, 0.08, 0.2)


def test_sorting_children_drawn_without_replacement_is_seen():
    def drafter_of_sorted(toy):
        def drafter(choices):
            drawn = draft(toy, [-1, -1], without_replacement, choices).tree.token_ids
            distribution = toy.draft(())
            first, second = sorted(drawn, key=lambda t: -distribution[t])
            rest = normalised(
                [0.0 if t == first else distribution[t] for t in range(toy.vocab_size)]
            )
            probs = torch.tensor([distribution, rest], dtype=torch.float64)
            return Proposal(TokenTree([first, second], [-1, -1]), probs)

        return drafter

    distances = [distance(t, drafter_of_sorted(t), verify_rejection, 2) for t in TOYS]
    assert_biased(distances, 0.15, 0.25)


def greedy(distribution):
    return one_hot(distribution.index(max(distribution)), len(distribution))


@pytest.mark.parametrize("wrong", [False, True], ids=["one-hot", "softmax"])
def test_greedy_verified_by_a_softmax_ratio_is_seen(wrong):
    def rule(proposal, target_probs, coins):
        if wrong:
            coins.draw_from = lambda probs, row: torch.tensor(greedy(probs.tolist()))
            return verify_rejection(proposal, target_probs, coins)
        rows = [greedy(row) for row in target_probs.tolist()]
        return verify_rejection(proposal, torch.tensor(rows, dtype=torch.float64), coins)

    distances = []
    for toy in TOYS:

        def drafter(choices, toy=toy):
            tree = draft(toy, [-1], most_likely, choices).tree
            return Proposal(tree, torch.tensor([toy.draft(())], dtype=torch.float64))

        first = dict.fromkeys(range(toy.vocab_size), 0.0)
        for tokens, weight in output_distribution(toy, drafter, rule, 2).items():
            first[tokens[0]] += weight
        distances.append(total_variation(first, dict(enumerate(greedy(toy.target(()))))))
    if wrong:
        assert_biased(distances, 0.15, 0.6)
    else:
        assert max(distances) < 1e-12


def block_with_flaw(flaw):
    """Block verification written once more, from the paper, with a place for each mistake."""

    def rule(proposal, target_probs, coins):
        token_ids, rows = proposal.tree.token_ids, proposal.draft_probs
        weights, tau = [1.0], 0
        for i, token_id in enumerate(token_ids):
            ratio = target_probs[i, token_id] / rows[i, token_id]
            weights.append(min(1.0, weights[-1] * float(ratio)))
        for i in range(1, len(token_ids) + 1):
            accept = weights[i]
            if i < len(token_ids):
                excess = float((weights[i] * target_probs[i] - rows[i]).clamp(min=0).sum())
                rest = excess + 1 - weights[i]
                accept = excess / rest if rest > 0 else 1.0
            if coins.accept(accept, i - 1):
                tau = i
            elif flaw == "stops at the first failure":
                break
        left = target_probs[tau]
        if tau < len(token_ids):
            weight = 1.0 if flaw == "residual of the unscaled target" else weights[tau]
            left = (weight * left - rows[tau]).clamp(min=0)
            left = left / left.sum() if left.sum() > 0 else target_probs[tau]
        return Verdict(list(range(tau)), coins.draw(left, tau))

    return rule


def test_block_agrees_with_the_papers_own_order_of_coins():
    for toy in TOYS:
        drafter = drafter_of(toy, LONG_CHAIN, sampled)
        ours = output_distribution(toy, drafter, verify_block, 4)
        theirs = output_distribution(toy, drafter, block_with_flaw(None), 4)
        assert total_variation(ours, theirs) < 1e-12


@pytest.mark.parametrize(
    ("flaw", "usual", "most"),
    [("stops at the first failure", 0.15, 0.3), ("residual of the unscaled target", 0.005, 0.015)],
)
def test_a_flawed_block_rule_is_seen(flaw, usual, most):
    distances = [
        distance(t, drafter_of(t, LONG_CHAIN, sampled), block_with_flaw(flaw), 4) for t in TOYS
    ]
    assert_biased(distances, usual, most)
