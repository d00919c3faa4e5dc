"""A linear fit that follows its data: recursive least squares with forgetting.

    y = coefficients . x        every observation moves the coefficients a little, the more the less
                                is known in the direction of x

Old observations lose weight, so that what has changed is learned anew. Where nothing new is seen
nothing is forgotten: the uncertainty of a direction never grows beyond what it was at first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_ALL = slice(None)
_FIRST_SEEN = 30


class OnlineFit:
    """Estimates y = coefficients . x from noisy observations; no coefficient is negative, as no
    part of a cost is.

    Args:
        prior: the coefficients before anything was seen.
        spread: how wrong each may be, a standard deviation.
        memory: after so many observations one has lost most of its weight.
        noise: standard deviation of an observation, relative to the prediction.
    """

    def __init__(
        self, prior: Sequence[float], spread: Sequence[float], *, memory: float, noise: float
    ) -> None:
        self._prior = np.array(prior, dtype=np.float64)
        self.coefficients: npt.NDArray[np.float64] = np.array(prior, dtype=np.float64)
        self._covariance = np.diag(np.square(np.array(spread, dtype=np.float64)))
        self._most = self._covariance.diagonal().copy()
        self._growth = 1.0 / (1.0 - 1.0 / memory)
        self._noise = noise
        self.num_seen = 0

    def predict(self, x: npt.NDArray[np.float64]) -> float:
        return float(self.coefficients @ x)

    def relax(self, share: float, which: slice = _ALL) -> None:
        """Go back to the prior by this share of the way, in the directions `which`: what is not
        seen any more may have changed."""
        back = self._prior[which] - self.coefficients[which]
        self.coefficients[which] += share * back

    def update(self, x: npt.NDArray[np.float64], y: float, floor: float) -> None:
        """Learn that `x` gave `y`. A surprise counts for its own size at most, and later on for a
        third of it: what is that wrong for once is an outlier, and what stays wrong is learned.

        Args:
            floor: the least that a prediction is taken for; above 0.
        """
        predicted = max(self.predict(x), floor)
        most = predicted * (1.0 if self.num_seen < _FIRST_SEEN else 0.33)
        surprise = min(max(y - self.predict(x), -most), most)
        gain = self._covariance @ x
        gain /= float(x @ gain) + (self._noise * predicted) ** 2
        # Where two directions were only seen together, noise would make one of them negative.
        np.maximum(self.coefficients + gain * surprise, 0.0, out=self.coefficients)
        self._covariance -= np.outer(gain, x @ self._covariance)
        self.num_seen += 1
        grown = self._covariance * self._growth
        if (grown.diagonal() <= self._most).all():
            self._covariance = grown
