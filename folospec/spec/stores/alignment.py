"""Aligns an output with the text that the caller predicted, over edits and moves.

    expected   for count in range ( 10 ) : print ( count )
    output     for index in range ( 10 ) : print (           place: before "count"
                   `----- count -> index: learned           readings: "index" (learned), "count"

While the output agrees, the place moves along. Where it departs, the place is an anchor, and the
next tokens say where the output goes on: a few tokens later (something was replaced, inserted or
left out), or far away (something was moved). Until enough tokens agree, every guess is a `Reading`.
Once they do, what was passed over and what was written instead are a replacement, which is expected
wherever the same tokens come again.

A token costs O(1): it is compared with one expected token, or looked up in an index of the expected
text that is built once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from folospec.spec.stores.acceptance_table import AcceptanceTable

MAX_CHANGE = 8
"""Most tokens of a replacement, on either side."""
MAX_REPLACEMENTS = 64
NEARBY = 32
"""How many tokens ahead of the anchor an output that departed is first looked for."""
FAR_MATCH = 2
"""How many tokens more must agree to take the text up farther away."""
MAX_PLACES = 8
"""Most places of an n-gram that are compared, on either side of the anchor."""

WEIGHTS = {"same": 1.0, "resumed": 0.6, "moved": 0.4, "changed": 0.4, "inserted": 0.2}
"""How much a reading is believed at first, against others of the same moment."""
BEGUN = 0.9
"""How likely a replacement is to be made whole, once the output agrees with it alone."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One way to go on: first the tokens `rest`, then the expected text from `place` on."""

    place: int
    kind: str
    """"same": as expected. After a departure: "resumed" where the last tokens are found nearby,
    "moved" where they are found elsewhere, "changed" as many tokens further on as were written,
    "inserted" where it departed, "replaced" in the middle of a replacement."""
    run: int = 0
    """Tokens that agreed so far."""
    rest: tuple[int, ...] = ()


@dataclass(slots=True)
class Trial:
    """A replacement that can begin where the output is: which of the two will it be?"""

    old: tuple[int, ...]
    new: tuple[int, ...]
    start: int
    """Where `old` begins in the expected text."""
    num_written: int = 0
    """Tokens of `new` that the output has."""


class Alignment:
    """Follows one output.

    Args:
        expected: the expected text.
        min_match, max_match: how many tokens must agree to take up the text again after a
            departure, and how many are compared at most to choose among several places.
    """

    def __init__(self, expected: Sequence[int], min_match: int, max_match: int) -> None:
        self.expected = tuple(expected)
        self.min_match, self.max_match = min_match, max_match
        self.output: list[int] = []
        self.place = 0
        """The expected token that comes next, or the anchor."""
        self.run = 0
        self.num_departed = 0
        """Tokens since the output departed, 0 while it agrees."""
        self.replacements: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._trial: Trial | None = None
        self._outcomes = AcceptanceTable(weight=1.0)
        self._places: dict[tuple[int, ...], list[int]] = {}  # n-gram -> where it ends
        for end in range(min_match, len(self.expected) + 1):
            gram = self.expected[end - min_match : end]
            self._places.setdefault(gram, []).append(end)

    def append(self, token_id: int) -> None:
        """Follow the output by a token."""
        self.output.append(token_id)
        if self.num_departed == 0:
            if self._trial is None:
                self._trial = self._trial_at(self.place)
            if self.place < len(self.expected) and self.expected[self.place] == token_id:
                self.place += 1
                self.run += 1
            else:
                self.num_departed = 1
        else:
            self.num_departed += 1
        if self._trial is not None:
            self._decide(self._trial, token_id)
        if self._trial is None and self.num_departed >= self.min_match:
            self._realign()

    def _trial_at(self, place: int) -> Trial | None:
        """The replacement of the most tokens that the expected text has at a place."""
        if not self.replacements:
            return None
        for length in range(min(MAX_CHANGE, len(self.expected) - place), 0, -1):
            old = self.expected[place : place + length]
            if old in self.replacements:
                return Trial(old, self.replacements[old], place)
        return None

    def _decide(self, trial: Trial, token_id: int) -> None:
        """See whether the output goes on as the replacement says."""
        if token_id != trial.new[trial.num_written]:
            self._record(trial, replaced=False)
            self._trial = None
            return
        trial.num_written += 1
        if trial.num_written == len(trial.new):
            self._record(trial, replaced=True)
            self._trial = None
            self.place, self.run, self.num_departed = trial.start + len(trial.old), 0, 0

    def _realign(self) -> None:
        """Take the text up where the last tokens are found, and learn what was replaced."""
        found = self._find(nearby=True)
        if found is None:
            found = self._find(nearby=False)
            if found is None or found[1] < min(self.min_match + FAR_MATCH, self.max_match):
                return
        end, length = found
        agreed = min(length, self.num_departed)
        if end - agreed >= self.place:
            self._learn(end - agreed, self.num_departed - agreed, agreed)
        self.place, self.run, self.num_departed = end, length, 0

    def _find(self, *, nearby: bool) -> tuple[int, int] | None:
        """Where the last tokens end in the expected text, and how many agree: most of them, or else
        nearest to the anchor, ahead rather than behind."""
        places = self._places.get(tuple(self.output[-self.min_match :]), [])
        middle = bisect_left(places, self.place + 1)
        ahead = places[middle : middle + MAX_PLACES]
        if nearby:
            candidates = [end for end in ahead if end <= self.place + NEARBY]
        else:
            candidates = ahead + places[max(0, middle - MAX_PLACES) : middle][::-1]
        best: tuple[int, int] | None = None
        for end in candidates:
            length = self._agreement(end)
            if best is None or length > best[1]:
                best = (end, length)
        return best

    def _agreement(self, end: int) -> int:
        """How many of the last tokens stand before `end`."""
        length, most = 0, min(self.max_match, end, len(self.output))
        while length < most and self.expected[end - 1 - length] == self.output[-1 - length]:
            length += 1
        return length

    def _learn(self, end: int, num_written: int, agreed: int) -> None:
        """The expected tokens up to `end` were replaced by the `num_written` ones before those that
        agree. An insertion is told by the token before it, an omission by those on both sides."""
        start, last = self.place, len(self.output) - agreed
        first = last - num_written
        if num_written == 0 or end == start:
            start, first = start - 1, first - 1
        if num_written == 0:
            end, last = end + 1, last + 1
        old, new = self.expected[max(0, start) : end], tuple(self.output[max(0, first) : last])
        if start < 0 or first < 0 or len(old) > MAX_CHANGE or len(new) > MAX_CHANGE or old == new:
            return
        self.replacements.pop(old, None)
        if len(self.replacements) == MAX_REPLACEMENTS:
            del self.replacements[next(iter(self.replacements))]
        self.replacements[old] = new
        self._record(Trial(old, new, start), replaced=True)

    def _record(self, trial: Trial, *, replaced: bool) -> None:
        for key in _outcome_keys(trial, self.expected):
            self._outcomes.record(key, replaced)

    def _chance(self, trial: Trial) -> float:
        """How likely it is that the replacement is made."""
        alone, followed = _outcome_keys(trial, self.expected)
        return self._outcomes.estimate(followed, prior=self._outcomes.estimate(alone))

    def readings(self) -> list[tuple[float, Reading]]:
        """The ways to go on from here, and how likely each is; together at most 1."""
        readings: list[tuple[float, Reading]] = []
        left = 1.0
        trial = self._trial
        if trial is not None:
            chance = BEGUN if self.num_departed else self._chance(trial)
            rest = trial.new[trial.num_written :]
            after = Reading(trial.start + len(trial.old), "replaced", trial.num_written, rest)
            readings.append((chance, after))
            left = 1.0 - chance
        guesses = [(WEIGHTS[reading.kind], reading) for reading in self._guesses()]
        total = max(1.0, sum(weight for weight, _ in guesses))
        return readings + [(left * weight / total, reading) for weight, reading in guesses]

    def _guesses(self) -> Iterator[Reading]:
        if self.num_departed == 0:
            yield Reading(self.place, "same", self.run)
            return
        resumed = self._resumed()
        if resumed is not None:
            yield resumed
        elsewhere = self._find(nearby=False)
        if elsewhere is not None and (resumed is None or elsewhere[0] != resumed.place):
            yield Reading(elsewhere[0], "moved", elsewhere[1])
        if self.num_departed <= MAX_CHANGE:
            yield Reading(self.place + self.num_departed, "changed")
            yield Reading(self.place, "inserted")

    def _resumed(self) -> Reading | None:
        """The place nearby where most of the tokens since the departure are found."""
        for length in range(min(self.num_departed, self.min_match - 1), 0, -1):
            tail = tuple(self.output[-length:])
            for end in range(self.place + length, self.place + NEARBY):
                if self.expected[end - length : end] == tail:
                    return Reading(end, "resumed", length)
        return None

    def continuations(self, reading: Reading) -> list[tuple[int, float, Reading]]:
        """The next tokens of a reading: token id, share, the reading after it. There are two where
        a replacement may begin."""
        place, run = reading.place, reading.run + 1
        if reading.rest:
            rest = reading.rest[1:]
            after = Reading(place, "replaced", run, rest) if rest else Reading(place, "same")
            return [(reading.rest[0], 1.0, after)]
        if place >= len(self.expected):
            return []
        as_expected = replace(reading, place=place + 1, run=run)
        trial = self._trial_at(place)
        if trial is None:
            return [(self.expected[place], 1.0, as_expected)]
        chance = self._chance(trial)
        instead = Reading(place + len(trial.old), "replaced", 0, trial.new)
        [(token_id, _, after)] = self.continuations(instead)
        return [(token_id, chance, after), (self.expected[place], 1.0 - chance, as_expected)]


def _outcome_keys(trial: Trial, expected: tuple[int, ...]) -> tuple[tuple, tuple]:
    """A replacement alone, and with the expected token that follows it."""
    end = trial.start + len(trial.old)
    return (trial.old, trial.new), (trial.old, trial.new, expected[end : end + 1])
