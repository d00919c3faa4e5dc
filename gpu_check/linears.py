"""The linear of the deterministic mode beside torch's, each with the time that reading its weight
takes at least."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.lib.limits import Machine
from gpu_check.device import median_seconds
from gpu_check.jobs import Context, Row
from gpu_check.kernels import interpret

LINEARS = {"1.2b qkv": (3072, 2048), "1.2b down": (2048, 8192), "8b gate and up": (28672, 4096)}
LINEAR_ROWS = (1, 4, 16, 64, 256)
ROTATED_BYTES = 256 << 20
"""Weights that are used in turn, so that no call finds its own in the cache."""


def linears(context: Context, machine: Machine) -> Iterator[Row]:
    """The linear of the deterministic mode, whose sums have one order, beside torch's."""
    if not context.on_gpu:
        interpret()
    from folospec.kernels.gpu.linear import linear

    shapes = {"small": (40, 48)} if context.quick else LINEARS
    for name, (columns, size) in shapes.items():
        num_bytes = 2 * columns * size
        copies = 2 if context.quick else max(2, ROTATED_BYTES // num_bytes)
        weights = [
            torch.randn(columns, size, dtype=torch.bfloat16, device=context.device)
            for _ in range(copies)
        ]
        for rows in (1, 4) if context.quick else LINEAR_ROWS:
            if not context.budget.allows():
                return
            x = torch.randn(rows, size, dtype=torch.bfloat16, device=context.device)
            calls = 3 if context.quick else 2 * copies + 11
            own, torchs = (
                median_seconds(_in_turn(op, x, weights), context.device, calls)
                for op in (linear, torch.nn.functional.linear)
            )
            least = num_bytes / machine.bytes_per_second
            yield {
                "kind": "linear",
                "weight": name,
                "columns": columns,
                "inner": size,
                "rows": rows,
                "own_ms": 1e3 * own,
                "torch_ms": 1e3 * torchs,
                "own_over_torch": own / torchs,
                "limit_ms": 1e3 * least,
                "share_of_limit": least / own,
            }


def _in_turn(op: Any, x: torch.Tensor, weights: list[torch.Tensor]) -> Any:
    """A call of `op` that takes the next weight every time."""
    place = 0

    def call() -> None:
        nonlocal place
        place = (place + 1) % len(weights)
        op(x, weights[place])

    return call
