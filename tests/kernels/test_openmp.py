"""The kernels share torch's OpenMP: one runtime is mapped, and it is torch's own.

The threads of a second runtime would go on spinning after each call and take the cores from those
of the first (`benchmarks/engine/turns.py` measures it).
"""

from __future__ import annotations

import os
import subprocess
import sys

from native_builds import require_native

from folospec.kernels import build

PROGRAM = """
from pathlib import Path
import torch
from folospec.kernels import build, native

torch.set_num_threads(2)
x, weight = torch.randn(8, 1024), torch.randn(2048, 1024)
torch.mm(x, weight.T)
native.load().apply_linear(x, native.matrix(weight))
lines = Path("/proc/self/maps").read_text().splitlines()
files = {line.split(maxsplit=5)[-1] for line in lines}
print(*sorted(f for f in files if Path(f).name.startswith(build.OPENMP_NAMES)), sep="\\n")
"""


def test_one_openmp_is_mapped_and_it_is_torchs():
    require_native()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines() == [os.path.realpath(build.find_openmp())]
