"""What every number is written down with: machine, versions, commit, command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT

_VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2"}
PACKAGES = ("folospec", "torch", "transformers", "tokenizers", "safetensors", "numpy")


def provenance(argv: list[str]) -> dict[str, Any]:
    """Return the facts of this process and machine as JSON types. Where there is no git to ask, the
    commit and whether it was changed are None.

    Args:
        argv: the script and its arguments, as they were given.
    """
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python -m", _module(argv[0]), *argv[1:]]),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_uncommitted_changes": None if changes is None else bool(changes),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": list(os.getloadavg()),
        "kernels_target": os.environ.get("FOLOSPEC_KERNELS_TARGET"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        **{package: installed_version(package) for package in PACKAGES},
    }


def _module(script: str) -> str:
    """The name by which `python -m` runs a script of the repository."""
    parts = Path(script).resolve().relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__main__")


def installed_version(package: str) -> str | None:
    """The version of a package; None where it is not installed, as folospec in its own folder."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """The output of a git command in the repository; None outside of one, or without git."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    """The processor; of x86 with family, model and widest vectors, since some names say little."""
    info = Path("/proc/cpuinfo")
    facts = {}
    for line in info.read_text().splitlines() if info.exists() else ():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    if "cpu family" not in facts:
        return name
    flags = facts.get("flags", "").split()
    vectors = [shown for flag, shown in _VECTORS.items() if flag in flags]
    kind = [f"family {facts['cpu family']}", f"model {facts['model']}", *vectors[:1]]
    return f"{name} ({', '.join(kind)})"
