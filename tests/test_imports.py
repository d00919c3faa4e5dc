"""What importing folospec costs, and what it leaves alone."""

import importlib.util
import os
import subprocess
import sys

import pytest

FOR_GPUS = ("triton", "flash_attn", "xformers", "torchao")
LIGHT = {"folospec", "numpy", "tqdm"}
"""Packages that `from folospec import LLM` may load, besides those that torch loads."""


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


def loaded_after_torch(code: str) -> set[str]:
    """Which packages outside the standard library `code` loads beyond those that torch loads."""
    packages = "{name.partition('.')[0] for name in sys.modules} - {*sys.stdlib_module_names}"
    said = run(f"import sys, torch; before = {packages}; {code}; print(*({packages}) - before)")
    return set(said.split())


def test_importing_folospec_loads_little_beyond_torch():
    assert loaded_after_torch("import folospec; folospec.LLM") <= LIGHT


def test_a_heavy_import_is_noticed():
    assert "transformers" in loaded_after_torch("import transformers")
