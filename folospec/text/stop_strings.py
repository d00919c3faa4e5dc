"""Finds stop strings in a growing text, each character once, however many strings there are.

It is the automaton of Aho and Corasick ("Efficient string matching", 1975): a state is the longest
end of the text with which a stop string begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from folospec.text.detokenizer import Detokenizer


class Match(NamedTuple):
    """A stop string, and where in the text it begins."""

    begin: int
    stop: str


class StopStrings:
    """The automaton; state 0 is the start. Sequences share it.

    Attributes:
        found: by state, the longest stop string that the text ends with, None if there is none.
        num_held: by state, how many characters at the end of the text may become a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]
        self.found: list[str | None] = [None]
        self.num_held = [0]
        depths = [0]
        for stop in stops:
            state = 0
            for char in stop:
                if char not in self._next[state]:
                    self._next[state][char] = len(self._next)
                    self._next.append({})
                    self._fallback.append(0)
                    self.found.append(None)
                    self.num_held.append(0)
                    depths.append(depths[state] + 1)
                state = self._next[state][char]
            self.found[state] = stop
        self._link(depths)

    def _link(self, depths: list[int]) -> None:
        """Fill in what each state has of the state of its longest proper end, shortest first."""
        queue = list(self._next[0].values())
        for state in queue:
            fallback = self._fallback[state]
            self.found[state] = self.found[state] or self.found[fallback]
            self.num_held[state] = depths[state] if self._next[state] else self.num_held[fallback]
            for char, child in self._next[state].items():
                self._fallback[child] = self.step(fallback, char)
                queue.append(child)

    def step(self, state: int, char: str) -> int:
        """The state after one more character."""
        while char not in self._next[state] and state:
            state = self._fallback[state]
        return self._next[state].get(char, 0)


class StopSearch:
    """Follows the text of one sequence."""

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._state = self._num_read = 0
        # Where the text is settled; what comes after may be taken back.
        self._settled_state = self._num_settled = 0
        self._num_taken_back = 0

    def advance(self, detokenizer: Detokenizer) -> Match | None:
        """Read what is new in the text, and return the stop string that ends in it; of several the
        one that begins first, then the shortest."""
        if detokenizer.num_taken_back != self._num_taken_back:
            self._state, self._num_read = self._settled_state, self._num_settled
            self._num_taken_back = detokenizer.num_taken_back
        best: Match | None = None
        for char in detokenizer.text_from(self._num_read):
            self._state = self._stops.step(self._state, char)
            self._num_read += 1
            stop = self._stops.found[self._state]
            if stop is not None and (best is None or self._num_read - len(stop) < best.begin):
                best = Match(self._num_read - len(stop), stop)
        if detokenizer.num_settled == self._num_read:
            self._settled_state, self._num_settled = self._state, self._num_read
        return best

    @property
    def num_safe(self) -> int:
        """How many characters can no longer be taken back, or become part of a stop string."""
        held = self._stops.num_held
        safe = self._num_settled - held[self._settled_state]
        return min(safe, self._num_read - held[self._state])

    def fork(self) -> StopSearch:
        fork = StopSearch(self._stops)
        fork._state, fork._num_read = self._state, self._num_read
        fork._settled_state, fork._num_settled = self._settled_state, self._num_settled
        fork._num_taken_back = self._num_taken_back
        return fork
