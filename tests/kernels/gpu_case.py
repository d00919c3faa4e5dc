"""One check of a GPU kernel: inputs, a launch, and what its oracle says.

The same cases run in Triton's interpreter (`test_gpu_*`), are compiled without a card
(`test_gpu_compile`), and run on a real one (`python -m gpu_check`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

GUARD = 64
"""Elements of canary on either side of a tensor."""
TINY = 0.01
"""Of the mean norm of rows: one with less is all cancellation."""


class Canvas:
    """Memory for an output: poisoned, between canaries.

    Floats are poisoned with NaN, integers with a number no kernel writes.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str):
        size = math.prod(shape)
        is_float = dtype.is_floating_point
        self.canary = -12345.0 if is_float else -12345
        poison = math.nan if is_float else -54321
        self._all = torch.full((size + 2 * GUARD,), poison, dtype=dtype, device=device)
        self._all[:GUARD] = self.canary
        self._all[GUARD + size :] = self.canary
        self.tensor = self._all[GUARD : GUARD + size].view(*shape)

    @classmethod
    def of(cls, tensor: Tensor) -> Canvas:
        """A copy of a tensor, between canaries: for what a kernel changes in place."""
        canvas = cls(tensor.shape, tensor.dtype, tensor.device)
        canvas.tensor.copy_(tensor)
        return canvas

    def check(self) -> None:
        """Raise AssertionError if a canary has died."""
        size = self._all.numel() - 2 * GUARD
        alive = (self._all[:GUARD] == self.canary).all() & (
            self._all[GUARD + size :] == self.canary
        ).all()
        assert bool(alive), "a kernel wrote outside of its output"


@dataclass(kw_only=True)
class Case:
    """A launch and its oracle.

    `run` launches the kernel and returns its outputs by name; `expected` computes what they must
    be, floats in float64, on any device. No row of a float output may be off by more than
    `tolerance`, see `relative_error`; an integer one must be equal. `canvases` are looked at after
    the launch.
    """

    name: str
    run: Callable[[], dict[str, Tensor]]
    expected: Callable[[], dict[str, Tensor]]
    tolerance: float = 0.0
    canvases: list[Canvas] = field(default_factory=list)

    def check(self) -> float:
        """Run it; return the largest relative error.

        Raises:
            AssertionError: an output differs, has a NaN that the oracle has not, or a canary died.
        """
        found, worst = self.run(), 0.0
        for canvas in self.canvases:
            canvas.check()
        expected = self.expected()
        assert found.keys() == expected.keys(), (found.keys(), expected.keys())
        for name, wanted in expected.items():
            got = found[name].cpu()
            wanted = wanted.cpu()
            assert got.shape == wanted.shape, f"{self.name}: {name} has the shape {got.shape}"
            if not got.dtype.is_floating_point:
                assert torch.equal(got.long(), wanted.long()), f"{self.name}: {name} differs"
                continue
            error = relative_error(got, wanted)
            assert error <= self.tolerance, f"{self.name}: {name} is off by {error:.2e}"
            worst = max(worst, error)
        return worst


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """The largest |got - wanted| / |wanted| of all rows, which lie along the first dimension.

    A row with next to no norm is measured by the mean norm of the rows. Infinities equal
    themselves; a NaN is infinitely off.
    """
    if wanted.numel() == 0:
        return 0.0
    rows = (len(wanted) if wanted.dim() else 1, -1)
    got, wanted = got.double().reshape(rows), wanted.double().reshape(rows)
    off = (got - wanted).masked_fill(got == wanted, 0.0).norm(dim=1)
    norms = wanted.masked_fill(wanted.isinf(), 0.0).norm(dim=1)
    mean = norms.mean().clamp(min=1e-30)
    error = float((off / torch.where(norms < TINY * mean, mean, norms)).max())
    return math.inf if math.isnan(error) else error
