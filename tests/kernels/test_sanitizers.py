"""The sanitizers see what the kernels do to memory: a run that is right passes, and a byte too many
is reported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import sanitizers
from native_builds import require_native

PROGRAM = """
import sys
sys.path[:0] = [{tests!r}]
import torch
from native_builds import breakable

torch.set_num_threads(1)
broken = breakable()
cache = torch.arange(4 * 32.0).view(4, 32)
broken.library.move([cache], [3], [0])
print("MOVED", cache[0].equal(cache[3]), flush=True)
broken.overrun()
broken.library.move([cache], [3], [0])
print("NOT SEEN")
"""


@pytest.mark.slow
def test_a_run_that_is_right_passes_and_a_byte_too_many_is_reported():
    require_native()
    if reason := sanitizers.why_not():
        pytest.skip(reason)
    program = PROGRAM.format(tests=str(Path(__file__).parents[1]))
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=sanitizers.environment("-O0"),
        timeout=300,
    )
    assert done.stdout == "MOVED True\n", done.stderr
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "folospec_move_rows" in done.stderr
    assert "READ of size 129" in done.stderr
