"""Records how deep a drafter's proposals were accepted, and how far its confidence held.

It also records what a proposal was worth.

Every estimate is shrunk towards a wider one that has seen more, and forgets exponentially:

    this request  ->  all requests of the drafter  ->  a prior
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

NUM_LEVELS = 8
"""Depths that are told apart; what is deeper counts as the last."""
NUM_BINS = 10
PRICES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.55, 0.8)
"""Tokens that a row of the target must bring to pay, at which the worth of a draft is kept."""
PRIOR_ACCEPTANCE = 0.7
"""Before anything was seen. Too high is tried and learned; too low may never be tried."""
_PRIOR_WEIGHT, _REQUEST_WEIGHT = 6.0, 5.0
_DRAFTER_KEEP, _REQUEST_KEEP = 0.995, 0.93
_GAIN_WEIGHT, _GAIN_KEEP = 24.0, 0.98
"""Of what asking is worth for a request: answers come in runs, and a text repeats itself the more
the longer it is, so some dozen questions without an answer say little."""
_PRIOR_WORTH = 0.5
_LEAST_SCALE = 1e-6


@dataclass(slots=True)
class Share:
    """Accepted out of tried, both forgetting."""

    tried: float = 0.0
    accepted: float = 0.0

    def add(self, outcome: float, keep: float) -> None:
        self.tried = keep * self.tried + 1.0
        self.accepted = keep * self.accepted + outcome

    def estimate(self, prior: float, weight: float) -> float:
        return (prior * weight + self.accepted) / (weight + self.tried)


@dataclass(slots=True)
class _Bin:
    """Nodes whose stated confidence was alike: how many, what was stated, and what came of it."""

    tried: float = 0.0
    confidence: float = 0.0
    accepted: float = 0.0

    def add(self, confidence: float, accepted: bool) -> None:
        self.tried = _DRAFTER_KEEP * self.tried + 1.0
        self.confidence = _DRAFTER_KEEP * self.confidence + confidence
        self.accepted = _DRAFTER_KEEP * self.accepted + accepted

    @property
    def correction(self) -> float:
        return (self.accepted - self.confidence) / (_PRIOR_WEIGHT + self.tried)


@dataclass(slots=True)
class _ExpectedGain:
    """Mean worth of an ask at each of `PRICES`: sums, and what they are to be multiplied by, so
    that an answer of nothing, which is the usual one, is cheap to add."""

    sums: list[float] = field(default_factory=lambda: [0.0] * len(PRICES))
    scale: float = 1.0
    weight: float = 0.0

    def add(self, values: Sequence[float], keep: float) -> None:
        self.add_nothing(keep)
        self.sums = [old + new / self.scale for old, new in zip(self.sums, values, strict=True)]

    def add_nothing(self, keep: float) -> None:
        self.weight = keep * self.weight + 1.0
        self.scale *= keep
        if self.scale < _LEAST_SCALE:
            self.sums = [value * self.scale for value in self.sums]
            self.scale = 1.0

    def estimate(self, place: int, prior: float, weight: float) -> float:
        """The mean at `PRICES[place]`, shrunk towards `prior`."""
        total = weight + self.weight
        return (prior * weight + self.sums[place] * self.scale) / total


@dataclass(slots=True)
class _Request:
    levels: list[Share] = field(default_factory=lambda: [Share() for _ in range(NUM_LEVELS)])
    expected_gain: _ExpectedGain = field(default_factory=_ExpectedGain)
    expected: float = 0.0
    accepted: float = 0.0
    """Of tried nodes: the calibrated confidence in them, and how many were accepted."""


class AcceptanceRecord:
    """The record of one drafter."""

    def __init__(self) -> None:
        self._levels = [Share() for _ in range(NUM_LEVELS)]
        self._wide: list[float] | None = None
        self._bins = [_Bin() for _ in range(NUM_BINS)]
        self._expected_gain = _ExpectedGain()
        self._requests: dict[str, _Request] = {}
        self.num_asks = 0
        self.nodes_per_level = 1.0
        """Of proposals that were made, on average."""

    def drop(self, seq_id: str) -> None:
        self._requests.pop(seq_id, None)

    # How deep drafts are accepted -----------------------------------------------------------------

    def conditional(self, seq_id: str, level: int) -> float:
        """The chance that a draft is accepted at this level, from 1, given the level above it."""
        return self._conditionals(seq_id)[min(level, NUM_LEVELS) - 1]

    def _conditionals(self, seq_id: str) -> list[float]:
        """Of a level that few drafts came to, what is known of the one above is expected."""
        if self._wide is None:
            expected, self._wide = PRIOR_ACCEPTANCE, []
            for level in self._levels:
                expected = level.estimate(expected, _PRIOR_WEIGHT)
                self._wide.append(expected)
        request = self._requests.get(seq_id)
        if request is None:
            return self._wide
        return [
            own.estimate(wide, _REQUEST_WEIGHT)
            for own, wide in zip(request.levels, self._wide, strict=True)
        ]

    def add_shape(self, num_nodes: int, depth: int) -> None:
        """A proposal had so many nodes and levels."""
        self.nodes_per_level += 0.05 * (num_nodes / depth - self.nodes_per_level)

    def reach(self, seq_id: str, max_depth: int) -> list[float]:
        """The chance that a draft is accepted up to each level, 1 to `max_depth`."""
        reached, chance = [], 1.0
        conditionals = self._conditionals(seq_id)
        for level in range(max_depth):
            chance *= conditionals[min(level, NUM_LEVELS - 1)]
            reached.append(chance)
        return reached

    def add_level(self, seq_id: str, level: int, outcome: float) -> None:
        """Level `level` was put to the test, or would have been: `outcome` is 0, 1, or a
        chance."""
        index = min(level, NUM_LEVELS) - 1
        self._levels[index].add(outcome, _DRAFTER_KEEP)
        self._wide = None
        self._request(seq_id).levels[index].add(outcome, _REQUEST_KEEP)

    # How far confidence can be believed -----------------------------------------------------------

    def calibrate(self, seq_id: str, confidence: Sequence[float]) -> list[float]:
        """Chances from stated confidence, by what came of alike ones and of this request's."""
        request = self._requests.get(seq_id)
        factor = 1.0
        if request is not None:
            factor = (request.accepted + 4.0) / (request.expected + 4.0)
        return [min(max((c + self._bin(c).correction) * factor, 0.001), 0.999) for c in confidence]

    def _bin(self, confidence: float) -> _Bin:
        return self._bins[min(int(confidence * NUM_BINS), NUM_BINS - 1)]

    def add_trial(self, seq_id: str, confidence: float, expected: float, accepted: bool) -> None:
        """A node was put to the test; `expected` is its calibrated confidence."""
        self._bin(confidence).add(confidence, accepted)
        request = self._request(seq_id)
        request.expected = _REQUEST_KEEP * request.expected + expected
        request.accepted = _REQUEST_KEEP * request.accepted + accepted

    # What asking is worth -------------------------------------------------------------------------

    def expected_gain(self, seq_id: str, price: float) -> float:
        """Expected tokens that a proposal brings, less the price of its rows, when only nodes that
        are worth their price are kept."""
        if price <= PRICES[0]:
            return self._expected_gain_at(seq_id, 0)
        if price >= PRICES[-1]:
            left = max(0.0, 1.0 - (price - PRICES[-1]) / (1.0 - PRICES[-1]))
            return left * self._expected_gain_at(seq_id, len(PRICES) - 1)
        place = bisect_left(PRICES, price)
        low, high = self._expected_gain_at(seq_id, place - 1), self._expected_gain_at(seq_id, place)
        part = (price - PRICES[place - 1]) / (PRICES[place] - PRICES[place - 1])
        return low + (high - low) * part

    def _expected_gain_at(self, seq_id: str, place: int) -> float:
        """The same at a price of `PRICES`."""
        prior = _PRIOR_WORTH * (1.0 - PRICES[place])
        value = self._expected_gain.estimate(place, prior, _PRIOR_WEIGHT)
        request = self._requests.get(seq_id)
        if request is not None:
            value = request.expected_gain.estimate(place, value, _GAIN_WEIGHT)
        return value

    def add_ask(self, seq_id: str, chances: Sequence[float], num_scratch: int = 0) -> None:
        """The drafter was asked; the nodes it proposed are reached and accepted with these
        chances, and so many rows more are never verified."""
        self.num_asks += 1
        if not chances:
            self._expected_gain.add_nothing(_DRAFTER_KEEP)
            self._request(seq_id).expected_gain.add_nothing(_GAIN_KEEP)
            return
        values = [
            sum([chance - price for chance in chances if chance > price]) - num_scratch * price
            for price in PRICES
        ]
        self._expected_gain.add(values, _DRAFTER_KEEP)
        self._request(seq_id).expected_gain.add(values, _GAIN_KEEP)

    def _request(self, seq_id: str) -> _Request:
        request = self._requests.get(seq_id)
        if request is None:
            request = self._requests[seq_id] = _Request()
        return request
