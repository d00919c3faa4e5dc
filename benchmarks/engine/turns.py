"""What it costs that torch and the native kernels take turns on the same threads.

    python -m benchmarks.engine.turns  # JSON lines to stdout

With one OpenMP runtime for both, turns cost what both cost alone: a ratio of about 1. Threads of a
second runtime would go on spinning after each call, and the ratio would be far above it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.lib.output import begin, write_rows
from folospec.kernels import native

ROUNDS = 30


def measure() -> dict[str, float]:
    """Median seconds of a product by torch, of one by the kernels, and of one of each in turn."""
    library = native.load()
    if library is None:
        raise SystemExit(f"the native kernels do not run: {native.why_not()}")
    x, weight = torch.randn(8, 1024), torch.randn(2048, 1024)
    described, left, right = native.matrix(weight), torch.randn(256, 1024), torch.randn(1024, 256)

    def of_torch() -> None:
        torch.mm(left, right)

    def of_kernels() -> None:
        library.apply_linear(x, described)

    medians = {}
    for name, calls in (
        ("torch", [of_torch]),
        ("native", [of_kernels]),
        ("turns", [of_torch, of_kernels]),
    ):
        times = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            for call in calls:
                call()
            times.append(time.perf_counter() - start)
        medians[name] = statistics.median(times)
    return {**medians, "ratio": medians["turns"] / (medians["torch"] + medians["native"])}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a file instead of stdout")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    source = begin(argv, __file__)
    write_rows(({**measure(), "provenance": source} for _ in range(args.tries)), args.out)


if __name__ == "__main__":
    main()
