"""Computes how deep to draft for each sequence, and which proposed nodes to verify.

Both look for the greatest rate over the whole batch,

                  sequences + sum of the nodes' chances              tokens
        rate =  ----------------------------------------------   =  -------
                  step with so many rows + drafting                  second

A step without drafts is among the answers. Items are taken by falling chance, and the best
number of them is kept: since a chance is never above its parent's, what is taken is a tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24)
"""Numbers of passes that are tried."""


@dataclass(frozen=True, slots=True)
class DraftPrices:
    """Seconds of drafting: per call, per row, per pass, per row and pass, and per token to catch up
    with."""

    call: float
    row: float
    one_pass: float
    level: float
    num_uncomputed: float = 0.0


@dataclass(frozen=True, slots=True)
class DepthRow:
    """A sequence that may be drafted for: the chance to be accepted up to each level, and seconds
    that drafting for it costs besides, such as its share of catching up."""

    reach: Sequence[float]
    extra: float = 0.0
    weight: float = 1.0
    """What a token of this sequence counts."""


@dataclass(frozen=True, slots=True)
class DepthChoice:
    """How deep to draft for each row, 0 being not at all, and the rate that is expected of it."""

    depths: list[int]
    rate: float


def choose_depths(
    rows: Sequence[DepthRow],
    base_tokens: float,
    seconds: Sequence[float],
    prices: DraftPrices,
    nodes_per_level: float = 1.0,
) -> DepthChoice:
    """Choose the depth of every row.

    Args:
        base_tokens: what the step brings without these drafts.
        seconds: of the step with 0, 1, ... draft rows more; as many as can be drafted, at least.
        nodes_per_level: nodes that a level of a draft has, on average.
    """
    if len(rows) == 1:
        return _choose_depth(rows[0], base_tokens, seconds, prices, nodes_per_level)
    best = DepthChoice([0] * len(rows), base_tokens / seconds[0])
    table = np.asarray(seconds)
    longest = max((len(row.reach) for row in rows), default=0)
    tried = sorted({min(depth, longest) for depth in DEPTHS if longest > 0})
    chances = np.array([c * row.weight for row in rows for c in row.reach])
    owner = np.array([i for i, row in enumerate(rows) for _ in row.reach])
    level = np.array([d for row in rows for d in range(1, len(row.reach) + 1)])
    extra = np.array([prices.row + row.extra for row in rows])
    order = np.lexsort((level, -chances))
    chances, owner, level = chances[order], owner[order], level[order]
    costs = prices.level + np.where(level == 1, extra[owner], 0.0) if longest else chances
    if not _could_exceed(best.rate, base_tokens, chances, table, prices, nodes_per_level):
        return best
    for depth in tried:
        inside = level <= depth
        tokens = base_tokens + np.cumsum(chances[inside])
        counts = np.arange(1, len(tokens) + 1, dtype=np.float64) * nodes_per_level
        drafting = prices.call + depth * prices.one_pass + np.cumsum(costs[inside])
        rates = tokens / (_at(table, counts) + drafting)
        most = int(rates.argmax())
        if rates[most] > best.rate:
            chosen = np.bincount(owner[inside][: most + 1], minlength=len(rows))
            best = DepthChoice(chosen.tolist(), float(rates[most]))
    return best


def _could_exceed(
    rate: float,
    base_tokens: float,
    chances: Array,
    seconds: Array,
    prices: DraftPrices,
    nodes_per_level: float,
) -> bool:
    """Whether the rate would be higher if one pass brought all levels at the cost of one row: in a
    full batch it is not, and that ends the search."""
    if len(chances) == 0:
        return False
    tokens = base_tokens + np.cumsum(chances)
    counts = np.arange(1, len(tokens) + 1, dtype=np.float64) * nodes_per_level
    drafting = prices.call + prices.one_pass + prices.row + prices.level
    return bool((tokens > rate * (_at(seconds, counts) + drafting)).any())


def _choose_depth(
    row: DepthRow,
    base_tokens: float,
    seconds: Sequence[float],
    prices: DraftPrices,
    nodes_per_level: float,
) -> DepthChoice:
    """The same for one row, where no order has to be found."""
    best, rate = 0, base_tokens / seconds[0]
    tokens, drafting = base_tokens, prices.call + prices.row + row.extra
    for depth, chance in enumerate(row.reach, start=1):
        tokens += chance * row.weight
        drafting += prices.one_pass + prices.level
        nodes = min(round(depth * nodes_per_level), len(seconds) - 1)
        if tokens / (seconds[nodes] + drafting) > rate:
            best, rate = depth, tokens / (seconds[nodes] + drafting)
    return DepthChoice([best], rate)


def choose_nodes(
    chances: Sequence[Sequence[float]],
    base_tokens: float,
    seconds: Sequence[float],
    drafting: float,
    weights: Sequence[float],
) -> tuple[list[list[int]], float]:
    """Choose which nodes the target verifies.

    Args:
        chances: of each proposal, that its nodes are reached and accepted; a child's is not above
            its parent's, and parents come first.
        base_tokens: what the step brings without them.
        seconds: of the step with 0, 1, ... of them: one more than there are nodes, at least.
        drafting: seconds that were spent on them.
        weights: what a token counts, for each proposal.

    Returns:
        the nodes of each proposal that are kept, in order, and the rate that is expected.
    """
    if len(chances) == 1:
        nodes, rate = _choose_nodes(chances[0], base_tokens, seconds, drafting, weights[0])
        return [nodes], rate
    flat = np.array([c * w for own, w in zip(chances, weights, strict=True) for c in own])
    place = [(i, node) for i, own in enumerate(chances) for node in range(len(own))]
    kept: list[list[int]] = [[] for _ in chances]
    order = np.argsort(-flat, kind="stable")
    tokens = base_tokens + np.concatenate(([0.0], np.cumsum(flat[order])))
    rates = tokens / (np.asarray(seconds[: len(tokens)]) + drafting)
    most = int(rates.argmax())
    for index in sorted(order[:most].tolist()):
        i, node = place[index]
        kept[i].append(node)
    return kept, float(rates[most])


def _choose_nodes(
    chances: Sequence[float],
    base_tokens: float,
    seconds: Sequence[float],
    drafting: float,
    weight: float,
) -> tuple[list[int], float]:
    """The same for one proposal: in plain Python, where numpy takes longer to begin."""
    order = sorted(range(len(chances)), key=lambda node: -chances[node])
    tokens, most, rate = base_tokens, 0, base_tokens / (seconds[0] + drafting)
    for count, node in enumerate(order, start=1):
        tokens += chances[node] * weight
        if tokens / (seconds[count] + drafting) > rate:
            most, rate = count, tokens / (seconds[count] + drafting)
    return sorted(order[:most]), rate


def price_of_row(rate: float, seconds: Sequence[float]) -> float:
    """Tokens that one more draft row must bring, on average over what `seconds` covers."""
    return rate * (seconds[-1] - seconds[0]) / max(1, len(seconds) - 1)


def _at(table: Array, counts: Array) -> Array:
    """The table between its entries; beyond the last one as steep as on average."""
    last = len(table) - 1
    if counts[-1] <= last:
        whole = counts.astype(np.int64)
        if (whole == counts).all():
            return table[whole]
        return np.interp(counts, np.arange(last + 1), table)
    slope = (table[-1] - table[0]) / max(1, last)
    inside = np.interp(counts, np.arange(last + 1), table)
    return np.where(counts > last, table[-1] + slope * (counts - last), inside)
