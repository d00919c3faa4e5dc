"""Measures what drafting really gains: steps with drafts against steps without.

The estimates of acceptance and cost each correct themselves, and still a plan that promises 1.05
may get 0.97: costs that no estimate has a place for, answers that were believed too much. So what a
plan promised is compared with what its steps brought:

    promised   rate with drafts over the rate without, as it was planned
    got        tokens of a step, over those of one without drafts
    expected   seconds of a step, drafting included, over those of one without, as estimated
    bias       how many times as long drafted steps take, against plain steps amid them, as expected

    gain    =  sum of got / (sum of expected * bias)                   of a source; 1 at first
    factor  =  sum of got / (sum of promised * expected * bias)

A source whose drafts have gained is asked. One that has not, by 3 % at least, is asked where its
promise is above 1 even by the factor: where little is promised, answers that come seldom and are
long would be missed.

Where drafted steps are always slower than expected, that is taken for the machine's speed, and the
plain steps among them look faster; so both are needed. On a shared machine a step may take ten
times as long as the last: the bias is a ratio of medians, and tokens know no noise.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

_PRIOR, _KEEP = 64.0, 1.0 - 1.0 / 256.0
"""Steps that the factor 1 weighs as much as before anything was seen, and what is kept of the past
at every step."""
_LEAST_FACTOR, _LEAST_GAIN = 0.5, 1.03
"""A smaller gain does not make up for what drafting does to the steps after it."""
_NUM_DRAFTED, _NUM_PLAIN, _LEAST_PLAIN = 33, 15, 3
"""Steps of each kind whose medians are compared; no fewer plain ones."""
_BIASES = (1.0, 1.5)
"""No other bias is believed."""
_RELAXING_STEPS = 3000
"""After so many steps without a source, most of what was seen of it is forgotten."""


@dataclass(slots=True)
class _Seen:
    """Of one source."""

    got: float = 0.0
    expected: float = 0.0
    promised: float = 0.0
    """In the time that was expected."""
    taken: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_DRAFTED))
    """Seconds of its last steps, over what was expected of them."""


class Feedback:
    """By how much the sources keep less than they promise."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}
        self._plain: deque[float] = deque(maxlen=_NUM_PLAIN)

    def factor(self, source: str) -> float:
        """What the promised gain of a source has to be multiplied by, 0.5 to 1: drafting is never
        expected to gain more than the estimates say."""
        seen = self._seen.get(source)
        if seen is None:
            return 1.0
        factor = (seen.got + _PRIOR) / (seen.promised * self._bias(seen) + _PRIOR)
        return min(max(factor, _LEAST_FACTOR), 1.0)

    def gain(self, source: str) -> float:
        """The rate of the steps that a source drafted for, over that without drafts."""
        seen = self._seen.get(source)
        if seen is None:
            return 1.0
        return (seen.got + _PRIOR) / (seen.expected * self._bias(seen) + _PRIOR)

    def trusts(self, source: str, promised: float) -> bool:
        """Whether to ask a source that promises this rate, over that without drafts."""
        return self.gain(source) >= _LEAST_GAIN or promised * self.factor(source) >= 1.0

    def _bias(self, seen: _Seen) -> float:
        if len(self._plain) < _LEAST_PLAIN:
            return 1.0
        least, most = _BIASES
        bias = statistics.median(seen.taken) / statistics.median(self._plain)
        return min(max(bias, least), most)

    def note_plain(self, taken: float) -> None:
        """A plain step amid drafts took so many times what was expected."""
        self._plain.append(taken)

    def note_drafted(
        self, sources: Collection[str], promised: float, got: float, expected: float, taken: float
    ) -> None:
        """A step was drafted for by these sources.

        Args:
            promised: the rate that was planned, over that without drafts.
            got: tokens, over those of a step without drafts.
            expected: seconds, as the estimates have it, over those of a step without drafts.
            taken: seconds that it took, over those that were expected of it.
        """
        for source in sources:
            seen = self._seen.setdefault(source, _Seen())
            seen.got = _KEEP * seen.got + got
            seen.expected = _KEEP * seen.expected + expected
            seen.promised = _KEEP * seen.promised + promised * expected
            seen.taken.append(taken)

    def relax(self, num_steps: int, sources: Collection[str]) -> None:
        """Forget a part of what was seen, of all but these sources: they were not asked in so many
        steps, and things may have changed."""
        share = max(0.0, 1.0 - num_steps / _RELAXING_STEPS)
        for source, seen in self._seen.items():
            if source not in sources:
                seen.got *= share
                seen.expected *= share
                seen.promised *= share
