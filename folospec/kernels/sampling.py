"""Chooses the kernels that sample from logits: native on the CPU, Triton on a GPU, or none.

Nothing here imports triton before there are rows that it may be for.
"""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache
from typing import TYPE_CHECKING

from torch import Tensor

from folospec.kernels import native_sampling
from folospec.kernels.native_sampling import NativeSampling

if TYPE_CHECKING:
    from folospec.kernels.gpu.sampling import DeviceSampling


def kernels_for(logits: Tensor) -> NativeSampling | DeviceSampling | None:
    """What takes the rows; None where only torch does."""
    native = native_sampling.load() if logits.device.type == "cpu" else None
    return native if native is not None and native.takes(logits) else on_device(logits)


def on_device(logits: Tensor) -> DeviceSampling | None:
    """Triton's kernels, if they take the rows."""
    if logits.device.type != "cuda" and os.environ.get("FOLOSPEC_KERNELS") != "triton":
        return None
    kernels = _triton()
    return kernels if kernels is not None and kernels.takes(logits) else None


@lru_cache(maxsize=1)
def _triton() -> DeviceSampling | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from folospec.kernels.gpu.sampling import DeviceSampling

    return DeviceSampling()
