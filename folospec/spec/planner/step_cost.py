"""Estimates what a step costs as a function of its rows, and what a draft costs.

                   seconds of a step
                       |             ..*        pass    the target's rows, a measured curve: flat
                       |        ..*''                   while weights are the limit, then steep
                       |*---*-''                host    scheduling, sampling, commit: per step, per
                       +----------- rows                sequence, per draft token

Two things change while the engine runs. The machine as a whole gets slower or faster, when another
process takes a part of it: one factor, `slowdown`, follows that within a few steps, and nothing is
decided by it, since only ratios matter. And the shape was measured wrong or has changed: the
coefficients follow that slowly, from how steps of different shapes compare.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from folospec.spec.planner.online_fit import OnlineFit

MAX_ROWS = 4096
"""The curve is tabulated up to here; a larger pass costs as if it had so many rows."""
_HOST_SECONDS = (3e-4, 3e-5, 4e-5, 2e-5)
"""Host time per step, sequence, step in which anyone is asked, and draft token, at first."""
ASKING_SECONDS = (6e-5, 2e-5)
"""Host time of a question to a drafter, per call and sequence, before any was timed."""
_SETTLED_CALLS = 50
_MUCH = 16
"""Tokens of a sequence to catch up with, of which one learns what reading them costs."""
_UNSETTLED_STEPS, _UNSETTLED_CALLS = 2, 4
"""First steps and questions, which pay for what is made once, are not learned from."""
_SLOWDOWN_RATE = 0.2
_LEAST_SHARE = 0.2
"""No step is expected to take less than so much of what the curve says of its pass."""
_ASKED, _MODEL, _DRAFTING = 3, 4, slice(3, 6)
"""The coefficients of a step in which anyone is asked, and of one in which a model is; and of
these and of each draft."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """What is in a step besides draft tokens: rows of committed tokens, sequences that get a token,
    and the tokens that these see, all sequences together."""

    num_rows: int
    num_sequences: int
    context: int = 0


class CostCurve:
    """Seconds of the target's pass by number of rows, linear between measured points, and beyond
    the last one as steep as it was from the first to the last.

    Args:
        points: number of rows -> seconds, at least one; a pass with more rows costs no less.

    Raises:
        ValueError: there is no point, or one is not positive.
    """

    def __init__(self, points: Mapping[int, float]) -> None:
        rows = sorted(points)
        if not rows or rows[0] < 1 or any(not 0 < points[n] < math.inf for n in rows):
            raise ValueError(f"points must have positive rows and seconds, got {dict(points)}")
        seconds = np.maximum.accumulate([points[n] for n in rows])
        counts = np.arange(MAX_ROWS + 1)
        table = np.interp(counts, rows, seconds)
        if len(rows) > 1:
            slope = (seconds[-1] - seconds[0]) / (rows[-1] - rows[0])
            table = np.where(counts > rows[-1], seconds[-1] + slope * (counts - rows[-1]), table)
        self.table: list[float] = table.tolist()
        self.points = dict(zip(rows, seconds.tolist(), strict=True))

    def at(self, num_rows: int) -> float:
        return self.table[min(num_rows, MAX_ROWS)]


DEFAULT_CURVE = CostCurve({1: 0.01, 64: 0.03})
"""Where nothing was measured: what weights cost once, and a little for every row."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What is known of costs before the first step: the curve of the target's pass, and by drafter
    the guess that `DraftCost` takes."""

    curve: CostCurve = DEFAULT_CURVE
    guesses: Mapping[str, tuple[float, float, float, float, float]] = field(default_factory=dict)


UNKNOWN_COSTS = Costs()


class StepCost:
    """Seconds of a step without its drafting.

    Args:
        curve: of the target's pass.
    """

    def __init__(self, curve: CostCurve = DEFAULT_CURVE) -> None:
        self.curve = curve
        self.slowdown = self.speed_now = 1.0
        """How much slower the machine is than when the curve was measured: lately, and in the last
        step alone."""
        self._unit = curve.at(1)
        step, sequence, asked, draft = (seconds / self._unit for seconds in _HOST_SECONDS)
        self._fit = OnlineFit(
            [1.0, 1.0 + step, sequence, asked, 0.0, draft, 0.0],
            # What one row costs shows in every step, and what more of them cost depends on what
            # else uses the machine: there the curve is no more than a guess.
            [1.0, 0.1 + step, sequence + 0.03, asked + 0.02, 0.1, draft + 0.02, 0.1],
            memory=150,
            noise=0.1,
        )
        self._num_steps = 0

    @property
    def num_seen(self) -> int:
        """Steps that were learned from."""
        return self._fit.num_seen

    def _features(
        self, shape: StepShape, num_draft_rows: int, asked: bool, model: bool
    ) -> list[float]:
        rise = self.curve.at(shape.num_rows + num_draft_rows) / self._unit - 1.0
        counts = float(asked), float(model), num_draft_rows, shape.context / 4096
        return [rise, 1.0, shape.num_sequences, *counts]

    def _expected_units(self, x: list[float]) -> float:
        """Of a step with these features on an undisturbed machine, in passes of one row."""
        return max(self._fit.predict(x), _least_units(x))

    @property
    def asking(self) -> float:
        """Seconds that a step takes longer because anyone is asked for a draft, whatever comes of
        it and without the asking itself."""
        return self._fit.coefficients[_ASKED] * self._unit * self.slowdown

    @property
    def asking_model(self) -> float:
        """Seconds that a step takes longer still because a model is asked, whose weights take the
        place of the target's in the processor's caches."""
        return self._fit.coefficients[_MODEL] * self._unit * self.slowdown

    def table(self, shape: StepShape, most: int) -> list[float]:
        """Expected seconds with 0, 1, ... `most` draft rows, without `asking`: never falling."""
        first = min(shape.num_rows, MAX_ROWS)
        passed = self.curve.table[first : first + most + 1]
        passed += passed[-1:] * (most + 1 - len(passed))
        rise, base, sequence, _, _, draft, context = self._fit.coefficients
        fixed = base - rise + sequence * shape.num_sequences + context * shape.context / 4096
        fixed *= self._unit * self.slowdown
        rise *= self.slowdown
        draft *= self._unit * self.slowdown
        seconds = [rise * one + fixed + draft * count for count, one in enumerate(passed)]
        seconds[0] = max(seconds[0], _LEAST_SHARE * passed[0] * self.slowdown)
        return list(accumulate(seconds, max))

    def expected(self, shape: StepShape, num_draft_rows: int) -> float:
        """Expected seconds with so many draft rows, without `asking`: one entry of `table`, for
        what is asked in every step."""
        x = self._features(shape, num_draft_rows, asked=False, model=False)
        return self._expected_units(x) * self._unit * self.slowdown

    def observe(
        self,
        shape: StepShape,
        num_draft_rows: int,
        seconds: float,
        *,
        asked: bool = False,
        model: bool = False,
        learn: bool = True,
    ) -> None:
        """Learn from a step that took so long: how fast the machine is, and if `learn`, which takes
        time of its own, what steps of this shape cost. `asked` says that a drafter was, for
        anyone, and `model` that one with a model was."""
        self._num_steps += 1
        if self._num_steps <= _UNSETTLED_STEPS or seconds <= 0:
            return
        x = self._features(shape, num_draft_rows, asked or num_draft_rows > 0, model)
        expected = self._expected_units(x)
        units = seconds / self._unit
        if self._num_steps == _UNSETTLED_STEPS + 1:
            self.slowdown = units / expected
        # First the machine: what it does to all steps is not to be learned of this one.
        ratio = units / (self.slowdown * expected)
        self.slowdown *= min(max(ratio, 0.5), 2.0) ** _SLOWDOWN_RATE
        self.speed_now = units / expected
        if learn:
            self._fit.update(x, units / self.slowdown, _least_units(x))

    def relax(self, share: float) -> None:
        """Forget a share of what was learned of draft rows, when there are none."""
        self._fit.relax(share, _DRAFTING)


def _least_units(x: list[float]) -> float:
    return _LEAST_SHARE * (1.0 + x[0])


class DraftCall(NamedTuple):
    """What a drafter is asked in one call: for how many rows, how many passes its model makes, how
    many levels the drafts of all rows have together, and how many tokens it catches up with."""

    num_rows: int
    num_passes: int
    num_levels: int
    num_uncomputed: int

    @property
    def catches_up(self) -> bool:
        """Whether there is much more to read than what a step adds."""
        return self.num_uncomputed > _MUCH * self.num_rows


class DraftCost:
    """Seconds of asking a drafter, by how many rows are asked, how many passes its model makes, and
    how many tokens it has to catch up with.

    Args:
        unit: seconds of a pass of the target with one row: what is not known yet is guessed
            relative to it.
        in_passes: whether the drafter runs a model, once for each level.
        guess: what is known before any draft: seconds per call, row, pass, row and pass, and token
            to catch up with. Too low is tried and learned; too high may never be tried.
    """

    def __init__(
        self, unit: float, *, in_passes: bool, guess: Sequence[float] | None = None
    ) -> None:
        self._unit, self.in_passes = unit, in_passes
        call, row = (seconds / unit for seconds in ASKING_SECONDS)
        start = [call, row, 0.1, 0.002, 0.0005] if in_passes else [call, row, 0, 0, 0.0005]
        spread = [0.1, 0.03, 0.3, 0.03, 0.004] if in_passes else [0.02, 0.03, 0, 0, 0.004]
        spread = [spread[0] + call, spread[1] + row, *spread[2:]]
        if guess is not None:
            start = [seconds / unit for seconds in guess]
            # A pass was timed, and what comes before the first was not.
            spread[0], spread[2] = 0.15 + call, 0.05 + 0.5 * start[2]
        self._fit = OnlineFit(start, spread, memory=100, noise=0.2)
        self._num_calls = 0

    def parts(self, slowdown: float) -> tuple[float, float, float, float, float]:
        """Seconds per call, per row, per pass, per row and pass, and per token of catching up; none
        is negative."""
        scale = self._unit * slowdown
        call, row, one_pass, level, num_uncomputed = self._fit.coefficients
        return call * scale, row * scale, one_pass * scale, level * scale, num_uncomputed * scale

    @property
    def is_settled(self) -> bool:
        """Whether so many calls were learned from that the next are mostly like them."""
        return self._fit.num_seen >= _SETTLED_CALLS

    def observe(self, call: DraftCall, seconds: float, slowdown: float) -> None:
        """Learn from one call, but the first ones."""
        self._num_calls += 1
        unsettled = 1 if self.in_passes else _UNSETTLED_CALLS
        if self._num_calls <= unsettled or seconds <= 0:
            return
        self._fit.update(self._features(call), seconds / (self._unit * slowdown), 1e-4)

    def expected(self, call: DraftCall, slowdown: float) -> float:
        """Seconds of one call."""
        return self._fit.predict(self._features(call)) * self._unit * slowdown

    def _features(self, call: DraftCall) -> tuple[float, ...]:
        passes, levels = (call.num_passes, call.num_levels) if self.in_passes else (0, 0)
        return 1.0, call.num_rows, passes, levels, call.num_uncomputed

    def relax(self, share: float) -> None:
        """Forget a share of what was learned, when the drafter is not asked."""
        self._fit.relax(share)
