"""Applies the acceptance rules: from a token tree and the target's rows to a verdict.

Row 0 is the root, the last committed token; row i + 1 is node i of the tree. The target's row r is
its distribution, or its token, for the position *after* row r, so a node is verified by its
parent's row:

        row 0 (root) --> verifies nodes 0 and 2           tree.parents = [-1, 0, -1]
           |-- node 0 (row 1) --> verifies node 1
           |      `-- node 1 (row 2)
           `-- node 2 (row 3)                           verdict: path [0, 1] + a token from row 2

- `verify_coupled` descends while a child has the token that the target drew. Its output is what
  plain sampling emits with the same noise, token for token, whatever the tree.
- `verify_rejection` and `verify_block`, the ratio rules, keep the distribution only. They need the
  drafts' true distributions, and coins that are independent of the noise of the drafts.

On a CPU and on a GPU kernels do the same for all sequences at once; see `spec.verify_batch`.

All work in the dtype of `target_probs`. Greedy targets are one-hot rows, never a softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from folospec.core.token_tree import TokenTree, Verdict
from folospec.sampling import noise
from folospec.sampling.sampler import draw_target
from folospec.spec.proposal import Proposal


class Coins(Protocol):
    """The randomness of a ratio rule. Every call must be independent of all others and of the
    noise the drafts were drawn with, within the step and across steps."""

    def accept(self, probability: float, node: int) -> bool:
        """True with this probability: never at 0, always at 1 or more."""

    def draw(self, probs: torch.Tensor, row: int) -> int:
        """A token from `probs` [vocab_size], never one of probability 0; the path ends at `row`."""


class KeyedCoins:
    """Coins from keyed noise, for one step of one sequence.

    The key holds the position of the step's root and the row, not the position of the token: block
    verification looks at the coins beyond the accepted path, so that a later step must not meet
    them again. Roots only move forward, hence no two steps share a coin.
    """

    def __init__(self, seed: int, sample_index: int, root_position: int) -> None:
        self._stream = (seed, sample_index, root_position)

    def accept(self, probability: float, node: int) -> bool:
        if probability <= 0.0 or probability >= 1.0:
            return probability >= 1.0
        return noise.uniform_number(self._key(noise.Purpose.ACCEPT, node + 1)) < probability

    def draw(self, probs: torch.Tensor, row: int) -> int:
        return int(draw_target(probs.log()[None], [self._key(noise.Purpose.RESIDUAL, row)]))

    def _key(self, purpose: noise.Purpose, row: int) -> int:
        return noise.key(*self._stream, noise.purpose_code(purpose, row=row))


def verify_coupled(
    tree: TokenTree,
    target_token_ids: Sequence[int],  # [num_nodes + 1]
    candidate: Sequence[bool] | None = None,
) -> Verdict:
    """Accept a child iff it is the token the target drew (Gumbel coupling, arXiv 2408.07978).

    `target_token_ids[row]` must be drawn with noise keyed by its position alone, so that two rows
    with the same context have the same token, and plain decoding draws it too. The drafter may
    have looked at that noise: it only makes the drafts better.

    Siblings with the same token, as merged proposals have them, count as one node with the children
    of all; the path runs through the one that goes deepest.

    Raises:
        ValueError: `target_token_ids` or `candidate` do not fit the tree.
    """
    _check_rows("target_token_ids", len(target_token_ids), len(tree))
    if candidate is not None and len(candidate) != len(tree):
        raise ValueError(f"candidate must have {len(tree)} entries, got {len(candidate)}")
    if tree.is_chain and candidate is None:
        length = 0
        while length < len(tree) and tree.token_ids[length] == target_token_ids[length]:
            length += 1
        return Verdict(list(range(length)), int(target_token_ids[length]))
    duplicates = [-1]  # nodes that spell the tokens emitted so far; the root to begin with
    while True:
        token_id = int(target_token_ids[duplicates[0] + 1])
        below = [
            child
            for node in duplicates
            for child in tree.children(node)
            if tree.token_ids[child] == token_id and (candidate is None or candidate[child])
        ]
        if not below:
            path = [] if duplicates[0] == -1 else list(tree.path(duplicates[0]))
            return Verdict(path, token_id)
        duplicates = below


def verify_rejection(proposal: Proposal, target_probs: torch.Tensor, coins: Coins) -> Verdict:
    """The sibling rule: try the children of a node in row order, each against what is left.

    With `left` the target's distribution at the node and `draft` the distribution child x was drawn
    from:

        accept x with probability min(1, left[x] / draft[x]) and descend, else
        left = normalise(max(left - draft, 0)) and try the next sibling;
        no child accepted: the next token is drawn from `left`.

    For one sampled child it is speculative sampling (Leviathan, arXiv 2211.17192, Chen 2302.01318),
    for i.i.d. children SpecInfer's multi-step rule (2305.09781), for children without replacement
    recursive rejection (RSD, 2402.14160); one-hot drafts and any mixture are as exact, provided
    that `draft_probs` tells the truth. A child that its own distribution calls impossible is not
    tried.

    Args:
        proposal: the tree with its distributions; equal siblings are separate trials.
        target_probs: float [num_nodes + 1, vocab_size], each row a distribution.
        coins: independent of the drafts' noise.

    Raises:
        ValueError: the shapes do not fit.
    """
    _check_probs(proposal, target_probs)
    path: list[int] = []
    node = -1
    while True:
        left = target_probs[node + 1]
        for child in proposal.tree.children(node):
            if not proposal.is_candidate(child):
                continue
            drafted = _draft_prob(proposal, child)
            if drafted <= 0.0:
                continue
            kept = float(left[proposal.tree.token_ids[child]])
            if coins.accept(min(1.0, kept / drafted), child):
                path.append(child)
                node = child
                break
            left = _residual(left, proposal, child)
        else:
            return Verdict(path, coins.draw(left, node + 1))


def verify_block(proposal: Proposal, target_probs: torch.Tensor, coins: Coins) -> Verdict:
    """Block verification of a chain (arXiv 2403.10444, algorithm 2): verify prefixes, not tokens.

    For the prefix of i tokens, with weight_0 = 1 and rows as in `verify_rejection`:

        weight_i = min(1, weight_{i-1} * target[x_i] / draft[x_i])
        excess_i = sum of max(weight_i * target_i - draft_{i+1}, 0) over the vocabulary
        accept_i = excess_i / (excess_i + 1 - weight_i), and accept_i = weight_i for the last one

    A coin is tossed for every prefix, and the longest one that wins is the path: a prefix may win
    after a shorter one lost. The next token then has the distribution normalise(max(weight * target
    - draft, 0)) at the end of the path, with that weight, or the target's own after the whole
    chain.

    Raises:
        ValueError: the tree is not a chain, or the shapes do not fit.
    """
    _check_probs(proposal, target_probs)
    require_chain(proposal.tree)
    length = _candidate_length(proposal)
    weights = [1.0]
    for node in range(length):
        drafted = _draft_prob(proposal, node)
        kept = float(target_probs[node, proposal.tree.token_ids[node]])
        weights.append(min(1.0, weights[-1] * kept / drafted) if drafted > 0.0 else 0.0)
    # The longest prefix that wins is the first one met from the far end.
    for num_accepted in range(length, 0, -1):
        weight = weights[num_accepted]
        accept = weight
        if num_accepted < length:
            excess = float(
                _excess(weight * target_probs[num_accepted], proposal, num_accepted).sum()
            )
            accept = 1.0 if excess + 1.0 - weight <= 0.0 else excess / (excess + 1.0 - weight)
        if coins.accept(accept, num_accepted - 1):
            break
    else:
        num_accepted = 0
    left = target_probs[num_accepted]
    if num_accepted < length:
        left = _residual(left, proposal, num_accepted, weight=weights[num_accepted])
    return Verdict(list(range(num_accepted)), coins.draw(left, num_accepted))


def require_chain(tree: TokenTree) -> None:
    """Raise ValueError for a tree that block verification cannot verify."""
    if not tree.is_chain:
        raise ValueError(
            f"block verification verifies chains, got a tree with the parents {list(tree.parents)}"
        )


def _draft_prob(proposal: Proposal, node: int) -> float:
    """The probability with which the drafter drew the node's token."""
    if proposal.draft_probs is None:
        return 1.0
    return float(proposal.draft_probs[node, proposal.tree.token_ids[node]])


def _excess(probs: torch.Tensor, proposal: Proposal, node: int) -> torch.Tensor:
    """max(distribution - draft, 0), [vocab_size]: what a rejected node leaves, not normalised."""
    if proposal.draft_probs is None:
        excess = probs.clone()
        excess[proposal.tree.token_ids[node]] = 0.0
        return excess
    return (probs - proposal.draft_probs[node].to(probs)).clamp_(min=0.0)


def _residual(
    probs: torch.Tensor, proposal: Proposal, node: int, weight: float = 1.0
) -> torch.Tensor:
    """The distribution of the token after the node was rejected, [vocab_size].

    Where the draft's distribution covers `probs`, rejection has probability 0, and what rounding
    leaves of the difference is noise: then `probs` itself stands in. In both cases what was 0 stays
    0.
    """
    excess = _excess(weight * probs, proposal, node)
    mass = excess.sum()
    return excess / mass if float(mass) > torch.finfo(probs.dtype).eps else probs


def _candidate_length(proposal: Proposal) -> int:
    """Nodes of a chain before the first scratch node."""
    if proposal.candidate is None or all(proposal.candidate):
        return len(proposal)
    return proposal.candidate.index(False)


def _check_probs(proposal: Proposal, target_probs: torch.Tensor) -> None:
    if target_probs.dim() != 2:
        raise ValueError(
            f"target_probs must be [num_nodes + 1, vocab_size], got {list(target_probs.shape)}"
        )
    _check_rows("target_probs", target_probs.shape[0], len(proposal))
    drafts = proposal.draft_probs
    if drafts is not None and drafts.shape[1] != target_probs.shape[1]:
        raise ValueError(
            f"draft_probs must cover the target's {target_probs.shape[1]} tokens, "
            f"got {drafts.shape[1]}"
        )


def _check_rows(name: str, num_rows: int, num_nodes: int) -> None:
    if num_rows != num_nodes + 1:
        raise ValueError(
            f"{name} must have a row for the root and each of the {num_nodes} nodes, got {num_rows}"
        )
