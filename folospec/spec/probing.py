"""When to ask again where drafting was given up.

Every step puts a share of its time into a purse, and a probe is paid from it: whatever happens,
probing costs no more than that share. Per sequence and source the pauses between probes double,
from a few steps to many; a sequence that was never probed comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SHARE = 0.005
_MOST_STEPS = 200
"""The purse holds the shares of so many steps at most."""
_FIRST_PAUSE, _LONGEST_PAUSE = 8, 512
_BURST = 3
"""Steps that one probe goes on for: what was caught up with is cheap to use again."""


@dataclass(slots=True)
class _Place:
    next_probe: int = 0
    pause: int = _FIRST_PAUSE
    until: int = -1


class Probing:
    """The purse, and who was probed when."""

    def __init__(self) -> None:
        self._purse = 0.0
        self._step_seconds = 0.0
        self._now = 0
        self._places: dict[tuple[str, str], _Place] = {}

    def earn(self, seconds: float) -> None:
        """Put aside a share of a step."""
        self._step_seconds += 0.05 * (seconds - self._step_seconds)
        self._put(SHARE * seconds)

    def earn_again(self, num_steps: int) -> None:
        """Put the same share of so many steps aside that were not timed."""
        self._put(SHARE * num_steps * self._step_seconds)

    def _put(self, seconds: float) -> None:
        most = SHARE * _MOST_STEPS * self._step_seconds
        self._purse = min(self._purse + seconds, most)

    @property
    def has_money(self) -> bool:
        return self._purse > 0.0

    def next_plan(self, rested: int) -> None:
        """Time goes on, by a step and those that rested."""
        self._now += 1 + rested

    def choose(self, source: str, seq_ids: Sequence[str]) -> int | None:
        """Which of these sequences to probe now: the one whose turn came first, or None."""
        best, turn = None, self._now + 1
        for index, seq_id in enumerate(seq_ids):
            place = self._places.get((source, seq_id))
            due = (
                0 if place is None else self._now if self._now <= place.until else place.next_probe
            )
            if due < turn:
                best, turn = index, due
        return best

    def begin(self, source: str, seq_id: str, loss: float) -> None:
        """Probe, at a cost of `loss` seconds; a new one, or one more step of the last."""
        place = self._places.setdefault((source, seq_id), _Place())
        if self._now > place.until:
            place.until = self._now + _BURST - 1
            place.next_probe = place.until + place.pause
            place.pause = min(2 * place.pause, _LONGEST_PAUSE)
        self._purse -= loss

    def pay(self, seconds: float) -> None:
        """Take what something else costs that may pay later."""
        self._purse -= seconds

    def is_probing(self, source: str, seq_id: str) -> bool:
        place = self._places.get((source, seq_id))
        return place is not None and self._now <= place.until

    def forget(self, source: str, seq_id: str) -> None:
        self._places.pop((source, seq_id), None)
