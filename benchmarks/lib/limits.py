"""What a machine cannot beat: the bytes it can read and the operations it can do in a second.

A forward pass of n rows reads every weight once and the keys and values that the rows look at, and
does two operations per weight and row, besides those of attention:

    seconds >= max(bytes / read bandwidth, operations / peak)

Decoding one request is all bytes, a prompt is all operations. The limit of a run is that of its
prompts, run at once, plus that of every step after them, one token per request and step; for
speculation, which takes fewer steps, it is the limit of the same run without it.

Bandwidth and peak are the best of several tries: of reading an array much larger than the caches,
and of products of square matrices, which grow while a product is quick.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from folospec.kernels import native
from folospec.models.weight_memory import WeightMemory

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
ARRAY_BYTES = 512 << 20
MATRIX_SIZES = (256, 512, 1024, 2048)
QUICK_SECONDS = 0.02
"""A product that takes longer is large enough to show the peak."""
TRIES = 12


@dataclass(frozen=True, slots=True)
class Machine:
    """What was measured."""

    bytes_per_second: float
    operations_per_second: Mapping[str, float]
    """By type; a multiplication and an addition are two."""

    def seconds(self, num_bytes: float, operations: float, dtype: str) -> float:
        """Least time of a pass."""
        peak = self.operations_per_second[dtype]
        return max(num_bytes / self.bytes_per_second, operations / peak)


@dataclass(frozen=True, slots=True)
class Work:
    """What a Llama model of a config has to read and to do."""

    layer_weights: int
    """Entries of the matrices of all layers."""
    output_weights: int
    kv_entries: int
    """Entries of keys and values of one token, all layers."""
    attention_operations: int
    """Of one row looking at one token, all layers."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Work:
        hidden, depth = config["hidden_size"], config["num_hidden_layers"]
        queries = config["num_attention_heads"] * config["head_dim"]
        keys = config["num_key_value_heads"] * config["head_dim"]
        per_layer = hidden * (2 * queries + 2 * keys + 3 * config["intermediate_size"])
        return cls(
            layer_weights=depth * per_layer,
            output_weights=hidden * config["vocab_size"],
            kv_entries=2 * depth * keys,
            attention_operations=4 * depth * queries,
        )

    @classmethod
    def of_checkpoint(cls, folder: Path) -> Work:
        return cls.of(json.loads((folder / "config.json").read_text()))

    def step(self, contexts: Sequence[int], dtype: str) -> tuple[int, int]:
        """Bytes and operations of a step of one row per request.

        Args:
            contexts: tokens that each row looks at, itself included.
        """
        weights = self.layer_weights + self.output_weights
        read = ITEM_BYTES[dtype] * (weights + self.kv_entries * sum(contexts))
        return read, 2 * weights * len(contexts) + self.attention_operations * sum(contexts)

    def prompts(self, lengths: Sequence[int], dtype: str) -> tuple[int, int]:
        """Bytes and operations of prompts run at once; only their last rows have logits."""
        looked_at = sum(length * (length + 1) // 2 for length in lengths)
        read = ITEM_BYTES[dtype] * (self.layer_weights + self.output_weights)
        done = 2 * self.layer_weights * sum(lengths) + 2 * self.output_weights * len(lengths)
        return read, done + self.attention_operations * looked_at


def run_seconds(
    work: Work, machine: Machine, lengths: Sequence[int], max_tokens: int, batch: int, dtype: str
) -> float:
    """Least time of completing prompts, `batch` at a time, with `max_tokens` tokens each."""
    seconds = 0.0
    for first in range(0, len(lengths), batch):
        own = lengths[first : first + batch]
        seconds += machine.seconds(*work.prompts(own, dtype), dtype)
        for step in range(1, max_tokens):
            contexts = [length + step for length in own]
            seconds += machine.seconds(*work.step(contexts, dtype), dtype)
    return seconds


def measure(threads: int) -> Machine:
    """Measure this machine with so many threads; takes a few seconds. Where bfloat16 has no fast
    product, it can be widened and multiplied in float32: its peak is no lower."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        peaks = {dtype: peak(getattr(torch, dtype)) for dtype in ITEM_BYTES}
        peaks["bfloat16"] = max(peaks["bfloat16"], peaks["float32"])
        return Machine(read_bandwidth(), peaks)
    finally:
        torch.set_num_threads(before)


def median_of(machines: Sequence[Machine]) -> Machine:
    """What was measured in the middle: a shared machine is now faster and now slower."""
    return Machine(
        statistics.median(m.bytes_per_second for m in machines),
        {
            dtype: statistics.median(m.operations_per_second[dtype] for m in machines)
            for dtype in ITEM_BYTES
        },
    )


def read_bandwidth() -> float:
    """Bytes per second of reading a large array that lies as weights do: by the native kernels'
    probe, which asks for memory ahead as their products do, or where it does not run by torch's
    sum."""
    array = WeightMemory(torch.device("cpu")).take((ARRAY_BYTES // 4,), torch.float32).fill_(1.0)
    library, read = native.load(), array.sum
    if library is not None:
        where, count, threads = array.data_ptr(), array.numel(), torch.get_num_threads()
        read = partial(library.read, where, count, threads)
    return array.nbytes / _best(read)


def peak(dtype: torch.dtype) -> float:
    """Operations per second of torch's product of two square matrices, of the best size."""
    best = 0.0
    for size in MATRIX_SIZES:
        left, right = (_random_matrix(size, dtype) for _ in range(2))
        seconds = _best(lambda left=left, right=right: left @ right)
        best = max(best, 2 * size**3 / seconds)
        if seconds > QUICK_SECONDS:
            break
    return best


def _random_matrix(size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, size).to(dtype)


def _best(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of several calls."""
    times = []
    for _ in range(TRIES):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


if __name__ == "__main__":
    found = measure(torch.get_num_threads())
    print(f"read bandwidth {found.bytes_per_second / 1e9:.1f} GB/s")
    for name, operations in found.operations_per_second.items():
        print(f"{name} peak {operations / 1e9:.0f} GFLOP/s")
