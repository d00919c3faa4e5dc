"""The law of the output with the real keyed noise, over many steps, as the engine uses them.

The enumeration proves the rules for perfect coins. What is left to show is that the noise of one
step is independent of the next one's, and of the drafts where it must be. So one long sequence is
generated from a first-order toy model, and *pairs* of consecutive tokens, given the token before
them, are counted: a chi-square test, with fixed seeds and a false alarm of about 1e-9.
"""

import pytest
import torch

from folospec.core.token_tree import TokenTree
from folospec.sampling import noise
from folospec.sampling.noise import Purpose
from folospec.sampling.sampler import draw_target
from folospec.spec.proposal import Proposal
from folospec.spec.verify import KeyedCoins, verify_block, verify_coupled, verify_rejection

torch.set_num_threads(1)

TARGET = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.2, 0.2], [0.3, 0.5, 0.2]])
DRAFT = torch.tensor([[0.5, 0.3, 0.2], [0.3, 0.2, 0.5], [0.2, 0.3, 0.5]])
TARGET_LOG, DRAFT_LOG = TARGET.log(), DRAFT.log()
VOCAB_SIZE = 3
TOKEN_IDS = torch.arange(VOCAB_SIZE)
CHAIN = TokenTree.chain([0, 0, 0]).parents
TREE = (-1, -1, 0, 1)
FALSE_ALARM = 1e-9
SEED = 20


class StepNoise:
    """Noise of one step: keyed by its root and the row, as the engine does it."""

    def __init__(self, root_position):
        self.root_position = root_position
        self.coins = KeyedCoins(SEED, 0, root_position)

    def draft_keys(self, depths):
        codes = [noise.purpose_code(Purpose.DRAFT, row=row) for row in range(len(depths))]
        return [noise.key(SEED, 0, self.root_position, code) for code in codes]


class TargetNoise(StepNoise):
    """Drafts are drawn with the noise of the target: keyed by the position of their token."""

    purpose = Purpose.TARGET

    def draft_keys(self, depths):
        return [noise.key(SEED, 0, self.root_position + d, self.purpose) for d in depths]


def generate(verify, num_tokens, step_noise=StepNoise, parents=CHAIN):
    """Yield nothing but committed tokens: draft, verify, go on from the new root."""
    tokens, num_drafts, num_accepted = [0], 0, 0
    while len(tokens) < num_tokens:
        root_position = len(tokens) - 1
        source = step_noise(root_position)
        tree, rows, draft_probs = draft(tokens[-1], parents, source)
        if verify is verify_coupled:
            keys = [
                noise.key(SEED, 0, root_position + depth + 1, Purpose.TARGET)
                for depth in (0, *tree.depths)
            ]
            verdict = verify_coupled(tree, draw_target(TARGET_LOG[rows], keys).tolist())
        else:
            verdict = verify(Proposal(tree, draft_probs), TARGET[rows], source.coins)
        tokens += verdict.token_ids(tree)
        num_drafts += len(tree)
        num_accepted += verdict.num_accepted
    assert 0 < num_accepted < num_drafts
    return tokens


def draft(root, parents, source):
    """Fill a tree: siblings are a Gumbel top-k, in its order, hence drawn without replacement.

    Returns the tree, the token of each row and the law of each node.
    """
    depths = [0]
    for parent in parents:
        depths.append(depths[parent + 1] + 1)
    gumbels = noise.gumbel(noise.key_tensor(source.draft_keys([d + 1 for d in depths])), TOKEN_IDS)
    rows, laws = [root], []
    for node, parent in enumerate(parents):
        above = rows[parent + 1]
        law, scores = DRAFT[above].clone(), DRAFT_LOG[above] + gumbels[parent + 1]
        for sibling in range(node):
            if parents[sibling] == parent:
                law[rows[sibling + 1]] = 0.0
                scores[rows[sibling + 1]] = float("-inf")
        rows.append(int(scores.argmax()))
        laws.append(law / law.sum())
    return TokenTree(rows[1:], parents), rows, torch.stack(laws)


def chance_of(tokens):
    """The probability that plain sampling gives counts at least as far from the expected ones.

    Non-overlapping pairs, given the token before: `VOCAB_SIZE` rows of `VOCAB_SIZE ** 2` cells.
    """
    counts = torch.zeros(VOCAB_SIZE, VOCAB_SIZE, VOCAB_SIZE, dtype=torch.float64)
    for i in range(0, len(tokens) - 2, 2):
        before, first, second = tokens[i : i + 3]
        counts[before, first, second] += 1
    law = (TARGET[:, :, None] * TARGET[None]).double()
    expected = counts.sum((1, 2), keepdim=True) * law
    assert float(expected.min()) >= 5
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(VOCAB_SIZE * (VOCAB_SIZE**2 - 1), dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


def plain(num_tokens):
    tokens = [0]
    for position in range(1, num_tokens):
        key = noise.key(SEED, 0, position, Purpose.TARGET)
        tokens.append(int(draw_target(TARGET_LOG[tokens[-1]][None], [key])))
    return tokens
