"""What importing folospec costs, and what it leaves alone."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

FOR_GPUS = {"triton", "flash_attn", "xformers", "torchao"}
LIGHT = {"folospec", "numpy", "tqdm"}
"""Packages that `from folospec import LLM` may load, besides those that torch loads."""
HAS_TRITON = importlib.util.find_spec("triton") is not None

KNOW = "from folospec.attention.base import choose_backend, known_backends; known_backends()"
CHOOSE = "choose_backend('auto', torch.float32, [64], 16, torch.device('cpu'))"
STEPS = {
    "torch": "import torch; torch.cuda.is_available = lambda: False",
    "folospec": "import folospec; folospec.LLM",
    "attention": f"{KNOW}; {CHOOSE}",
    "capabilities": "from folospec.engine.capabilities import capabilities; capabilities()",
    **({"triton": "import triton"} if HAS_TRITON else {}),
    "transformers": "import transformers",
}
"""What one process does, step by step; the last are controls."""
PROGRAM = f"""
import json, sys
for name, code in {STEPS!r}.items():
    exec(code)
    print(json.dumps([name, [name.partition(".")[0] for name in sys.modules]]))
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """The packages outside the standard library that a fresh process, which interprets no kernels,
    has loaded after each step."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: set(packages) - {*sys.stdlib_module_names} for name, packages in steps}


@pytest.mark.parametrize("step", ["folospec", "attention", "capabilities"])
def test_a_machine_without_a_gpu_loads_nothing_that_is_for_one(loaded, step):
    assert loaded[step] & FOR_GPUS == set()


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_what_is_loaded_is_seen(loaded):
    assert loaded["triton"] & FOR_GPUS == {"triton"}


def test_importing_folospec_loads_little_beyond_torch(loaded):
    assert loaded["folospec"] - loaded["torch"] <= LIGHT


def test_a_heavy_import_is_noticed(loaded):
    assert "transformers" in loaded["transformers"] - loaded["capabilities"]
