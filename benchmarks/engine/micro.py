"""Each native kernel against its torch form and against what the machine allows.

    python -m benchmarks.engine.micro  # JSON lines to stdout, a table to stderr
    python -m benchmarks.engine.micro --ops linear --models 160m --formats bfloat16

The limit of a call is the larger of two times: the bytes it must read over the read bandwidth, and
its operations over the peak, both measured (`limits`; bandwidth also by the own reader of the
kernels, whichever is more). Weights and KV are so many copies in turn that none is in a cache
when it is read, as it is in a model whose layers come one after the other.

A linear is all four products of one layer, or of one large matrix (the op "matrix"); an attention
is one layer of a step whose metadata are planned. The two contestants take turns; figures are
medians.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.lib import limits
from benchmarks.lib.limits import Machine
from benchmarks.lib.output import begin, show, write_rows
from benchmarks.models.grown import SHAPES
from benchmarks.models.growth import Shape
from folospec.attention.base import AttentionBackend, LayerKV, get_backend
from folospec.attention.metadata import AttentionMetadata, SequenceRows
from folospec.kernels import torch_ops
from folospec.kernels.native import Native, load, matrix, why_not
from folospec.models.weight_memory import WeightMemory

OPS = ("linear", "matrix", "attention", "rowwise")
FORMATS = ("float32", "bfloat16", "int8")
ROWS = (1, 2, 4, 6, 8, 16, 32, 64, 512)
HEAD_SIZE, BLOCK_SIZE = 64, 16
BEYOND_CACHE = 1 << 28
"""Bytes that no cache of a small machine holds."""

Call = Callable[[], object]


def median_times(calls: dict[str, Call], seconds: float) -> dict[str, float]:
    """Seconds per call of each, in turns, for about that long and at least five times."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def measure_machine(native: Native) -> Machine:
    """What reads and products can reach on the threads that torch has now."""
    threads = torch.get_num_threads()
    machine = limits.measure(threads)
    size = limits.ARRAY_BYTES // 4
    numbers = WeightMemory(torch.device("cpu")).take((size,), torch.float32).fill_(1.0)
    read = {"read": lambda: native.read(numbers.data_ptr(), size, threads)}
    own = limits.ARRAY_BYTES / median_times(read, 0)["read"]
    return replace(machine, bytes_per_second=max(machine.bytes_per_second, own))


def copies_of(make: Callable[[], Any], num_bytes: int) -> Iterator[Any]:
    """Endless copies, in turn, of something of that many bytes."""
    return itertools.cycle([make() for _ in range(max(1, -(-BEYOND_CACHE // num_bytes)))])


Sizes = Sequence[tuple[int, int]]
"""Outputs and inputs of matrices."""
MATRIX, MATRIX_NAME = (8192, 2048), "8192 x 2048"


def layer_sizes(shape: Shape) -> Sizes:
    """The four matrices of a layer."""
    width = (shape.heads + 2 * shape.kv_heads) * HEAD_SIZE
    return [
        (width, shape.hidden),
        (shape.hidden, shape.heads * HEAD_SIZE),
        (2 * shape.inner, shape.hidden),
        (shape.hidden, shape.inner),
    ]


def random_weights(sizes: Sizes, kind: str) -> list[torch_ops.Int8Weight | Tensor]:
    made = [torch.randn(size) * size[1] ** -0.5 for size in sizes]
    if kind == "int8":
        return [torch_ops.quantize_int8(weight) for weight in made]
    memory, dtype = WeightMemory(torch.device("cpu")), getattr(torch, kind)
    return [memory.take(weight.shape, dtype).copy_(weight) for weight in made]


def linear_rows(
    native: Native, machine: Machine, name: str, sizes: Sizes, kind: str, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The products of these matrices, for each number of rows."""
    weights = random_weights(sizes, kind)
    cells = sum((w.values if isinstance(w, torch_ops.Int8Weight) else w).numel() for w in weights)
    num_bytes = cells * {"float32": 4, "bfloat16": 2, "int8": 1}[kind]
    layers = copies_of(lambda: random_weights(sizes, kind), num_bytes)
    described = copies_of(lambda: [(w, matrix(w)) for w in next(layers)], num_bytes)
    inputs = [w.shape[1] if isinstance(w, Tensor) else w.values.shape[1] for w in weights]
    of_torch = torch.bfloat16 if kind == "bfloat16" else torch.float32
    for count in args.rows:
        x = [torch.randn(count, size) for size in inputs]
        narrow = [each.to(of_torch) for each in x]

        def with_torch(x: list[Tensor] = narrow) -> None:
            for each, (weight, _) in zip(x, next(described), strict=True):
                torch_ops.linear(each, weight)

        def natively(x: list[Tensor] = x) -> None:
            for each, (_, m) in zip(x, next(described), strict=True):
                native.apply_linear(each, m)

        times = median_times({"torch": with_torch, "native": natively}, args.seconds)
        peak = "bfloat16" if kind == "bfloat16" else "float32"
        limit = machine.seconds(num_bytes, 2 * cells * count, peak)
        yield row("linear", f"{name}, {count} rows", kind, times, limit)


STEPS = {
    **{
        f"decode {batch} at {context}": (batch, 1, context)
        for batch in (1, 8, 32)
        for context in (512, 2048)
    },
    **{f"8 nodes at {context}": (1, 8, context) for context in (512, 2048)},
    "prefill 512": (1, 512, 0),
}
"""Sequences, rows of each, and tokens before them."""


def step_of(name: str) -> tuple[AttentionMetadata, int]:
    """A step's metadata, and how many keys its rows read, each counted once per sequence."""
    batch, count, context = STEPS[name]
    per_sequence = -(-(context + count) // BLOCK_SIZE)
    blocks = torch.randperm(batch * per_sequence).tolist()
    sequences = []
    for number in range(batch):
        table = blocks[number * per_sequence :][:per_sequence]
        indices = range(context, context + count)
        is_tree = name.startswith("8 nodes")
        # A root with children that are leaves, but for the first: ancestors differ row by row.
        mask = torch.eye(count, dtype=torch.bool) if is_tree else None
        if mask is not None:
            mask[:, 0] = mask[2:, 1] = True
        sequences.append(
            SequenceRows(
                positions=[context + int(mask[i].sum()) - 1 for i in range(count)]
                if mask is not None
                else list(indices),
                slots=[table[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in indices],
                context_len=context,
                block_table=table,
                suffix_mask=mask,
            )
        )
    return AttentionMetadata.from_rows(sequences, BLOCK_SIZE), batch * (context + count)


def attention_rows(
    machine: Machine, model: str, kind: str, seconds: float
) -> Iterator[dict[str, Any]]:
    """One layer's attention in each kind of step."""
    shape, dtype = SHAPES[model], getattr(torch, kind)
    backends = {name: get_backend(name) for name in ("torch", "native")}
    for name, (batch, count, context) in STEPS.items():
        metadata, num_keys = step_of(name)
        num_slots = (int(metadata.block_table.max()) + 1) * BLOCK_SIZE
        kv_shape = (num_slots, shape.kv_heads, HEAD_SIZE)
        num_bytes = 2 * num_keys * shape.kv_heads * HEAD_SIZE * dtype.itemsize
        layers = copies_of(
            lambda kv_shape=kv_shape: LayerKV(*torch.randn(2, *kv_shape).to(dtype)), num_bytes
        )
        rows = metadata.num_tokens
        query = torch.randn(rows, shape.heads, HEAD_SIZE).to(dtype)
        key, value = torch.randn(2, rows, shape.kv_heads, HEAD_SIZE).to(dtype)

        def attend(
            backend: AttentionBackend,
            metadata: AttentionMetadata = metadata,
            layers: Iterator[LayerKV] = layers,
            inputs: tuple[Tensor, ...] = (query, key, value),
        ) -> None:
            backend.forward(*inputs, next(layers), metadata, scale=HEAD_SIZE**-0.5)

        calls = {label: lambda b=backend: attend(b) for label, backend in backends.items()}
        times = median_times(calls, seconds)
        pairs = batch * (count * context + count * (count + 1) / 2)
        operations = 4 * pairs * shape.heads * HEAD_SIZE
        yield row(
            *("attention", f"{model}, {name}", kind, times),
            machine.seconds(num_bytes, operations, kind),
        )


def rowwise_rows(
    native: Native, machine: Machine, model: str, seconds: float
) -> Iterator[dict[str, Any]]:
    """Norm, rotation and gate of 8 rows, on one thread."""
    shape, count = SHAPES[model], 8
    x, weight = torch.randn(count, shape.hidden), torch.randn(shape.hidden)
    heads = torch.randn(count, shape.heads + shape.kv_heads, HEAD_SIZE)
    cos, sin = torch.randn(2, count, HEAD_SIZE // 2)
    both = torch.randn(count, 2 * shape.inner)
    normed, gated = torch.empty_like(x), torch.empty(count, shape.inner)
    silu = torch.nn.functional.silu
    pairs: dict[str, tuple[int, Call, Call]] = {
        "rms_norm": (
            x.numel(),
            lambda: torch_ops.rms_norm(x, weight, 1e-6),
            lambda: native.rms_norm(
                x.data_ptr(), weight.data_ptr(), *x.shape, 1e-6, normed.data_ptr()
            ),
        ),
        "rotate": (
            heads.numel(),
            lambda: torch_ops.rotary(heads, cos[:, None], sin[:, None]),
            lambda: native.rotate(heads.data_ptr(), cos.data_ptr(), sin.data_ptr(), *heads.shape),
        ),
        "silu_mul": (
            both.numel(),
            lambda: silu(both[:, : shape.inner]) * both[:, shape.inner :],
            lambda: native.silu_mul(both.data_ptr(), count, shape.inner, gated.data_ptr()),
        ),
    }
    for name, (cells, with_torch, natively) in pairs.items():
        times = median_times({"torch": with_torch, "native": natively}, seconds)
        limit = machine.seconds(4 * cells, 0, "float32")
        yield row(name, f"{model}, {count} rows", "float32", times, limit)


def row(op: str, case: str, kind: str, times: dict[str, float], limit: float) -> dict[str, Any]:
    """A measured case, as it is written down; times in milliseconds."""
    return {
        "benchmark": "micro",
        "op": op,
        "case": case,
        "format": kind,
        "torch_ms": round(times["torch"] * 1e3, 4),
        "native_ms": round(times["native"] * 1e3, 4),
        "limit_ms": round(limit * 1e3, 4),
        "speedup": round(times["torch"] / times["native"], 3),
        "of_limit": round(limit / times["native"], 3),
    }


def cases(native: Native, machine: Machine, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if "matrix" in args.ops:
        for kind in args.formats:
            yield from linear_rows(native, machine, MATRIX_NAME, [MATRIX], kind, args)
    for model in args.models:
        if "linear" in args.ops:
            for kind in args.formats:
                sizes = layer_sizes(SHAPES[model])
                yield from linear_rows(native, machine, model, sizes, kind, args)
        if "attention" in args.ops:
            for kind in sorted({"float32", "bfloat16"} & set(args.formats)):
                yield from attention_rows(machine, model, kind, args.seconds)
        if "rowwise" in args.ops:
            yield from rowwise_rows(native, machine, model, args.seconds)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    facts = begin(argv, __file__)
    native = load()
    if native is None:
        sys.exit(f"there are no native kernels to measure: {why_not()}")
    torch.manual_seed(0)
    with torch.inference_mode():
        machine = measure_machine(native)
        facts["bandwidth_gb_per_s"] = round(machine.bytes_per_second / 1e9, 2)
        facts["peak_gflop_per_s"] = {
            k: round(v / 1e9, 1) for k, v in machine.operations_per_second.items()
        }
        known = {"benchmark": "micro", "provenance": facts}
        measured = ({**each, **known} for each in cases(native, machine, args))
        show(table(write_rows(measured, args.out), facts))


def table(rows: list[dict[str, Any]], facts: dict[str, Any]) -> Table:
    """The rows without their provenance."""
    peaks = ", ".join(f"{k} {v} GFLOP/s" for k, v in facts["peak_gflop_per_s"].items())
    shown = Table(title=f"read {facts['bandwidth_gb_per_s']} GB/s; {peaks}")
    names = ("op", "case", "format", "torch_ms", "native_ms", "limit_ms", "speedup", "of_limit")
    for name in names:
        shown.add_column(name, justify="right" if name not in names[:3] else "left")
    for each in rows:
        shown.add_row(*(str(each[name]) for name in names))
    return shown


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    def one_of(known: Sequence[str]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            chosen = text.split(",")
            if unknown := sorted(set(chosen) - set(known)):
                raise argparse.ArgumentTypeError(f"must be of {', '.join(known)}, got {unknown}")
            return chosen

        return parse

    parser = argparse.ArgumentParser(description="Native kernels against torch and the machine.")
    parser.add_argument("--ops", type=one_of(OPS), default=list(OPS))
    parser.add_argument("--models", type=one_of(tuple(SHAPES)), default=list(SHAPES))
    parser.add_argument("--formats", type=one_of(FORMATS), default=list(FORMATS))
    parser.add_argument("--rows", type=lambda s: [int(n) for n in s.split(",")], default=list(ROWS))
    parser.add_argument("--seconds", type=float, default=1.0, help="per case, both contestants")
    parser.add_argument("--out", type=Path, help="write the JSON lines here instead of to stdout")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
