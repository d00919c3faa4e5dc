"""Every kernel builds for the cards it is meant for: as far as a machine without one can tell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
MODULES = sorted(path.stem for path in HERE.glob("gpu_cases_*.py"))
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""Most shared memory of a block, by compute capability (CUDA C++ programming guide)."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "how"), [(80, ["once"]), (90, [])], ids=["kernels-8.0", "variants-9.0"]
)
@pytest.mark.parametrize("module", MODULES)
def test_every_launch_compiles_and_fits(module, capability, how):
    done = subprocess.run(
        [sys.executable, str(HERE / "gpu_compile.py"), module, str(capability), *how],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    built = [json.loads(line) for line in done.stdout.splitlines()]
    assert built, "no launch was compiled"
    assert max(variant["shared"] for variant in built) <= SHARED_BYTES[capability]
