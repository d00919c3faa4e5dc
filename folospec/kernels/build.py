"""Finds the native CPU kernels: prebuilt, or compiled once per source, compiler and CPU.

    libraries/<target>-<sources>.so, where the package came with one that will do; else
    *.cpp --compile, each in a process of its own--> objects --link--> <fingerprint>-<content>.so

A library is linked against no OpenMP of its own: its symbols are found in the one that torch has
loaded, so that both share one team of threads. The threads of a second runtime would spin against
torch's.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from folospec.kernels import prebuilt, targets
from folospec.kernels.private import check_private, make_private

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "cpu"
TIMEOUT_SECONDS = 300
_IS_APPLE = sys.platform == "darwin"
FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # a sum is rounded where the source says so, whatever the loop around it
    "-fno-math-errno",
    "-Wno-psabi",
    # GCC 12 crashes in -ftree-pre on split vectors, and gains nothing by it here.
    *(("-Xclang", "-fopenmp") if _IS_APPLE else ("-fopenmp", "-fno-tree-pre")),
)
# Symbols of OpenMP stay open; on Linux that goes without saying.
LINK_FLAGS = ("-shared", *(("-undefined", "dynamic_lookup") if _IS_APPLE else ()))
OPENMP_NAMES = ("libgomp", "libiomp5", "libomp")


class BuildError(RuntimeError):
    """The kernels cannot be built or loaded here; the message says why."""


def find(target: str | None = None, sources: Path = SOURCES) -> Path:
    """Return the library's file: the best that came with the package and that this machine runs,
    else one built here.

    A prebuilt library is not taken where something is asked for that it does not have: another
    target than those of `targets`, "native" among them, or flags in FOLOSPEC_KERNELS_FLAGS.

    Args:
        target: see `build`.
        sources: see `build`.

    Raises:
        BuildError: see `build`; or this processor does not run the target.
    """
    asked = target or os.environ.get("FOLOSPEC_KERNELS_TARGET")
    if asked and (lacking := targets.lacking(asked)):
        raise BuildError(f"this processor does not run {asked}, it lacks {', '.join(lacking)}")
    only_compiled = os.environ.get("FOLOSPEC_KERNELS_FLAGS")
    found = None if only_compiled else prebuilt.find(sources, asked or None)
    return found or build(target, sources)


def build(target: str | None = None, sources: Path = SOURCES) -> Path:
    """Return the file of a library built here, compiling it if no earlier run has.

    Args:
        target: the instruction set, as the compiler's -march names it; None: the one that
            FOLOSPEC_KERNELS_TARGET names, else this machine's own.
        sources: the folder of the *.cpp files and their headers.

    Raises:
        BuildError: there is no compiler, it fails, or the cache cannot be written or is not the
            user's alone.
    """
    compiler = find_compiler()
    flags = compile_flags(target or os.environ.get("FOLOSPEC_KERNELS_TARGET") or "native")
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
    """Find the library, building it if need be, and load it next to torch's OpenMP.

    Raises:
        BuildError: there is none and it cannot be built, or torch runs without an OpenMP that it
            can share.
    """
    openmp = find_openmp()
    path = find(target, sources)
    try:
        ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} does not load: {error}") from error


def compile_flags(target: str) -> tuple[str, ...]:
    """What the compiler is told for a target: `FLAGS`, the target's own, FOLOSPEC_KERNELS_FLAGS."""
    more = os.environ.get("FOLOSPEC_KERNELS_FLAGS", "").split()
    return (*FLAGS, *targets.compiler_flags(target), *more)


def compile_library(compiler: str, flags: tuple[str, ...], sources: Path, library: Path) -> None:
    """Compile the *.cpp files of a folder and link them to a library, whose OpenMP stays open.

    Raises:
        BuildError: the compiler fails.
        OSError: there is no room for the library, or for what it is made of, next to it.
    """
    units = sorted(sources.glob("*.cpp"))
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="objects-") as scratch:
        objects = [str(Path(scratch) / f"{unit.stem}.o") for unit in units]
        commands = [
            [compiler, *flags, "-c", str(unit), "-o", made]
            for unit, made in zip(units, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        # Without -fopenmp here: the symbols stay open until torch's runtime answers for them.
        _run([compiler, *LINK_FLAGS, *objects, "-o", str(library)])


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
    found = [path for path in _loaded_files() if Path(path).name.startswith(OPENMP_NAMES)]
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
        linked = Path(scratch) / "kernels.so"
        compile_library(compiler, flags, sources, linked)
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


def _loaded_files() -> list[str]:
    """The files that are mapped into this process, in the order in which they lie.

    Raises:
        BuildError: the system does not say.
    """
    if sys.platform == "darwin":
        images = ctypes.CDLL(None)
        images._dyld_get_image_name.restype = ctypes.c_char_p
        names = map(images._dyld_get_image_name, range(images._dyld_image_count()))
        return [os.fsdecode(name) for name in names if name]
    try:
        mapped = Path("/proc/self/maps").read_text().splitlines()
    except OSError as error:
        raise BuildError(f"the OpenMP that torch uses cannot be found: {error}") from error
    return list(dict.fromkeys(line.split(maxsplit=5)[-1] for line in mapped))


@lru_cache
def _fingerprint(compiler: str, flags: tuple[str, ...], sources: Path) -> str:
    """Changes with the sources, the flags, the compiler and the processor."""
    digest = hashlib.sha256("\n".join([*flags, prebuilt.digest_of(sources)]).encode())
    digest.update(_run([compiler, "--version"]).encode())
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        lines = cpu_info.read_text().splitlines()
        known = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
        digest.update("\n".join(sorted(known)).encode())
    return digest.hexdigest()[:16]
