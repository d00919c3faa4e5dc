"""The passes over parts of rows that every draw begins with, as launches: see `gpu.draw`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from folospec.kernels.gpu import launch
from folospec.kernels.gpu.draw import scan_kernel, weigh_kernel
from folospec.kernels.gpu.filters import narrow_kernel, select_kernel
from folospec.kernels.gpu.sampling_arrays import DRAW

NUM_WARPS = 8


class Found(NamedTuple):
    """What is found out about the rows of some draws before they are drawn; see the kernels."""

    draws: Tensor
    peaks: Tensor
    firsts: Tensor
    roughs: Tensor
    sums: Tensor
    """Only for children."""
    totals: Tensor
    """For children only where there are filters."""

    def __getitem__(self, rows: slice) -> Found:  # type: ignore[override]
        return Found(*(tensor[rows] for tensor in self))
