"""Runs the test suite under one machine-dependent setting after another and prints a table.

    python tests/matrix.py                         # every row that this processor can run
    python tests/matrix.py --only "openblas" "load" --tests tests/kernels tests/attention
    python tests/matrix.py --python .venv-3.13/bin/python
    python tests/matrix.py --together --only "openblas Haswell" "aten default" "under load"

No outcome of a test may depend on numpy's BLAS, torch's vector code, the instruction set of the
native kernels, the number of threads, the load, or the Python version. A row is one such setting.
Rows that the processor cannot run are skipped by its flags before they start and stay in the table.
A row fails if a test fails, and if it ran nothing. Rows are appended to build/matrix.jsonl.
`--together` is for little time: one row under all the chosen settings at once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "matrix.jsonl"
AVX2, AVX512 = ("avx2", "fma"), ("avx512f", "avx512bw", "avx512vl", "avx512dq")
V2, V3, V4 = ("ssse3", "sse4_1", "sse4_2", "popcnt"), (*AVX2, "bmi2", "f16c"), AVX512
PATIENT = {"OMP_WAIT_POLICY": "passive"}
"""More threads than cores that spin wait for each other for most of their time."""
COMPILERS = re.compile(r"(.*-)?(c\+\+|cc|g\+\+|gcc|clang|clang\+\+|icpx|icx)(-[\d.]+)?")
COUNTS = re.compile(r"(\d+) (passed|failed|skipped|error)")


@dataclass(frozen=True)
class Row:
    """One setting: environment variables, and the processor's flags that it needs."""

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    has_compiler: bool = True
    is_loaded: bool = False
    """A busy loop runs on each core beside the tests."""

    def missing(self, present: set[str]) -> list[str]:
        return [flag for flag in self.flags if flag not in present]


ROWS = (
    Row("as it is"),
    Row("openblas Prescott", {"OPENBLAS_CORETYPE": "Prescott"}),
    Row("openblas Haswell", {"OPENBLAS_CORETYPE": "Haswell"}, AVX2),
    Row("openblas Zen", {"OPENBLAS_CORETYPE": "Zen"}, AVX2),
    Row("openblas SkylakeX", {"OPENBLAS_CORETYPE": "SkylakeX"}, AVX512),
    Row("aten default", {"ATEN_CPU_CAPABILITY": "default"}),
    Row("aten avx2", {"ATEN_CPU_CAPABILITY": "avx2"}, AVX2),
    Row("aten avx512", {"ATEN_CPU_CAPABILITY": "avx512"}, AVX512),
    Row("onednn SSE41", {"ONEDNN_MAX_CPU_ISA": "SSE41"}),
    Row("onednn AVX2", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, AVX2),
    Row("kernels x86-64-v2", {"FOLOSPEC_KERNELS_TARGET": "x86-64-v2"}, V2),
    Row("kernels x86-64-v3", {"FOLOSPEC_KERNELS_TARGET": "x86-64-v3"}, V3),
    Row("kernels x86-64-v4", {"FOLOSPEC_KERNELS_TARGET": "x86-64-v4"}, V4),
    Row("no compiler", has_compiler=False),
    Row("1 thread", {"FOLOSPEC_TEST_THREADS": "1"}),
    Row("2 threads", {"FOLOSPEC_TEST_THREADS": "2", **PATIENT}),
    Row("4 threads", {"FOLOSPEC_TEST_THREADS": "4", **PATIENT}),
    Row("under load", is_loaded=True),
)


def processor_flags() -> set[str]:
    """What the system says that the processor can do; empty where it does not say."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def together(rows: Sequence[Row]) -> Row:
    """One row under the settings of all.

    Raises:
        ValueError: two of them set one variable.
    """
    environment: dict[str, str] = {}
    for row in rows:
        if twice := environment.keys() & row.environment.keys():
            raise ValueError(f"rows that run together must differ in what they set, got {twice}")
        environment |= row.environment
    return Row(
        " + ".join(row.name for row in rows),
        environment,
        tuple(dict.fromkeys(flag for row in rows for flag in row.flags)),
        has_compiler=all(row.has_compiler for row in rows),
        is_loaded=any(row.is_loaded for row in rows),
    )


@contextmanager
def busy_cores() -> Iterator[None]:
    """Keep every core busy."""
    command = [sys.executable, "-c", "while True: pass"]
    loops = [subprocess.Popen(command) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


@contextmanager
def without_compilers() -> Iterator[dict[str, str]]:
    """An environment whose path has every program but compilers, and no kernels built before."""
    with tempfile.TemporaryDirectory() as folder:
        programs, cache = Path(folder) / "bin", Path(folder) / "cache"
        programs.mkdir()
        for directory in os.get_exec_path():
            for program in Path(directory).glob("*"):
                link = programs / program.name
                if not COMPILERS.fullmatch(program.name) and not link.exists():
                    link.symlink_to(program.absolute())
        yield {"PATH": str(programs), "CXX": "", "FOLOSPEC_CACHE_DIR": str(cache)}


def run(row: Row, python: str, tests: Sequence[str], workers: int) -> dict[str, object]:
    """Run the suite under a row's setting; return what came of it."""
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
    environment |= row.environment
    begin = time.monotonic()
    with ExitStack() as stack:
        if row.is_loaded:
            stack.enter_context(busy_cores())
        if not row.has_compiler:
            environment |= stack.enter_context(without_compilers())
        command = [python, "-m", "pytest", "-q", "-n", str(workers), "--dist", "worksteal"]
        done = subprocess.run(
            [*command, *tests], cwd=ROOT, env=environment, capture_output=True, text=True
        )
    counts = dict.fromkeys(("passed", "failed", "skipped", "error"), 0)
    lines = done.stdout.strip().splitlines() or [""]
    counts |= {kind: int(count) for count, kind in COUNTS.findall(lines[-1])}
    is_green = done.returncode == 0 and counts["passed"] > 0
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {
        "outcome": "passed" if is_green else "failed",
        **counts,
        "seconds": round(time.monotonic() - begin),
        "failures": failures if failures or is_green else lines[-10:] + [done.stderr[-2000:]],
    }


def table(rows: Sequence[dict[str, object]]) -> str:
    """The outcomes in Markdown."""
    columns = ("row", "python", "outcome", "passed", "failed", "error", "skipped", "seconds")
    lines = [columns, ["---"] * len(columns)]
    lines += [[str(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose names begin like this")
    parser.add_argument("--tests", nargs="+", default=["tests"], help="what pytest runs")
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--together", action="store_true", help="one row of all that are chosen")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    names = [row.name for row in ROWS]
    for only in args.only:
        if not any(name.startswith(only) for name in names):
            parser.error(f"--only must begin one of {', '.join(names)}; got {only!r}")
    for python in args.python:
        if shutil.which(python) is None:
            parser.error(f"--python must be an interpreter, got {python!r}")
    rows = [row for row in ROWS if row.name.startswith(tuple(args.only))]
    if args.together:
        try:
            rows = [together(rows)]
        except ValueError as error:
            parser.error(str(error))
    present, found = processor_flags(), []
    for python in args.python:
        version = subprocess.check_output([python, "-V"], text=True).split()[-1]
        for row in rows:
            outcome: dict[str, object] = {"row": row.name, "python": version}
            if missing := row.missing(present):
                outcome |= {"outcome": f"skipped: no {', '.join(missing)}"}
            else:
                outcome |= run(row, python, args.tests, args.workers)
            found.append(outcome)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a") as file:
                file.write(json.dumps(outcome) + "\n")
            print(table(found[-1:]).splitlines()[-1], flush=True)
            for line in outcome.get("failures", []):  # type: ignore[union-attr]
                print("   ", line, flush=True)
    print(table(found))
    return int(any(row["outcome"] == "failed" for row in found))


if __name__ == "__main__":
    sys.exit(main())
