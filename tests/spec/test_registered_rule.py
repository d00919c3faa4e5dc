"""A rule from outside is proven as those of folospec are: by enumeration."""

from __future__ import annotations

import pytest
from enumeration import Toy, distance, drafter_of, sampled, without_replacement
from registered_rules import verify_first_children, verify_likely

from folospec.spec.verify import verify_rejection

TREE = [-1, -1, 0, 0, 1]
TOYS = [Toy("dense", seed, vocab_size=3) for seed in range(300, 305)]


@pytest.mark.parametrize("drafting", [sampled, without_replacement])
def test_first_children_alone_keep_the_distribution(drafting):
    for toy in TOYS:
        assert distance(toy, drafter_of(toy, TREE, drafting), verify_first_children, 3) < 1e-12


def test_a_lossy_rule_is_detected():
    distances = [distance(toy, drafter_of(toy, TREE, sampled), verify_likely, 3) for toy in TOYS]
    assert min(distances) > 0.01
    assert distance(TOYS[0], drafter_of(TOYS[0], TREE, sampled), verify_rejection, 3) < 1e-12
