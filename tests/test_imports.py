"""What importing folospec costs, and what it leaves alone."""

import importlib.util
import os
import subprocess
import sys

import pytest

FOR_GPUS = ("triton", "flash_attn", "xformers", "torchao")
MOST_SECONDS = 0.5
"""Beyond torch's own."""


def run(code: str) -> str:
    """What a fresh process prints, which interprets no kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def loaded(code: str) -> set[str]:
    """Which of the packages for GPUs are loaded after `code` on a machine without one."""
    hidden = "import torch; torch.cuda.is_available = lambda: False"
    said = run(f"{hidden}; {code}; import sys; print(*set({FOR_GPUS}) & set(sys.modules))")
    return set(said.split())


KNOW = "from folospec.attention.base import choose_backend, known_backends; known_backends()"
CHOOSE = "choose_backend('auto', torch.float32, [64], 16, torch.device('cpu'))"


@pytest.mark.parametrize(
    "code",
    [
        "import folospec; folospec.LLM",
        f"{KNOW}; {CHOOSE}",
        "from folospec.engine.capabilities import capabilities; capabilities()",
    ],
)
def test_a_machine_without_a_gpu_loads_nothing_that_is_for_one(code):
    assert loaded(code) == set()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_what_is_loaded_is_seen():
    assert loaded("import triton") == {"triton"}


def test_folospec_adds_little_to_the_time_that_torch_takes_to_import():
    # Of the processor, so that what else the machine does is not counted.
    code = (
        "import time, torch; begin = time.process_time(); "
        "import folospec; folospec.LLM; print(time.process_time() - begin)"
    )
    seconds = min(float(run(code)) for _ in range(3))
    assert seconds < MOST_SECONDS, f"{seconds:.2f} s"
