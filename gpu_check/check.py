"""Everything that needs a real GPU, in one run of under eight minutes.

    python -m gpu_check --out gpu.jsonl
    python -m gpu_check --only kernels lossless
    python -m gpu_check --device cpu --quick  # every part at its smallest

Runs from the root of the repository; folospec need not be installed. It makes its own models in a
temporary folder and needs no network. Sections:

    kernels      every Triton kernel against its oracle, over several seeds
    lossless     speculative tokens against plain ones, deterministic and not, graphs and not
    bits         one token's logits, bit for bit, whatever is computed beside it
    rules        the acceptance rules against the host's, and tokens against those of a CPU
    models       writes the grown model
    steps        step times by rows, batch, context, attention backend; the own linear
    throughput   plain, speculative, and transformers, on three models
    memory       what an engine takes beside what it may take

Rows go to --out as they come, one line of JSON each; tables to stderr at the end. The exit code is
0 only if nothing failed or broke, and every part of kernels, lossless, bits and rules, as far as
they were asked for, came to its end. A goal that is missed is in the last table, and is no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.lib.output import opened
from gpu_check import report
from gpu_check.jobs import Budget, Context, Job, Row, rows_of, run_in_process, write_as_child
from gpu_check.plan import SECTIONS, SHARED_SECONDS, planned

MINUTES = 7.75
GRACE_SECONDS = 10.0
"""Beyond the time of the whole check, for a job that is at its last unit; then it is ended."""
LEAST_SECONDS = 5.0
"""With less time left than this a job is not begun."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check, or one job of it; return the exit code."""
    begin = time.monotonic()
    args = parse_arguments(argv)
    if not args.device.startswith("cuda"):
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    if args.job is not None:
        job = next(job for job in planned(SECTIONS, args.quick) if job.name == args.job)
        budget = Budget(args.seconds)
        context = Context(args.device, args.quick, args.scratch, budget, args.resume)
        write_as_child(job, context)
        return 0
    script = str(Path(__file__).with_name("__main__.py"))
    rows = run(args, [script, *(sys.argv[1:] if argv is None else argv)], begin)
    show(rows)
    unproven = report.unproven(rows, args.only, planned(args.only, args.quick))
    if unproven:
        print(f"not complete: {', '.join(unproven)}", file=sys.stderr)
    return 1 if unproven or report.failed(rows) else 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m gpu_check", description="Check folospec on a GPU.")
    parser.add_argument("--out", type=Path, help="write the JSON lines here instead of to stdout")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--device", help='default: "cuda"; "cpu" interprets the kernels')
    parser.add_argument("--quick", action="store_true", help="every part at its smallest")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything")
    parser.add_argument("--parallel", type=int, help="jobs at a time where nothing is timed")
    parser.add_argument("--in-process", action="store_true", help="all in this process, in turn")
    parser.add_argument("--commit", help="what is checked, where there is no git to ask")
    parser.add_argument("--scratch", type=Path, help="folder for models and logs")
    for name, kind in (("--job", str), ("--seconds", float), ("--resume", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.resume = args.resume or 0
    if args.device is None:
        args.device = "cuda"
    if args.device.startswith("cuda") and args.job is None:
        import torch

        if not torch.cuda.is_available():
            parser.error("there is no CUDA device here: give --device cpu")
    if args.minutes <= 0 or (args.parallel is not None and args.parallel < 1):
        parser.error("--minutes must be above 0 and --parallel at least 1")
    if args.parallel is None:
        args.parallel = max(1, min(8, (os.cpu_count() or 2) // 2)) if args.device != "cpu" else 1
    return args


def run(args: argparse.Namespace, command: list[str], begin_at: float) -> list[Row]:
    """Run all jobs that were asked for; every row is written when it comes."""
    end = begin_at + 60 * args.minutes
    shared_end = min(end, time.monotonic() + SHARED_SECONDS)
    facts = provenance(args, command)
    with _scratch(args.scratch) as folder, _writer(args.out, facts) as (rows, emit):
        jobs = planned(args.only, args.quick)

        def begin(job: Job) -> None:
            left = (end if job.alone or args.in_process else shared_end) - time.monotonic()
            if left < LEAST_SECONDS:
                emit(not_run(job))
                return
            print(f"{job.name} ...", file=sys.stderr, flush=True)
            context = Context(args.device, args.quick, folder, Budget(min(job.seconds, left)))
            if args.in_process:
                for row in rows_of(job, context):
                    emit(row)
            else:
                last = end + GRACE_SECONDS
                run_in_process(job, context, child_command(args, folder), emit, last)

        with ThreadPoolExecutor(1 if args.in_process else args.parallel) as pool:
            list(pool.map(begin, [job for job in jobs if not job.alone]))
        for job in jobs:
            if job.alone:
                begin(job)
        return rows


def not_run(job: Job) -> Row:
    """The row of a job that there was no time for. It proves nothing."""
    row = {"section": job.section, "part": job.part, "kind": "end"}
    return {**row, "end": "not begun, out of time", "seconds": 0.0}


def child_command(args: argparse.Namespace, folder: Path) -> list[str]:
    """What runs a job in a process of its own, but for the job's name."""
    command = [sys.executable, "-m", "gpu_check", "--device", args.device]
    return [*command, "--scratch", str(folder.resolve()), *(["--quick"] if args.quick else [])]


def provenance(args: argparse.Namespace, command: list[str]) -> Row:
    """Where and of what the figures are."""
    from benchmarks.lib import output
    from gpu_check.device import facts

    found = output.begin(command[1:], command[0])
    if args.commit is not None:
        found["git_commit"] = args.commit
    return {**found, **facts(args.device)}


@contextmanager
def _scratch(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as made:
        yield Path(made)


@contextmanager
def _writer(path: Path | None, facts: Row) -> Iterator[tuple[list[Row], Callable[[Row], None]]]:
    """The rows so far, and what adds one: jobs run in several threads."""
    rows: list[Row] = []
    lock = threading.Lock()
    with opened(path) as out:

        def emit(row: Row) -> None:
            with lock:
                rows.append({"benchmark": "gpu_check", **row})
                _write(out, {**rows[-1], "provenance": facts})

        yield rows, emit


def _write(out: TextIO, row: Row) -> None:
    out.write(json.dumps(row) + "\n")
    out.flush()


def show(rows: Sequence[Row]) -> None:
    """Print the tables to stderr, the verdicts last."""
    from rich.table import Table

    from benchmarks.lib.output import show as show_table

    for sheet in report.sheets(rows):
        table = Table(*sheet.header, title=sheet.title)
        for line in sheet.lines:
            table.add_row(*(cell.replace("[", r"\[") for cell in line))
        show_table(table)
