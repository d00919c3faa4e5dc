"""Rates and ratios of timed rounds, from one statistic: all tokens over all seconds.

So a ratio is the quotient of the two rates that stand next to it, and it lies between the smallest
and the largest ratio of a single round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

Row = Mapping[str, Any]
"""Of a benchmark: `seconds` of its rounds, each with the same number of tokens."""


class Ratio(NamedTuple):
    value: float
    low: float
    """The smallest of the rounds' own ratios."""
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def rate(row: Row) -> float:
    """Generated tokens per second, over all rounds."""
    seconds = row["seconds"]
    return float(len(seconds) * row["num_prompts"] * row["max_tokens"] / sum(seconds))


def ratio(row: Row, other: Row) -> Ratio:
    """How many times as fast as another that generated as much in the same rounds.

    Raises:
        ValueError: the two did not generate as much, or not in the same rounds.
    """
    own, others = row["seconds"], other["seconds"]
    keys = ("batch", "num_prompts", "max_tokens")
    if len(own) != len(others) or any(row[key] != other[key] for key in keys):
        raise ValueError(
            f"{row['contestant']} and {other['contestant']} must have the same rounds and tokens"
        )
    of_rounds = [theirs / mine for mine, theirs in zip(own, others, strict=True)]
    return Ratio(rate(row) / rate(other), min(of_rounds), max(of_rounds))
