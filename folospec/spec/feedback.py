"""What drafting really gained: steps with drafts against steps without.

The estimates of acceptance and cost each correct themselves, and still a plan that promises 1.05
may get 0.97: costs that no estimate has a place for, answers that were believed too much. So what a
plan promised is compared with what its steps brought, by their tokens and their time:

    promised   rate with drafts over the rate without, as it was planned
    got        tokens of the step over those of one without drafts
    taken      seconds of the step, drafting included, over those of one without drafts

    factor  =  sum of got / sum of promised * taken         of a source; 1 if nothing was seen

Steps of reference, plain ones amid drafts, say what "without drafts" takes: where drafted steps are
always slower than expected, that is taken for the machine's speed, and plain ones look faster.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

_PRIOR, _KEEP = 64.0, 1.0 - 1.0 / 256.0
"""Steps that the factor 1 weighs as much as before anything was seen, and what is kept of the past
at every step."""
_LEAST, _MOST = 0.5, 1.0
"""Of the factor: drafting is never expected to gain more than the estimates say."""
_OUTLIER, _FOLLOW = 1.5, 0.1
"""A step takes at most so many times the usual one, which follows by this share."""
_NUM_REFERENCES = 9
_RELAXING_STEPS = 3000
"""After so many steps without a source, most of what was seen of it is forgotten."""


@dataclass(slots=True)
class _Sums:
    got: float = 0.0
    expected: float = 0.0
    usual: float = 0.0

    def add(self, promised: float, got: float, taken: float) -> None:
        if self.usual:
            taken = min(taken, _OUTLIER * self.usual)
        self.usual += (taken - self.usual) * (_FOLLOW if self.usual else 1.0)
        self.got = _KEEP * self.got + got
        self.expected = _KEEP * self.expected + promised * taken

    def scale(self, share: float) -> None:
        self.got *= share
        self.expected *= share

    @property
    def factor(self) -> float:
        return (self.got + _PRIOR) / (self.expected + _PRIOR)


class Feedback:
    """By how much the sources keep less than they promise."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sums] = {}
        self._references: deque[float] = deque(maxlen=_NUM_REFERENCES)

    def factor(self, source: str) -> float:
        """What the promised gain of a source has to be multiplied by, at most 1."""
        sums = self._sums.get(source)
        return 1.0 if sums is None else min(max(sums.factor, _LEAST), _MOST)

    def note_reference(self, taken: float) -> None:
        """A plain step amid drafts took so many times what was expected."""
        self._references.append(taken)

    def note_drafted(
        self, sources: Collection[str], promised: float, got: float, taken: float
    ) -> None:
        """A step was drafted for by these sources.

        Args:
            promised: the rate that was planned, over that without drafts.
            got: tokens, over those of a step without drafts.
            taken: seconds, over those that are expected of a step without drafts.
        """
        # One reference may have met a busy moment; until there are a few, none is believed.
        if len(self._references) >= 3:
            taken /= statistics.median(self._references)
        for source in sources:
            self._sums.setdefault(source, _Sums()).add(promised, got, taken)

    def relax(self, num_steps: int, sources: Collection[str]) -> None:
        """Forget a part of what was seen, of all but these sources: they were not asked in so many
        steps, and things may have changed."""
        for source, sums in self._sums.items():
            if source not in sources:
                sums.scale(max(0.0, 1.0 - num_steps / _RELAXING_STEPS))
