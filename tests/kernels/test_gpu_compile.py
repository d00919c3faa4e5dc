"""Every kernel builds for the cards it is meant for: as far as a machine without one can tell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
MODULES = {path.stem for path in HERE.glob("gpu_cases_*.py")}
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""Most shared memory of a block, by compute capability (CUDA C++ programming guide)."""


def compiled(*options):
    """What was built, a record for each variant and card."""
    done = subprocess.run(
        [sys.executable, str(HERE / "gpu_compile.py"), *map(str, SHARED_BYTES), *options],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_fit(built):
    for capability, limit in SHARED_BYTES.items():
        mine = [variant for variant in built if variant["capability"] == capability]
        assert {variant["module"] for variant in mine} == MODULES
        assert max(variant["shared"] for variant in mine) <= limit


@pytest.mark.slow
def test_every_kernel_compiles_and_fits():
    assert_fit(compiled("--once"))


@pytest.mark.soak
def test_every_launch_compiles_and_fits():
    assert_fit(compiled())
