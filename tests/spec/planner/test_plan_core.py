"""The two decisions of a step are the best ones: compared with every other answer."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest

from folospec.spec.planner.plan_core import DepthRow, DraftPrices, choose_depths, choose_nodes


def rate_of(depths, rows, seconds, prices):
    tokens = len(rows) + sum(sum(r.reach[:d]) for r, d in zip(rows, depths, strict=True))
    drafting = 0.0
    if any(depths):
        drafting = prices.call + max(depths) * prices.one_pass + sum(depths) * prices.level
        pairs = zip(rows, depths, strict=True)
        drafting += sum(prices.row + row.extra for row, depth in pairs if depth)
    return tokens / (seconds[sum(depths)] + drafting)


def random_case(seed, count):
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        chance, reach = 1.0, []
        for _ in range(3):
            chance *= rng.uniform(0.2, 0.95)
            reach.append(chance)
        rows.append(DepthRow(reach))
    seconds = 1.0 + np.cumsum([0.0, *(rng.uniform(0.0, 0.2) for _ in range(3 * count))])
    prices = DraftPrices(rng.uniform(0, 0.1), 0.0, rng.uniform(0, 0.3), rng.uniform(0, 0.05))
    return rows, seconds, prices


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("seed", range(20))
def test_no_other_depths_have_a_higher_rate(seed, count):
    rows, seconds, prices = random_case(seed, count)
    choice = choose_depths(rows, count, seconds, prices)
    every = product(range(4), repeat=count)
    best = max(rate_of(depths, rows, seconds, prices) for depths in every)
    assert choice.rate == pytest.approx(best)
    assert rate_of(choice.depths, rows, seconds, prices) == pytest.approx(best)


def test_a_pass_that_pays_for_many_rows_does_not_pay_for_one_of_them():
    prices, seconds = DraftPrices(0.0, 0.0, 0.5, 0.0), np.linspace(1.0, 1.5, 65)
    good, bad = DepthRow([0.8, 0.6]), DepthRow([0.01, 0.0])
    assert min(choose_depths([good] * 16, 16, seconds, prices).depths) > 0
    assert set(choose_depths([good] + [bad] * 15, 16, seconds, prices).depths) == {0}


def test_catching_up_is_counted_for_the_row_that_needs_it():
    rows = [DepthRow([0.9]), DepthRow([0.9], extra=5.0)]
    choice = choose_depths(rows, 2, np.linspace(1.0, 1.1, 9), DraftPrices(0, 0, 0.05, 0))
    assert choice.depths == [1, 0]


@pytest.mark.parametrize("seed", range(20))
def test_no_other_nodes_have_a_higher_rate_and_parents_are_kept(seed):
    rng = random.Random(seed)
    parents = [-1, 0, 0, -1, 3]
    chances = [[], []]
    for own in chances:
        for parent in parents:
            own.append(rng.random() * (1.0 if parent < 0 else own[parent]))
    seconds = 1.0 + np.cumsum([0.0, *(rng.uniform(0.0, 0.3) for _ in range(10))])
    kept, rate = choose_nodes(chances, 2, seconds, 0.1, [1.0, 1.0])
    for nodes in kept:
        assert all(parents[node] < 0 or parents[node] in nodes for node in nodes)
    flat = [*chances[0], *chances[1]]
    best = max(
        (2 + sum(c for c, taken in zip(flat, which, strict=True) if taken))
        / (seconds[sum(which)] + 0.1)
        for which in product((False, True), repeat=10)
    )
    assert rate == pytest.approx(best)
