"""Builds the native CPU kernels with the system's compiler, once per source, compiler and CPU.

    *.cpp --compile, each in a process of its own--> objects --link--> <fingerprint>-<content>.so

The library is linked against no OpenMP of its own: its symbols are found in the one that torch has
loaded, so that both share one team of threads. The threads of a second runtime would spin against
torch's.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from folospec.kernels.private import check_private, make_private

logger = logging.getLogger(__name__)

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


def build(target: str | None = None, sources: Path = SOURCES) -> Path:
    """Return the library's file, compiling it if no earlier run has.

    Args:
        target: the instruction set, as the compiler's -march names it; None: the one that
            FOLOSPEC_KERNELS_TARGET names, else this machine's own.
        sources: the folder of the *.cpp files and their headers.

    Raises:
        BuildError: there is no compiler, it fails, or the cache cannot be written or is not the
            user's alone.
    """
    compiler = find_compiler()
    flags = (*FLAGS, _target_flag(target), *os.environ.get("FOLOSPEC_KERNELS_FLAGS", "").split())
    folder = cache_folder() / "kernels"
    name = _fingerprint(compiler, flags, sources)
    try:
        make_private(folder)
        check_private(folder)
        if found := _find(folder, name):
            return found
        with _alone_in(folder):
            return _find(folder, name) or _compile(compiler, flags, sources, folder, name)
    except OSError as error:
        raise BuildError(f"the kernels cannot be kept in {folder}: {error}") from error


def load(target: str | None = None, sources: Path = SOURCES) -> ctypes.CDLL:
    """Build the library if need be, and load it beside torch's OpenMP.

    Raises:
        BuildError: it cannot be built, or torch runs without an OpenMP that it can share.
    """
    openmp = find_openmp()
    path = build(target, sources)
    try:
        ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL)
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
    files = dict.fromkeys(line.split(maxsplit=5)[-1] for line in mapped)
    found = [path for path in files if Path(path).name.startswith(OPENMP_NAMES)]
    # Other packages may have brought one of their own, before torch or after it.
    homes = tuple(f"{Path(torch.__file__).parent}{end}{os.sep}" for end in ("", ".libs"))
    found.sort(key=lambda path: not path.startswith(homes))
    if not found:
        raise BuildError("torch has loaded no OpenMP, whose threads the kernels would share")
    return found[0]


def cache_folder() -> Path:
    """Where folospec keeps what it can make again: FOLOSPEC_CACHE_DIR, else the user's cache.

    Raises:
        BuildError: the user has no home.
    """
    if folder := os.environ.get("FOLOSPEC_CACHE_DIR"):
        return Path(folder)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "folospec"
    try:
        return Path.home() / ".cache" / "folospec"
    except RuntimeError as error:
        raise BuildError(f"there is no folder for them, set FOLOSPEC_CACHE_DIR: {error}") from error


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Who comes second waits, and finds what the first has compiled. Where folders cannot be
    locked, each compiles for itself."""
    import fcntl  # not on Windows, where there is no OpenMP to share either

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.warning("waiting for another process that compiles the CPU kernels")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # and with it the lock


def _find(folder: Path, name: str) -> Path | None:
    """The library that an earlier run has built."""
    for path in sorted(folder.glob(f"{name}-*.so")):
        try:
            check_private(path)
            if path.name == _named(name, path):
                return path
        except FileNotFoundError:
            continue  # another process has just removed it
        # Cut short, by a crash or a full disk; to load it may end the process.
        path.unlink(missing_ok=True)
    return None


def _compile(compiler: str, flags: tuple[str, ...], sources: Path, folder: Path, name: str) -> Path:
    # A warning, since it is seen where nothing is set up to log: the first start waits for this.
    logger.warning("compiling the CPU kernels with %s, once; this may take a minute", compiler)
    # Beside the final place, so that the rename is atomic: not everyone waits for the lock.
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
        linked, units = Path(scratch) / "kernels.so", sorted(sources.glob("*.cpp"))
        objects = [str(Path(scratch) / f"{unit.stem}.o") for unit in units]
        commands = [
            [compiler, *flags, "-c", str(unit), "-o", made]
            for unit, made in zip(units, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        # Without -fopenmp here: the symbols stay open until torch's runtime answers for them.
        _run([compiler, "-shared", *objects, "-o", str(linked)])
        linked.chmod(0o700)
        return linked.rename(folder / _named(name, linked))


def _named(name: str, path: Path) -> str:
    """What a library's file is called: its name says what it was made from, and what is in it."""
    return f"{name}-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.so"


def _run(command: list[str]) -> str:
    """Run the compiler and return what it printed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} did not end in {TIMEOUT_SECONDS} s") from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        errors = [line for line in said if "error" in line] or said
        raise BuildError(f"{command[0]} failed: {errors[0] if errors else 'it said nothing'}")
    return done.stdout


def _target_flag(target: str | None) -> str:
    is_arm = platform.machine() in ("aarch64", "arm64")
    target = target or os.environ.get("FOLOSPEC_KERNELS_TARGET") or "native"
    return f"-m{'cpu' if is_arm else 'arch'}={target}"


@lru_cache
def _fingerprint(compiler: str, flags: tuple[str, ...], sources: Path) -> str:
    """Changes with the sources, the flags, the compiler and the processor."""
    digest = hashlib.sha256("\n".join(flags).encode())
    for source in sorted(sources.iterdir()):
        if source.suffix in (".h", ".cpp"):
            digest.update(source.read_bytes())
    digest.update(_run([compiler, "--version"]).encode())
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        lines = cpu_info.read_text().splitlines()
        known = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
        digest.update("\n".join(sorted(known)).encode())
    return digest.hexdigest()[:16]
