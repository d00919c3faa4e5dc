"""How much memory loading takes: a large random checkpoint, a fresh process, and a budget.

    python -m benchmarks.engine.memory  # JSON lines; exit status 1 on failure

A Llama checkpoint of at least a gigabyte is written to a temporary folder in bfloat16. A process of
its own then loads it in each dtype and generates a little, while a thread reads
/proc/self/status. Checked is that

- the peak of anonymous memory while loading stays below
  1.15 x the weights in the loaded dtype + the KV pool + an allowance for Python and its libraries;
- the KV tensors are as large as the pool asked for, and stay so while generating.

Anonymous memory is what a process has allocated. Peak RSS, shown beside it, also counts the pages
of the checkpoint that the kernel keeps mapped and may drop at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import ROOT

STATUS = Path("/proc/self/status")
WEIGHTS_FACTOR = 1.15
BLOCK_SIZE = 16
PROMPT_TOKENS, NEW_TOKENS, NUM_PROMPTS = 24, 8, 4


class MemorySampler:
    """A thread that follows the anonymous memory of this process; use as a context manager.

    `longest_gap` is the longest time between two readings, in seconds: a peak shorter than it may
    have been missed.
    """

    def __init__(self, interval: float = 0.002) -> None:
        self.interval, self.longest_gap = interval, 0.0
        self.peak = read_status("RssAnon")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> MemorySampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, read_status("RssAnon"))

    def _run(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self.interval):
            self.peak = max(self.peak, read_status("RssAnon"))
            now = time.monotonic()
            self.longest_gap, last = max(self.longest_gap, now - last), now


def read_status(name: str) -> int:
    """Bytes of a field of /proc/self/status, such as RssAnon, VmRSS or VmHWM (the peak of RSS)."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{STATUS} has no field {name!r}")


def measure(folder: str, dtype: str, num_blocks: int) -> dict[str, Any]:
    """Load the checkpoint and generate; meant for a process that has done nothing else."""
    at_start = read_status("RssAnon")
    with MemorySampler() as loading:
        from folospec import LLM, SamplingParams

        llm = LLM(
            folder,
            dtype=dtype,
            block_size=BLOCK_SIZE,
            num_blocks=num_blocks,
            skip_tokenizer_init=True,
        )
    peak_rss_loading = read_status("VmHWM")
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    kv_bytes = [llm.stats()["kv_cache_bytes"]]
    with MemorySampler() as generating:
        for index in range(NUM_PROMPTS):
            token_ids = list(range(1 + index, 1 + index + PROMPT_TOKENS))
            llm.engine.add_request({"prompt_token_ids": token_ids}, params)
        while llm.engine.has_unfinished_requests:
            llm.engine.step()
            kv_bytes.append(llm.stats()["kv_cache_bytes"])
    return {
        "anon_at_start": at_start,
        "peak_anon_loading": loading.peak,
        "peak_anon_generating": generating.peak,
        "peak_rss_loading": peak_rss_loading,
        "peak_rss": read_status("VmHWM"),
        "longest_sampling_gap_seconds": round(loading.longest_gap, 4),
        "kv_bytes": sorted(set(kv_bytes)),
        "num_output_tokens": llm.stats()["num_output_tokens"],
    }


def failures(row: dict[str, Any]) -> list[str]:
    """What a measured row breaks, in words; empty if all is well."""
    found = []
    if row["peak_anon_loading"] >= row["budget"]:
        found.append(
            f"peak anonymous memory while loading must be below {row['budget'] / 1e6:.0f} MB, got "
            f"{row['peak_anon_loading'] / 1e6:.0f} MB"
        )
    if row["kv_bytes"] != [row["pool_bytes"]]:
        found.append(
            f"the KV tensors must have {row['pool_bytes']} bytes throughout, got {row['kv_bytes']}"
        )
    if row["num_output_tokens"] != NUM_PROMPTS * NEW_TOKENS:
        found.append(
            f"{NUM_PROMPTS * NEW_TOKENS} tokens were to be generated, got "
            f"{row['num_output_tokens']}"
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit status: 0, or 1 if a check failed."""
    args = parse_arguments(argv)
    if args.measure:
        sys.stdout.write(json.dumps(measure(args.measure, args.dtypes[0], args.num_blocks)) + "\n")
        return 0
    import torch

    from benchmarks.lib.output import begin, opened
    from benchmarks.models.checkpoint import shape_of_at_least, write_checkpoint

    facts = begin(argv, __file__)
    shape = shape_of_at_least(int(args.gigabytes * 1e9), args.hidden_size)
    failed = False
    temporary = tempfile.TemporaryDirectory(prefix="folospec-memory-", dir=args.folder)
    with opened(args.out) as out, temporary as folder:
        checkpoint_bytes = write_checkpoint(Path(folder), shape)
        for name in args.dtypes:
            dtype = getattr(torch, name)
            weights = shape.num_parameters * dtype.itemsize
            pool = shape.kv_bytes(args.num_blocks * BLOCK_SIZE, dtype)
            row = {
                "benchmark": "memory",
                "dtype": name,
                "num_parameters": shape.num_parameters,
                "checkpoint_bytes": checkpoint_bytes,
                "weights_bytes": weights,
                "pool_bytes": pool,
                "budget": int(WEIGHTS_FACTOR * weights + pool + args.allowance_mb * 1e6),
                **measure_in_new_process(folder, name, args.num_blocks),
            }
            row["failures"] = failures(row)
            failed = failed or bool(row["failures"])
            out.write(json.dumps({**row, "provenance": facts}) + "\n")
            out.flush()
            sys.stderr.write(describe(row) + "\n")
    return int(failed)


def measure_in_new_process(folder: str, dtype: str, num_blocks: int) -> dict[str, Any]:
    """Return what `measure` returns there."""
    place = str(Path(folder).resolve())
    options = ["--measure", place, "--dtypes", dtype, "--num-blocks", str(num_blocks)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.engine.memory", *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    return json.loads(done.stdout)


def describe(row: dict[str, Any]) -> str:
    """A row in a few words."""
    megabytes = {
        key: f"{row[key] / 1e6:.0f} MB"
        for key in ("weights_bytes", "pool_bytes", "budget", "peak_anon_loading", "peak_rss")
    }
    return (
        f"{row['dtype']}: weights {megabytes['weights_bytes']}, pool {megabytes['pool_bytes']}, "
        f"peak anonymous {megabytes['peak_anon_loading']} of {megabytes['budget']} allowed, "
        f"peak RSS {megabytes['peak_rss']}: {'; '.join(row['failures']) or 'ok'}"
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Memory that loading a checkpoint takes.")
    parser.add_argument("--gigabytes", type=float, default=1.05, help="least size, bfloat16")
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--dtypes", type=lambda s: s.split(","), default=["bfloat16", "float32"])
    parser.add_argument("--num-blocks", type=int, default=512, help="KV blocks of 16 tokens")
    parser.add_argument("--allowance-mb", type=float, default=600.0, help="beside weights and pool")
    parser.add_argument("--folder", help="where to write the checkpoint; default: temporary files")
    parser.add_argument("--out", type=Path, help="write the JSON lines here instead of to stdout")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not STATUS.exists():
        parser.error(f"anonymous memory is read from {STATUS}, which this system does not have")
    unknown = set(args.dtypes) - {"bfloat16", "float32"}
    if unknown:
        parser.error(f"--dtypes must be of bfloat16, float32, got {sorted(unknown)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
