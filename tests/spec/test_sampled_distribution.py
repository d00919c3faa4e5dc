"""The distribution of the output with the real keyed noise, over many steps, as the engine uses
them.

The enumeration proves the rules for perfect coins. What is left to show is that the noise of one
step is independent of the next one's, and of the drafts where it must be. So one long sequence is
generated from a first-order toy model, and *pairs* of consecutive tokens, given the token before
them, are counted: a chi-square test, with fixed seeds and a false alarm of about 1e-9.
"""

import math
from collections import Counter
from typing import NamedTuple

import pytest
import torch

from folospec.core.token_tree import TokenTree
from folospec.sampling import noise
from folospec.sampling.noise import Purpose
from folospec.sampling.sampler import draw_target
from folospec.spec.proposal import Proposal
from folospec.spec.verify import KeyedCoins, verify_block, verify_coupled, verify_rejection


class Toy(NamedTuple):
    """Distributions of target and drafter given the last token: float32 [vocab_size,
    vocab_size]."""

    target: torch.Tensor
    draft: torch.Tensor


# They disagree about two tokens of three, so the residual has something to choose from.
OPPOSED = Toy(
    torch.tensor([[0.45, 0.45, 0.10], [0.10, 0.45, 0.45], [0.45, 0.10, 0.45]]),
    torch.tensor([[0.24, 0.03, 0.73], [0.73, 0.24, 0.03], [0.03, 0.73, 0.24]]),
)
# The overlap differs between contexts: block verification often saves a prefix by what follows.
MIXED = Toy(
    torch.tensor([[0.40, 0.20, 0.40], [0.12, 0.43, 0.45], [0.66, 0.13, 0.21]]),
    torch.tensor([[0.06, 0.39, 0.55], [0.32, 0.57, 0.11], [0.05, 0.30, 0.65]]),
)
VOCAB_SIZE = 3
TOKEN_IDS = torch.arange(VOCAB_SIZE)
CHAIN, TREE = (-1, 0, 1), (-1, -1, 0, 1)
FALSE_ALARM, VISIBLE = 1e-9, 1e-12  # a wrong rule must be seen with a margin
SEED = 20


class StepNoise:
    """Noise of one step: keyed by its root and the row, as the engine does it."""

    def __init__(self, root_position):
        self.root_position = root_position
        self.coins = KeyedCoins(SEED, 0, root_position)

    def draft_keys(self, depths):
        """One key for each row, for the children of that row; `depths` are the rows'."""
        codes = [noise.purpose_code(Purpose.DRAFT, row=row) for row in range(len(depths))]
        return [noise.key(SEED, 0, self.root_position, code) for code in codes]


class TargetNoise(StepNoise):
    """The drafts are drawn with the target's noise, keyed by the position of their token."""

    def draft_keys(self, depths):
        return [position_key(self.root_position + depth + 1, Purpose.TARGET) for depth in depths]


def position_key(position, purpose):
    return noise.key(SEED, 0, position, purpose)


class PositionCoins:
    """Coins keyed by the position of the token they are about, which later steps meet again."""

    def __init__(self, root_position, accept=Purpose.ACCEPT, residual=Purpose.RESIDUAL):
        self.root_position, self.purposes = root_position, (accept, residual)

    def accept(self, probability, node):
        key = position_key(self.root_position + node + 1, self.purposes[0])
        return noise.uniform_number(key) < probability

    def draw(self, probs, row):
        key = position_key(self.root_position + row + 1, self.purposes[1])
        return int(draw_target(probs.log()[None], [key]))


def generate(toy, verify, num_tokens, step_noise=StepNoise, parents=CHAIN):
    """Draft, verify, and go on from the new root, until there are `num_tokens` tokens."""
    tokens, num_drafts, num_accepted = [0], 0, 0
    sources = [step_noise(root_position) for root_position in range(num_tokens)]
    gumbels = draft_noise(sources, parents)
    while len(tokens) < num_tokens:
        root = len(tokens) - 1
        tree, rows, draft_probs = draft(toy, tokens[-1], parents, gumbels[root])
        if verify is verify_coupled:
            positions = [len(tokens) + depth for depth in (0, *tree.depths)]
            keys = [position_key(position, Purpose.TARGET) for position in positions]
            verdict = verify_coupled(tree, draw_target(toy.target[rows].log(), keys).tolist())
        else:
            verdict = verify(Proposal(tree, draft_probs), toy.target[rows], sources[root].coins)
        tokens += verdict.token_ids(tree)
        num_drafts += len(tree)
        num_accepted += verdict.num_accepted
    assert 0 < num_accepted < num_drafts
    return tokens[:num_tokens]


def draft_noise(sources, parents):
    """The Gumbels of every step's drafts, looked up at once: [num_steps, num_rows, vocab_size]."""
    depths = [0]
    for parent in parents:
        depths.append(depths[parent + 1] + 1)
    keys = [key for source in sources for key in source.draft_keys(depths)]
    gumbels = noise.gumbel(noise.key_tensor(keys), TOKEN_IDS)
    return gumbels.view(len(sources), len(depths), VOCAB_SIZE).tolist()


def draft(toy, root, parents, gumbels):
    """Fill a tree: siblings are a Gumbel top-k in its order, that is, without replacement.

    Returns the tree, the token of each row, and the distribution of each node.
    """
    rows, distributions, tables = [root], [], toy.draft.tolist()
    for node, parent in enumerate(parents):
        earlier = [rows[i + 1] for i in range(node) if parents[i] == parent]
        distribution = [
            0.0 if t in earlier else prob for t, prob in enumerate(tables[rows[parent + 1]])
        ]
        scores = {
            t: math.log(p) + gumbels[parent + 1][t] for t, p in enumerate(distribution) if p > 0.0
        }
        rows.append(max(scores, key=scores.get))
        distributions.append([prob / sum(distribution) for prob in distribution])
    return TokenTree(rows[1:], parents), rows, torch.tensor(distributions)


def plain(toy, num_tokens):
    keys = [position_key(position, Purpose.TARGET) for position in range(1, num_tokens)]
    # What is drawn at each position after each token: rows do not depend on each other.
    log_probs = toy.target.log().repeat(len(keys), 1)
    draws = draw_target(log_probs, noise.key_tensor(keys).repeat_interleave(VOCAB_SIZE))
    tokens = [0]
    for drawn_after in draws.view(-1, VOCAB_SIZE).tolist():
        tokens.append(drawn_after[tokens[-1]])
    return tokens


def chance_of(tokens, toy):
    """The probability with which plain sampling strays at least this far from its distribution.

    Pairs that do not overlap, given the token before: `VOCAB_SIZE` rows of `VOCAB_SIZE ** 2` cells.
    """
    counts = torch.zeros(VOCAB_SIZE, VOCAB_SIZE, VOCAB_SIZE, dtype=torch.float64)
    for (before, first, second), count in Counter(
        zip(tokens[0:-2:2], tokens[1:-1:2], tokens[2::2], strict=True)
    ).items():
        counts[before, first, second] = count
    distribution = (toy.target[:, :, None] * toy.target[None]).double()
    expected = counts.sum((1, 2), keepdim=True) * distribution
    assert float(expected.min()) >= 5
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(VOCAB_SIZE * (VOCAB_SIZE**2 - 1), dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


each_toy = pytest.mark.parametrize("toy", [OPPOSED, MIXED], ids=["opposed", "mixed"])
each_shape = pytest.mark.parametrize("parents", [CHAIN, TREE], ids=["chain", "tree"])


def test_plain_sampling_has_the_targets_distribution():
    assert chance_of(plain(MIXED, 4000), MIXED) > FALSE_ALARM


def test_plain_sampling_from_another_distribution_is_seen():
    other = Toy(MIXED.draft, MIXED.draft)
    assert chance_of(plain(other, 4000), MIXED) < VISIBLE


@each_toy
@each_shape
def test_coupled_emits_the_tokens_of_plain_sampling(toy, parents):
    emitted = generate(toy, verify_coupled, 2000, TargetNoise, parents)
    assert emitted == plain(toy, 2000)


def test_coupled_emits_the_tokens_of_plain_sampling_from_a_drafter_that_ignores_the_noise():
    assert generate(MIXED, verify_coupled, 2000, StepNoise, TREE) == plain(MIXED, 2000)


@each_toy
@each_shape
def test_rejection_has_the_targets_distribution_over_many_steps(toy, parents):
    tokens = generate(toy, verify_rejection, 4000, parents=parents)
    assert chance_of(tokens, toy) > FALSE_ALARM


@each_toy
def test_block_has_the_targets_distribution_over_many_steps(toy):
    assert chance_of(generate(toy, verify_block, 4000), toy) > FALSE_ALARM


def test_drafts_and_residual_from_the_same_noise_are_seen():
    class Shared(TargetNoise):
        def __init__(self, root_position):
            super().__init__(root_position)
            shared = PositionCoins(root_position, residual=Purpose.TARGET)
            self.coins.draw = shared.draw

    assert chance_of(generate(OPPOSED, verify_rejection, 8000, Shared), OPPOSED) < VISIBLE


def test_drafts_and_coins_from_the_same_noise_are_seen():
    class Shared(TargetNoise):
        def __init__(self, root_position):
            super().__init__(root_position)
            shared = PositionCoins(root_position, accept=Purpose.TARGET)
            self.coins.accept = shared.accept

    assert chance_of(generate(OPPOSED, verify_rejection, 6000, Shared), OPPOSED) < VISIBLE


class PositionNoise(StepNoise):
    """Everything is keyed by position and purpose alone."""

    def __init__(self, root_position):
        super().__init__(root_position)
        self.coins = PositionCoins(root_position)

    def draft_keys(self, depths):
        return [position_key(self.root_position + depth + 1, Purpose.DRAFT) for depth in depths]


def test_block_with_noise_that_later_steps_meet_again_is_seen():
    """Block verification looks at the drafts and coins beyond the path it accepts. Keyed by
    position alone, they come back in the next step, already known to have lost."""
    tokens = generate(MIXED, verify_block, 16000, PositionNoise)
    assert chance_of(tokens, MIXED) < VISIBLE


def test_rejection_never_looks_beyond_its_path_so_that_such_noise_does_no_harm():
    tokens = generate(MIXED, verify_rejection, 4000, PositionNoise)
    assert chance_of(tokens, MIXED) > FALSE_ALARM
