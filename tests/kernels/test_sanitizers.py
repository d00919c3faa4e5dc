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
from folospec import LLM, SamplingParams
from folospec.kernels import native

torch.set_num_threads(1)
broken = breakable()
native._loaded = lambda: (broken.library, None)
llm = LLM("folospec-demo", "ngram", num_blocks=16)
params = SamplingParams(temperature=0, max_tokens=4)
[output] = llm.generate(["x = 1\\nx = "], params, use_tqdm=False)
cache = torch.zeros(4, 32)
broken.library.move([cache], [3], [0])
print("TOKENS", len(output.outputs[0].token_ids), llm.stats()["lossless"], flush=True)
broken.overrun()
broken.library.move([cache], [3], [0])
print("NOT SEEN")
"""


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
    assert done.stdout == "TOKENS 4 bit\n", done.stderr
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "folospec_move_rows" in done.stderr
    assert "READ of size 129" in done.stderr
