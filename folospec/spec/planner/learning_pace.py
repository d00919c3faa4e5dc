"""Chooses the steps that the planner learns from, and those that run plain for comparison.

Learning takes time, too.
"""

from __future__ import annotations

_LEARN_PLAIN, _LEARN_DRAFTED = 256, 64
"""Steps of each kind that are learned from at first."""
SURE_GAIN = 1.15
"""A gain that is beyond doubt."""
_LEARN_EVERY, _SURE_EVERY = 5, 17
"""Which of the drafted steps are learned from later, and which where the gain is sure. A plan holds
for 8 or 16, so those are now the first and now the last of theirs."""
REFERENCE_STEPS = 3
"""Plain steps in a row, of which the last is learned from: the first ones find in the processor's
caches what drafters have left there, and are slower than plain decoding."""
_FIRST_PLAIN, _REFERENCE_SHARE, _REFERENCE_EVERY = 2, 0.005, (24, 200)
"""Plain steps amid drafts cost this share of the time, and come after so many steps at least and at
most: the less drafts gain, the sooner it has to be known whether they do."""


class LearningPace:
    """Counts plain and drafted steps."""

    def __init__(self) -> None:
        self._num_plain = self._since_plain = self._num_drafted = self._last_learned = 0
        self.num_skipped = self.num_drafted_skipped = 0
        """Plain and drafted steps since the last plan that were not timed."""

    @property
    def is_settled(self) -> bool:
        """Whether the first plain steps are over, which are taken whatever drafts bring."""
        return self._num_plain >= _FIRST_PLAIN

    @property
    def knows_plain(self) -> bool:
        """Whether so many plain steps were seen that the next is like them."""
        return self._num_plain > _LEARN_PLAIN

    def needs_reference(self, gain: float) -> bool:
        """Whether a plain step is due where drafts bring `gain` times the rate."""
        least, most = _REFERENCE_EVERY
        every = min(max(REFERENCE_STEPS * (gain - 1.0) / _REFERENCE_SHARE, least), most)
        return not self.is_settled or self._since_plain >= every

    def add_plain(self) -> None:
        self._num_plain += 1
        self._since_plain = 0

    def add_planned(self, num_steps: int, *, is_drafted: bool) -> None:
        """A plan has held for so many steps."""
        if is_drafted:
            self._since_plain += num_steps
        self._num_plain += self.num_skipped
        self.num_skipped = self.num_drafted_skipped = 0

    def learns_drafted(self, gain: float) -> bool:
        """Whether to learn from one more step where drafts bring `gain` times the rate."""
        self._num_drafted += 1
        every = _LEARN_EVERY if gain < SURE_GAIN else _SURE_EVERY
        is_due = self._num_drafted >= self._last_learned + every
        if is_due or self._num_drafted <= _LEARN_DRAFTED:
            self._last_learned = self._num_drafted
            return True
        return False

    def skip_drafted(self) -> None:
        """A drafted step is over that nothing is to be learned from."""
        self._num_drafted += 1
        self.num_drafted_skipped += 1
