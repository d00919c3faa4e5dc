"""Launches every Triton kernel, and says where they can run.

With TRITON_INTERPRET=1 in the environment Triton interprets its kernels, on any device and slowly:
that is how they are tested on a machine without a GPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

OLDEST_CAPABILITY = (8, 0)
"""Compute capability of the oldest cards that the kernels are built for: bfloat16 products."""

OLDEST_TRITON = (3, 6)
"""The oldest Triton that the kernels were compiled with."""


def _version(package: str) -> tuple[int, ...] | None:
    """The first two numbers of an installed package's version; None if it comes under another
    name, as nightly builds do."""
    try:
        parts = importlib.metadata.version(package).split(".")
        return int(parts[0]), int(parts[1])
    except (importlib.metadata.PackageNotFoundError, ValueError, IndexError):
        return None


def _dotted(numbers: Sequence[int]) -> str:
    return ".".join(map(str, numbers))


def is_interpreted() -> bool:
    """Whether kernels are interpreted, which works on the CPU too."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not() -> str | None:
    """Say why Triton kernels cannot run here; None if they can. Does not import triton."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if (version := _version("triton")) is not None and version < OLDEST_TRITON:
        return f"triton must be at least {_dotted(OLDEST_TRITON)}, got {_dotted(version)}"
    if is_interpreted():
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_CAPABILITY:
        wanted = _dotted(OLDEST_CAPABILITY)
        return f"compute capability must be at least {wanted}, got {_dotted(capability)}"
    return None


def runs_on(device: torch.device) -> bool:
    """Whether tensors on `device` can be given to the kernels."""
    return (device.type == "cuda" or is_interpreted()) and why_not() is None


def launch(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
    """Launch `kernel` on a grid of up to three dimensions; an empty grid launches nothing.

    Args:
        args: those of the kernel, tensors and numbers, in its order.
        options: its constexpr arguments by name, and num_warps, num_stages.
    """
    if all(size > 0 for size in grid):
        kernel[tuple(grid)](*args, enable_fp_fusion=True, **options)


@lru_cache(maxsize=8)
def num_processors(device: torch.device) -> int:
    """Multiprocessors of the card; a small number where kernels are interpreted."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
