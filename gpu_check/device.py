"""The device that is checked: how it is timed, what it can do at most, and what it is.

On a GPU times are taken with events, and are those of the device; where there is none, with the
host's clock, so that the same code runs.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.lib.limits import Machine
from benchmarks.lib.provenance import installed_version

COPIED_BYTES = 1 << 30
"""Far more than the second-level cache holds."""
MATRIX_SIZE = 8192
WARM_UP_CALLS = 3
MEASURED_CALLS = 11
DTYPES = ("bfloat16", "float32")


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def median_seconds(call: Callable[[], Any], device: str, calls: int = MEASURED_CALLS) -> float:
    """Median time of a call, after some to warm up."""
    for _ in range(WARM_UP_CALLS):
        call()
    synchronize(device)
    clock = _device_seconds if device.startswith("cuda") else _host_seconds
    return statistics.median(clock(call, calls))


def _host_seconds(call: Callable[[], Any], calls: int) -> list[float]:
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return times


def _device_seconds(call: Callable[[], Any], calls: int) -> list[float]:
    """Every call between two events; all are queued before the first is waited for."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    events[-1].synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in zip(events, events[1:], strict=False)]


def copy_bandwidth(device: str, num_bytes: int = COPIED_BYTES) -> float:
    """Bytes per second of a copy within the device: those read and those written."""
    source = torch.randint(-128, 127, (num_bytes,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / median_seconds(lambda: target.copy_(source), device)


def matmul_rate(device: str, dtype: torch.dtype, size: int = MATRIX_SIZE) -> float:
    """Operations per second of torch's product of two square matrices of random numbers."""
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: left @ right, device)


def measure_machine(device: str, quick: bool) -> Machine:
    """The ceilings of the device. Bandwidth is that of copying, read and written bytes together."""
    num_bytes, size = (1 << 24, 256) if quick else (COPIED_BYTES, MATRIX_SIZE)
    # float32 products take far longer, and the ceiling is reached by smaller ones.
    sizes = {"bfloat16": size, "float32": size // 2}
    rates = {name: matmul_rate(device, getattr(torch, name), sizes[name]) for name in DTYPES}
    return Machine(copy_bandwidth(device, num_bytes), rates)


def ceilings(machine: Machine) -> dict[str, Any]:
    """What was measured, as a row."""
    rates = machine.operations_per_second
    return {
        "kind": "ceilings",
        "copy_gb_per_second": machine.bytes_per_second / 1e9,
        **{f"{name}_tflop_per_second": rates[name] / 1e12 for name in DTYPES},
    }


def facts(device: str) -> dict[str, Any]:
    """What a figure has to name besides the provenance of every benchmark."""
    found: dict[str, Any] = {"device": device, "triton": installed_version("triton")}
    found |= {"cuda": torch.version.cuda, "driver": None, "compute_capability": None}
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu_memory_bytes"] = properties.total_memory
        found["multiprocessors"] = properties.multi_processor_count
        found["compute_capability"] = f"{properties.major}.{properties.minor}"
        found["driver"] = _driver()
    for package in ("flash-attn", "xformers"):
        found[package] = installed_version(package)
    return found


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None
