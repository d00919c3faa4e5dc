"""What plain decoding keeps of its speed where other programs use the same cores.

    python -m benchmarks.engine.shared_cores --model build/models/smollm2/bf16 --dtype bfloat16

Runs alternate: one on the machine as it is, one next to a loop on each core that never waits. Two
programs that share a core fairly have half of it each, so a share of 0.5 is what one can expect; a
program whose threads wait for each other while somebody else has their core gets much less.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.lib.output import begin, show, write_rows
from folospec import LLM, SamplingParams

PROMPT = list(range(100, 132))
SETTLING_SECONDS = 0.5
"""Until the loops run."""


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that compute while the context lasts."""
    loops = [start_loop() for _ in range(count)]
    try:
        time.sleep(SETTLING_SECONDS)
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def start_loop() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "while True: pass"])


def tokens_per_second(llm: LLM, max_tokens: int) -> float:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    start = time.perf_counter()
    llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
    return max_tokens / (time.perf_counter() - start)


def measure(llm: LLM, rounds: int, max_tokens: int, loops: int) -> dict[str, Any]:
    """Medians of alternated runs, and the median of the rounds' shares."""
    tokens_per_second(llm, max_tokens)
    quiet, shared = [], []
    for _ in range(rounds):
        quiet.append(tokens_per_second(llm, max_tokens))
        with busy(loops):
            shared.append(tokens_per_second(llm, max_tokens))
    return {
        "quiet": statistics.median(quiet),
        "shared": statistics.median(shared),
        "share": statistics.median(s / q for s, q in zip(shared, quiet, strict=True)),
        "native_kernels": llm.stats()["native_kernels"],
    }


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="folospec-demo")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--loops", type=int, default=os.cpu_count(), help="default: one per core")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--out", type=Path, help="a file instead of stdout")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    source = begin(argv, __file__)
    llm = LLM(args.model, dtype=args.dtype, enable_prefix_caching=False)
    row = measure(llm, args.rounds, args.max_tokens, args.loops)
    facts = {"model": args.model, "dtype": llm.stats()["dtype"], "loops": args.loops}
    rows = write_rows(
        [{"benchmark": "shared_cores", **facts, **row, "provenance": source}], args.out
    )
    table = Table("model", "kernels", "quiet, tokens/s", "shared, tokens/s", "share")
    for row in rows:
        table.add_row(
            *(row["model"], row["native_kernels"]),
            *(f"{row[name]:.1f}" for name in ("quiet", "shared")),
            f"{row['share']:.2f}",
        )
    show(table)
    return rows


if __name__ == "__main__":
    main()
