"""Acceptance rules from outside: two that are lossless, one that is not, and some that fail."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from folospec.core.token_tree import ROOT, TokenTree
from folospec.spec.acceptance import AcceptanceRule, register_acceptance_rule
from folospec.spec.proposal import Proposal
from folospec.spec.verify import Coins, Verdict, verify_coupled, verify_rejection


def verify_one(
    tree: TokenTree, target_token_ids: Sequence[int], candidate: Sequence[bool] | None = None
) -> Verdict:
    """Coupled, and no more than one draft token at a time."""
    path = verify_coupled(tree, target_token_ids, candidate).path[:1]
    return Verdict(path, target_token_ids[path[-1] + 1 if path else 0])


def verify_first_children(proposal: Proposal, target_probs: torch.Tensor, coins: Coins) -> Verdict:
    """Rejection that tries the first child of every node alone."""
    kept = [n for n in range(len(proposal)) if proposal.tree.children(parent(proposal, n))[0] == n]
    pruned = proposal.prune(kept)
    nodes = proposal.tree.prune(kept)[1]
    rows = [0, *(node + 1 for node in nodes)]
    verdict = verify_rejection(pruned, target_probs[rows], coins)
    return Verdict([nodes[node] for node in verdict.path], verdict.next_token_id)


def parent(proposal: Proposal, node: int) -> int:
    return proposal.tree.parents[node]


def verify_likely(proposal: Proposal, target_probs: torch.Tensor, coins: Coins) -> Verdict:
    """Accept whatever the target finds not too unlikely: lossy."""
    path, node = [], ROOT
    while True:
        likely = [
            child
            for child in proposal.tree.children(node)
            if target_probs[node + 1, proposal.tree.token_ids[child]] > 0.02
        ]
        if not likely:
            return Verdict(path, coins.draw(target_probs[node + 1], node + 1))
        node = likely[0]
        path.append(node)


def verify_nothing(*args: object) -> Verdict:
    raise TypeError("a tree is no list")


RULES = {
    "one": AcceptanceRule(verify_one, "tokens", takes_trees=True, shares_noise=True),
    "first_children": AcceptanceRule(
        verify_first_children, "distribution", takes_trees=True, shares_noise=False
    ),
    "likely": AcceptanceRule(verify_likely, "none", takes_trees=True, shares_noise=False),
    "nowhere": AcceptanceRule(
        lambda tree, token_ids, candidate: Verdict([len(tree)], 0),
        "none",
        takes_trees=True,
        shares_noise=True,
    ),
    "fails_on_tokens": AcceptanceRule(
        verify_nothing, "tokens", takes_trees=True, shares_noise=True
    ),
    "fails_on_probs": AcceptanceRule(
        verify_nothing, "distribution", takes_trees=True, shares_noise=False
    ),
}
for _name, _rule in RULES.items():
    register_acceptance_rule(_name, _rule)
