"""Runs tests with the native kernels built with the address and undefined-behaviour sanitizers:

    python tests/sanitizers.py [pytest arguments]

Without arguments it runs `PATHS`. The first fault ends the process, with a report of where it is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from folospec.kernels import build

TESTS = Path(__file__).parent
PATHS = (
    "kernels/test_checked.py",
    "kernels/test_linear_int8.py",
    "kernels/test_native_*.py",
    "attention/test_native_cpu.py",
    "models/test_native_decoder.py",
    "engine/test_native_lossless.py",
    "engine/test_hostile_*.py",
    "engine/test_request_fuzz.py",
)
"""Under `tests`; every test that is about the native kernels."""
FLAGS = "-g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
COMPILER = TESTS.parent / "build" / "test_kernels" / "compiler"
"""Runs the compiler without the runtimes, on which it is ten times slower."""
RUNTIMES = ("libasan.so", "libubsan.so")


def why_not() -> str | None:
    """Say why the kernels cannot run with sanitizers here; None if they can."""
    try:
        _runtimes()
    except (build.BuildError, OSError) as error:
        return str(error)
    return None


def environment(effort: str = "-O1") -> dict[str, str]:
    """What a process needs to build and to run such kernels.

    Args:
        effort: -O0 is built in half of the time, and runs longer.

    Raises:
        build.BuildError: the compiler brings no runtimes.
    """
    runtimes = " ".join(_runtimes())
    COMPILER.parent.mkdir(parents=True, exist_ok=True)
    COMPILER.write_text(f'#!/bin/sh\nunset LD_PRELOAD\nexec "{build.find_compiler()}" "$@"\n')
    COMPILER.chmod(0o700)
    return {
        **os.environ,
        "CXX": str(COMPILER),
        "FOLOSPEC_KERNELS_FLAGS": f"{effort} {FLAGS}",
        # The process itself is built without sanitizers: their runtimes must come first.
        "LD_PRELOAD": runtimes,
        # Python and torch keep memory until the end, and a test counts what is given back.
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:quarantine_size_mb=8",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",  # every object ends where its memory ends
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _runtimes() -> list[str]:
    compiler = build.find_compiler()
    found = []
    for name in RUNTIMES:
        asked = [compiler, f"-print-file-name={name}"]
        path = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(path).is_file():
            raise build.BuildError(f"{compiler} has no {name}")
        found.append(path)
    return found


def main(arguments: list[str]) -> int:
    if reason := why_not():
        print(f"the sanitizers do not run here: {reason}", file=sys.stderr)
        return 2
    if not arguments:
        arguments = [str(path) for pattern in PATHS for path in sorted(TESTS.glob(pattern))]
    # Reports go to the file of stderr, which pytest would take away.
    command = [sys.executable, "-m", "pytest", "--capture=sys", *arguments]
    return subprocess.run(command, env=environment()).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
