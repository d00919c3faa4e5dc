"""Builds the native CPU kernels with the system's compiler, once per source, compiler and CPU.

The library is linked against no OpenMP of its own: its symbols are found in the one that torch has
loaded, so that both share one team of threads. The threads of a second runtime would spin against
torch's.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

SOURCES = Path(__file__).parent / "cpu"
TIMEOUT_SECONDS = 300
FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # a sum is rounded where the source says so, whatever the loop around it
    "-fno-math-errno",
    "-fno-tree-pre",  # GCC 12 crashes in it on split vectors, and gains nothing by it here
    "-Wno-psabi",
)
OPENMP_NAMES = ("libgomp", "libiomp5", "libomp")


class BuildError(RuntimeError):
    """The kernels cannot be built or loaded here; the message says why."""


def build(target: str | None = None) -> Path:
    """Return the library's file, compiling it if no earlier run has.

    Args:
        target: the instruction set, as the compiler's -march names it; None: this machine's own.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    compiler = find_compiler()
    flags = (*FLAGS, _target_flag(target))
    folder = cache_folder() / "kernels"
    path = folder / f"{_fingerprint(compiler, flags)}.so"
    if not path.is_file():
        _compile(compiler, flags, path)
    return path


def load(target: str | None = None) -> ctypes.CDLL:
    """Build the library if need be, and load it beside torch's OpenMP.

    Raises:
        BuildError: it cannot be built, or torch runs without an OpenMP that it can share.
    """
    path = build(target)
    try:
        ctypes.CDLL(find_openmp(), mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} does not load: {error}") from error


def find_compiler() -> str:
    """The C++ compiler: CXX if that is set, else g++ or c++ from the path.

    Raises:
        BuildError: there is none.
    """
    named = os.environ.get("CXX")
    for name in (named,) if named else ("g++", "c++"):
        if found := shutil.which(name):
            return found
    raise BuildError(f"there is no C++ compiler ({named or 'g++ or c++'} is not on the path)")


def find_openmp() -> str:
    """The file of the OpenMP runtime that torch has loaded.

    Raises:
        BuildError: none is mapped, or the system does not say.
    """
    import torch

    torch.get_num_threads()  # whatever torch loads lazily is loaded now
    try:
        mapped = Path("/proc/self/maps").read_text().splitlines()
    except OSError as error:
        raise BuildError(f"the OpenMP that torch uses cannot be found: {error}") from error
    for line in mapped:
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith(OPENMP_NAMES):
            return path
    raise BuildError("torch has loaded no OpenMP, whose threads the kernels would share")


def cache_folder() -> Path:
    """Where folospec keeps what it can make again: FOLOSPEC_CACHE_DIR, else the user's cache."""
    if folder := os.environ.get("FOLOSPEC_CACHE_DIR"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "folospec"


def _compile(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = path.parent
        # Beside the final place, so that the rename is atomic: processes may compile at once.
        with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
            compiled, linked = Path(scratch) / "kernels.o", Path(scratch) / "kernels.so"
            _run([compiler, *flags, "-c", str(SOURCES / "kernels.cpp"), "-o", str(compiled)])
            # Without -fopenmp here: the symbols stay open until torch's runtime answers for them.
            _run([compiler, "-shared", str(compiled), "-o", str(linked)])
            linked.rename(path)
    except OSError as error:
        raise BuildError(f"the kernels cannot be kept in {path.parent}: {error}") from error


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} did not end in {TIMEOUT_SECONDS} s") from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise BuildError(f"{command[0]} failed: {said[0] if said else 'it said nothing'}")


def _target_flag(target: str | None) -> str:
    is_arm = platform.machine() in ("aarch64", "arm64")
    return f"-m{'cpu' if is_arm else 'arch'}={target or 'native'}"


@lru_cache
def _fingerprint(compiler: str, flags: tuple[str, ...]) -> str:
    """Changes with the sources, the flags, the compiler and the processor."""
    digest = hashlib.sha256("\n".join(flags).encode())
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".h", ".cpp"):
            digest.update(source.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=30)
    digest.update(version.stdout)
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        lines = cpu_info.read_text().splitlines()
        known = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
        digest.update("\n".join(sorted(known)).encode())
    return digest.hexdigest()[:16]
