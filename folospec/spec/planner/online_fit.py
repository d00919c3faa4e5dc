"""Fits a linear model that follows its data: recursive least squares with forgetting.

    y = coefficients . x        every observation moves the coefficients a little, the more the less
                                is known in the direction of x

Old observations lose weight, so that what has changed is learned anew. Where nothing new is seen
nothing is forgotten: the uncertainty of a direction never grows beyond what it was at first.
"""

from __future__ import annotations

from collections.abc import Sequence

_FIRST_SEEN = 30


class OnlineFit:
    """Estimates y = coefficients . x from noisy observations; no coefficient is negative, as no
    part of a cost is.

    It works on lists: between two passes of a model a handful of floats is faster in Python than in
    numpy, whose code is no longer in the processor's caches.

    Args:
        prior: the coefficients before anything was seen.
        spread: how wrong each may be, a standard deviation.
        memory: after so many observations one has lost most of its weight.
        noise: standard deviation of an observation, relative to the prediction.
    """

    def __init__(
        self, prior: Sequence[float], spread: Sequence[float], *, memory: float, noise: float
    ) -> None:
        self._prior = [float(value) for value in prior]
        self.coefficients = list(self._prior)
        self._most = [deviation**2 for deviation in spread]
        self._covariance = [
            [variance if row == column else 0.0 for column in range(len(spread))]
            for row, variance in enumerate(self._most)
        ]
        self._growth = 1.0 / (1.0 - 1.0 / memory)
        self._noise = noise
        self.num_seen = 0

    def predict(self, x: Sequence[float]) -> float:
        return _dot(self.coefficients, x)

    def relax(self, share: float, which: slice = slice(None)) -> None:
        """Go back to the prior by this share of the way, in the directions `which`: what is not
        seen any more may have changed."""
        for index in range(len(self._prior))[which]:
            self.coefficients[index] += share * (self._prior[index] - self.coefficients[index])

    def update(self, x: Sequence[float], y: float, floor: float) -> None:
        """Learn that `x` gave `y`. A surprise counts for its own size at most, and later on for a
        third of it: what is that wrong for once is an outlier, and what stays wrong is learned.

        Args:
            floor: the least that a prediction is taken for; above 0.
        """
        expected = self.predict(x)
        predicted = max(expected, floor)
        most = predicted * (1.0 if self.num_seen < _FIRST_SEEN else 0.33)
        surprise = min(max(y - expected, -most), most)
        seen = [_dot(row, x) for row in self._covariance]
        scale = _dot(seen, x) + (self._noise * predicted) ** 2
        gain = [value / scale for value in seen]
        # Where two directions were only seen together, noise would make one of them negative.
        self.coefficients = [
            max(0.0, old + share * surprise)
            for old, share in zip(self.coefficients, gain, strict=True)
        ]
        self.num_seen += 1
        kept = [
            [old - share * value for old, value in zip(row, seen, strict=True)]
            for row, share in zip(self._covariance, gain, strict=True)
        ]
        variances = [row[index] * self._growth for index, row in enumerate(kept)]
        if all(one <= most for one, most in zip(variances, self._most, strict=True)):
            kept = [[value * self._growth for value in row] for row in kept]
        self._covariance = kept


def _dot(first: Sequence[float], second: Sequence[float]) -> float:
    return sum([a * b for a, b in zip(first, second, strict=True)])
