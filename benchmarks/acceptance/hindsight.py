"""How fast drafting could have been: what a known acceptance is worth at a known cost of rows.

A run in which everything is drafted and verified says of every step which draft tokens there were,
how likely each was said to be, and which were accepted. A row curve says what a step of n rows
takes, in plain steps. Of a rule that keeps some of the draft tokens,

                             sum over the steps of cost(1 + kept tokens)
    plain steps per token =  -------------------------------------------
                             sum over the steps of 1 + accepted kept tokens

is then known, for all rules, from the one run. Two of them are of interest:

    best rule    of every draft the most likely tokens, at most so many, none less likely than so
                 much: the best pair of limits, chosen when all is over. No drafting is one of them.
    foresight    of every draft exactly the tokens that are accepted, as far as they pay

The first is what a planner can hope for that knows the task; one that adapts to the request may do
a little better. Nobody can do better than the second.

That a step which accepts less is followed by one in between, where a draft would be another, is
left out. So is the time of drafting, and of the prompts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LIMITS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
"""Draft tokens of a step."""
FLOORS = tuple(step / 20 for step in range(20))
"""Chances of a token to be accepted."""
_PRECISION = 1e-9


@dataclass(frozen=True, slots=True)
class Node:
    """A draft token: how likely it and those before it are accepted, as it was said, and whether
    they were."""

    chance: float
    accepted: bool


Draft = Sequence[Node]
"""The draft tokens of a step in any order; none where nothing was drafted. A token is never more
likely than the one that it follows."""


class RowCurve:
    """Cost of a step by its rows, in steps of one row; between the measured ones a line.

    Args:
        costs: by number of rows, 1 among them. A step of more rows counts as no cheaper.

    Raises:
        ValueError: there is no cost of 1 row.
    """

    def __init__(self, costs: Mapping[int, float]) -> None:
        if 1 not in costs:
            raise ValueError(f"costs must have that of 1 row, got {sorted(costs)}")
        self.rows = sorted(costs)
        self.costs: list[float] = []
        for rows in self.rows:
            self.costs.append(max(costs[rows] / costs[1], *self.costs[-1:], 1.0))

    def __call__(self, rows: int) -> float:
        if len(self.rows) == 1:
            return self.costs[0]
        # Behind the last point the last line goes on.
        right = min(max(bisect_left(self.rows, rows), 1), len(self.rows) - 1)
        (first, second), (low, high) = self.rows[right - 1 :][:2], self.costs[right - 1 :][:2]
        return low + (rows - first) / (second - first) * (high - low)


@dataclass(frozen=True, slots=True)
class Rule:
    """Keep the most likely tokens: at most `limit`, none with a chance below `floor`."""

    limit: int
    floor: float
    plain_steps_per_token: float


def best_rule(drafts: Sequence[Draft], curve: RowCurve) -> Rule:
    """The rule that would have been fastest.

    Raises:
        ValueError: there are no steps.
    """
    if not drafts:
        raise ValueError("there must be steps, got none")
    ordered = [sorted(draft, key=lambda node: -node.chance) for draft in drafts]
    return min(
        (
            Rule(limit, floor, _cost([_kept(draft, limit, floor) for draft in ordered], curve))
            for limit in LIMITS
            for floor in (FLOORS if limit else FLOORS[:1])
        ),
        key=lambda rule: rule.plain_steps_per_token,
    )


def foresight(drafts: Sequence[Draft], curve: RowCurve) -> float:
    """Plain steps per token of one who knows what is accepted.

    The least ratio r of cost to tokens is where the sum over the steps of the least
    cost(1 + n) - r (1 + n) is 0, n being at most what is accepted.

    Raises:
        ValueError: there are no steps.
    """
    if not drafts:
        raise ValueError("there must be steps, got none")
    accepted = [sum(node.accepted for node in draft) for draft in drafts]
    costs = [curve(1 + count) for count in range(max(accepted) + 1)]
    ratio, last = 1.0, 2.0
    while last - ratio > _PRECISION:
        best = [min(range(most + 1), key=lambda n: costs[n] - ratio * (1 + n)) for most in accepted]
        last, ratio = ratio, sum(costs[n] for n in best) / sum(1 + n for n in best)
    return ratio


def _kept(ordered: Draft, limit: int, floor: float) -> Draft:
    return [node for node in ordered[:limit] if node.chance >= floor]


def _cost(drafts: Sequence[Draft], curve: RowCurve) -> float:
    tokens = sum(1 + sum(node.accepted for node in draft) for draft in drafts)
    return sum(curve(1 + len(draft)) for draft in drafts) / tokens
