"""The jobs of the check: what each is told, how it is guarded, and how it is run in a process.

    check ---- kernels:...    lossless:...    bits:...      side by side: nothing is timed
          `--- steps:...      throughput:...  memory:...    one after the other, alone on the card

A job has a process of its own. A kernel that reads where it must not breaks the process for good,
and with it whatever would have come after; and a job that hangs can be ended. Its rows come through
a pipe, one line of JSON each, when they are measured.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import ROOT

Row = dict[str, Any]

START_SECONDS = 60.0
"""What a process may take beyond its job's seconds, if the whole check has the time: imports, and
the unit that it is at."""
THREADS = "2"
"""Of torch on the host, for each of the jobs that run side by side."""
TAIL_CHARACTERS = 2000
COMPLETE = "complete"


class Budget:
    """The time of a job. It ends nothing: a job asks before every unit of its work."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self.was_short = False

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def allows(self, seconds: float = 0.0) -> bool:
        """Whether so many seconds are left; remembers having said no."""
        allowed = self.seconds_left > seconds
        self.was_short |= not allowed
        return allowed


@dataclass(frozen=True, slots=True)
class Job:
    """A part of a section. `entry` is "module.function"; it is called with a `Context` and
    `arguments`, and yields rows. `alone`: nothing else may run on the card."""

    section: str
    part: str
    seconds: float
    entry: str
    alone: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.section}:{self.part}"


@dataclass(frozen=True, slots=True)
class Context:
    """What a job is told. `folder` is scratch that the jobs share; `resume` counts the units that
    an earlier process of the same job has done."""

    device: str
    quick: bool
    folder: Path
    budget: Budget
    resume: int = 0

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")


def rows_of(job: Job, context: Context) -> Iterator[Row]:
    """Run a job here. What it raises becomes a row; the last row says how it ended."""
    known = {"section": job.section, "part": job.part}
    begin, failed, lost = time.monotonic(), False, False
    try:
        module, _, function = job.entry.rpartition(".")
        with importlib.import_module("gpu_check.engines").watched() as engines:
            for row in getattr(importlib.import_module(module), function)(context, **job.arguments):
                lost |= "resume" in row
                yield {**known, **row}
                yield from ({**known, **engine} for engine in _taken(engines))
            yield from ({**known, **engine} for engine in _taken(engines))
    except Exception as error:  # whatever it is, the other jobs go on
        failed = True
        yield {**known, **failure(error)}
    end = "short of time" if context.budget.was_short else COMPLETE
    end = "failed" if failed else "device lost" if lost else end
    yield {**known, "kind": "end", "end": end, "seconds": time.monotonic() - begin}


def _taken(rows: list[Row]) -> list[Row]:
    taken, rows[:] = rows[:], []
    return taken


def failure(error: BaseException) -> Row:
    """A row for what went wrong."""
    return {
        "kind": "failure",
        "passed": False,
        "error": f"{type(error).__name__}: {error}",
        "traceback": "".join(traceback.format_exception(error)),
    }


def is_lost(error: BaseException) -> bool:
    """Whether an error of the device makes it useless to this process from now on."""
    return "CUDA error" in str(error) or "Triton Error [CUDA]" in str(error)


def guarded(rows: Iterable[Row], **known: Any) -> Iterator[Row]:
    """The rows of one unit of a job. What it raises becomes a row with what is `known`, and the
    units after it go on, unless the device is lost."""
    try:
        yield from rows
    except Exception as error:
        if is_lost(error):
            raise
        yield {**known, **failure(error)}


def run_in_process(
    job: Job, context: Context, command: list[str], emit: Callable[[Row], None], last: float
) -> None:
    """Run a job by a command that ends with this job's arguments; give its rows to `emit`. At
    `last`, a time of the monotonic clock, it is ended whatever it is at.

    A job whose device is lost says so by a row with "resume", and is started again behind the unit
    that broke it, while there is time.
    """
    resume = 0
    while True:
        resumed = [*command, "--resume", str(resume)]
        rows, end = _run_once(job, resumed, context, emit, last)
        lost = next((row for row in reversed(rows) if "resume" in row), None)
        if end is not None:
            emit({"section": job.section, "part": job.part, **end})
        if lost is None or lost["resume"] <= resume or not context.budget.allows():
            return
        resume = lost["resume"]


def _run_once(
    job: Job, command: list[str], context: Context, emit: Callable[[Row], None], last: float
) -> tuple[list[Row], Row | None]:
    """One process: its rows, and a row of failure if it did not end by itself."""
    seconds = context.budget.seconds_left
    log = context.folder / f"{job.section}-{job.part}.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*command, "--job", job.name, "--seconds", f"{seconds:.1f}"],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env=dict(os.environ) if job.alone else {"OMP_NUM_THREADS": THREADS, **os.environ},
        )
        hung = threading.Event()

        def end() -> None:
            hung.set()
            process.kill()

        allowed = min(seconds + START_SECONDS, last - time.monotonic())
        watch = threading.Timer(max(allowed, 0.0), end)
        watch.start()
        rows = []
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.endswith("\n"):  # the last line of one that was ended may be cut
                    rows.append(json.loads(line))
                    emit(rows[-1])
            code = process.wait()
        finally:
            watch.cancel()
            process.kill()
    if code == 0:
        return rows, None
    why = "was ended, over its time" if hung.is_set() else f"ended with {code}"
    tail = log.read_text(errors="replace")[-TAIL_CHARACTERS:]
    return rows, {"kind": "failure", "passed": False, "error": f"the process {why}", "log": tail}


def write_as_child(job: Job, context: Context) -> None:
    """Run a job in this process and write its rows to stdout, which nobody else may write to."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    with lines:
        for row in rows_of(job, context):
            lines.write(json.dumps(row) + "\n")
            lines.flush()
