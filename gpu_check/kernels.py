"""Every kernel against its oracle: the cases of tests/kernels, on the device, over several seeds.

Outputs are poisoned and stand between canaries; that is in the cases (`tests/kernels/gpu_case.py`).
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import ROOT
from gpu_check.jobs import Context, Row, failure, is_lost

CASES = ROOT / "tests" / "kernels"


def check(context: Context, folder: str, module: str, seeds: int) -> Iterator[Row]:
    """Run the cases of a module, those of the first seed first; a row for each.

    The first case that there was no time for is named in a row, and the job is not complete. After
    an error that costs the process its device, the row has "resume": the number of cases that
    a new process can leave out.
    """
    if not context.on_gpu:
        interpret()
    for name in (folder, str(CASES)):
        if name not in sys.path:
            sys.path.insert(0, name)
    cases, device = importlib.import_module(module).cases, torch.device(context.device)
    done = 0
    for seed in range(seeds):
        for case in cases(device, seed):
            done += 1
            if done <= context.resume:
                continue
            if not context.budget.allows():
                yield {"kind": "not begun", "case": case.name, "seed": seed}
                return
            row = {"kind": "kernel", "case": case.name, "seed": seed, **_run(case)}
            if row.pop("lost", False):
                yield {**row, "resume": done}
                return
            yield row


def _run(case: Any) -> Row:
    """A case's row: whether it passed, and its relative error, or why not."""
    begin = time.perf_counter()
    try:
        error = case.check()
    except Exception as problem:  # an AssertionError, or whatever the compiler or the device says
        found = {**failure(problem), "kind": "kernel", "lost": is_lost(problem)}
    else:
        found = {"passed": True, "error_norm": error}
    return {**found, "tolerance": case.tolerance, "seconds": time.perf_counter() - begin}


def interpret() -> None:
    """Have Triton interpret the kernels, before any of them is defined."""
    os.environ["TRITON_INTERPRET"] = "1"
    tests = str(ROOT / "tests")
    if tests not in sys.path:
        sys.path.insert(0, tests)
    importlib.import_module("triton_interpreter").mend()
