"""Decides when to try again where drafting was given up.

Every step puts a share of its time into a probe budget, and a probe is paid from it: whatever
happens, probing costs no more than that share. Per sequence and source the pauses between probes
double, from a few steps to many; a sequence that was never probed comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SHARE = 0.005
_MOST_STEPS = 200
"""The probe budget holds the shares of so many steps at most."""
_FIRST_PAUSE, _LONGEST_PAUSE = 8, 512
_BURST, _LONG_BURST = 3, 8
"""Steps that one probe goes on for: what was caught up with is cheap to use again, and answers of a
lookup are rare."""
_NUM_PHASES = 4


@dataclass(slots=True)
class _Schedule:
    next_probe: int = 0
    pause: int = _FIRST_PAUSE
    until: int = -1
    burst: int = _BURST


class Probing:
    """The probe budget, and who was probed when."""

    def __init__(self) -> None:
        self._probe_budget = 0.0
        self._step_seconds = 0.0
        self._now = 0
        self._schedules: dict[tuple[str, str], _Schedule] = {}
        self._num_spread: dict[str, int] = {}

    def add_share(self, seconds: float) -> None:
        """Put aside a share of a step."""
        self._step_seconds += 0.05 * (seconds - self._step_seconds)
        self._put(SHARE * seconds)

    def add_shares(self, num_steps: int) -> None:
        """Put the same share of so many steps aside that were not timed."""
        self._put(SHARE * num_steps * self._step_seconds)

    def _put(self, seconds: float) -> None:
        most = SHARE * _MOST_STEPS * self._step_seconds
        self._probe_budget = min(self._probe_budget + seconds, most)

    @property
    def has_budget(self) -> bool:
        return self._probe_budget > 0.0

    def next_plan(self, rested: int) -> None:
        """Time goes on, by a step and those that rested."""
        self._now += 1 + rested

    def choose(self, source: str, seq_ids: Sequence[str], *, spread: bool = False) -> int | None:
        """Which of these sequences to probe now: the one whose turn came first, or None.

        Args:
            spread: do not begin with every sequence where its output begins, but with three in four
                some pauses later: there is more to look up in a longer text.
        """
        best, turn = None, self._now + 1
        for index, seq_id in enumerate(seq_ids):
            schedule = self._schedules.get((source, seq_id))
            if schedule is None:
                schedule = self._schedules[source, seq_id] = self._new_schedule(source, spread)
            due = self._now if self._now <= schedule.until else schedule.next_probe
            if due < turn:
                best, turn = index, due
        return best

    def _new_schedule(self, source: str, spread: bool) -> _Schedule:
        if not spread:
            return _Schedule()
        phase = self._num_spread[source] = self._num_spread.get(source, -1) + 1
        due = self._now + phase % _NUM_PHASES * 2 * _FIRST_PAUSE
        return _Schedule(due if phase % _NUM_PHASES else 0, burst=_LONG_BURST)

    def begin(self, source: str, seq_id: str, loss: float) -> None:
        """Probe, at a cost of `loss` seconds; a new one, or one more step of the last."""
        schedule = self._schedules[source, seq_id]
        if self._now > schedule.until:
            schedule.until = self._now + schedule.burst - 1
            schedule.next_probe = schedule.until + schedule.pause
            schedule.pause = min(2 * schedule.pause, _LONGEST_PAUSE)
        self._probe_budget -= loss

    def spend(self, seconds: float) -> None:
        """Take what something else costs that may pay later."""
        self._probe_budget -= seconds

    def is_probing(self, source: str, seq_id: str) -> bool:
        schedule = self._schedules.get((source, seq_id))
        return schedule is not None and self._now <= schedule.until

    def forget(self, source: str, seq_id: str) -> None:
        self._schedules.pop((source, seq_id), None)
