"""Limits how much of long prompts a step computes next to sequences that decode.

    seconds of a step
        |        .--- 1.75 times the usual: what a step may take
        |       /
        |------'      usual: a step without prompts
        +------|----- tokens of prompts
             limit

Everyone who decodes waits for the whole step. So the time of steps with and without prompts is
measured while the engine runs, and long prompts get what fits in between. No outcome depends on it
where a token's logits do not depend on the chunk, see docs/lossless.md.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

from folospec.core.sequence_step import SequenceStep

_FIRST, _LEAST = 16, 4
"""Tokens of the first such step, and of any."""
_NUM_USUAL, _NUM_MIXED = 5, 15
_REFRESH = 20
"""After so many steps with prompts one is without, so that it stays known what one takes: drafts
come and go, and so do sequences."""


class PrefillPace:
    """Chooses the limit that `Scheduler.schedule` takes.

    Args:
        slowdown: how many times the usual step one may take for long prompts; None for no limit.
    """

    def __init__(self, slowdown: float | None) -> None:
        self._slowdown = slowdown
        self._limit = _FIRST
        self._usual: deque[float] = deque(maxlen=_NUM_USUAL)
        """Seconds of steps without prompts."""
        self._per_token: deque[float] = deque(maxlen=_NUM_MIXED)
        self._num_mixed = 0

    @property
    def limit(self) -> int | None:
        """Most tokens of long prompts in the next step, if others decode."""
        if self._slowdown is None:
            return None
        return self._limit if self._num_mixed < _REFRESH else 0

    def record(self, steps: Sequence[SequenceStep], seconds: float) -> None:
        """Learn from a step that took so long."""
        if self._slowdown is None:
            return
        chunks = [step.num_tokens for step in steps if step.num_tokens > 1]
        if not chunks:
            self._usual.append(seconds)
            self._num_mixed = 0
        elif self._usual and len(chunks) < len(steps):
            self._num_mixed += 1
            self._adjust(sum(chunks), seconds)

    def _adjust(self, num_tokens: int, seconds: float) -> None:
        """Medians, since a single step may meet anything; and slowly upwards, since a step that is
        too long has been too long when it is known."""
        assert self._slowdown is not None
        usual = statistics.median(self._usual)
        self._per_token.append(max(seconds - usual, 0.001 * usual) / num_tokens)
        fits = (self._slowdown - 1.0) * usual / statistics.median(self._per_token)
        self._limit = int(min(max(fits, _LEAST), 2.0 * self._limit))
