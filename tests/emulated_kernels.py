"""The native kernels of another processor, run under qemu: built for Arm on a machine that is none.

    Native, NativeSampling, ... --> EmulatedLibrary --memory and arguments--> driver under qemu

`EmulatedLibrary` stands for what ctypes loads, and the wrappers of `folospec.kernels` call it as
they call that. Their arguments are addresses: `kernel_memory` says how far the memory behind them
reaches. It is copied to the driver (`kernels/driver.cpp`) before a call, and back after it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import struct
import subprocess
import weakref
from ctypes import Structure, c_void_p
from pathlib import Path
from typing import Any

from kernel_memory import EXTENTS, Memory

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
DRIVER = Path(__file__).parent / "kernels" / "driver.cpp"


def why_not() -> str | None:
    """Say why no kernels are emulated here; None if they are."""
    for program, package in ((COMPILER, "g++-aarch64-linux-gnu"), (EMULATOR, "qemu-user")):
        if shutil.which(program) is None:
            return f"there is no {program} (Debian's package {package})"
    if flags := os.environ.get("FOLOSPEC_KERNELS_FLAGS"):
        return f"kernels built with {flags} are not emulated"
    return None


def ask_compiler(*arguments: str) -> str:
    done = subprocess.run([COMPILER, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def build_driver(folder: Path) -> Path:
    """The driver's program, compiled once for each version of its source."""
    digest = hashlib.sha256(DRIVER.read_bytes()).hexdigest()[:16]
    program = folder / f"driver-{digest}"
    if not program.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        made = folder / f"{program.name}-{os.getpid()}"
        ask_compiler("-O1", "-std=c++17", str(DRIVER), "-o", str(made), "-ldl")
        made.rename(program)
    return program


class EmulatedFunction:
    """A function of the library, as ctypes has it."""

    def __init__(self, library: EmulatedLibrary, name: str) -> None:
        self.library, self.name = library, name
        self.restype: type | None = ctypes.c_int64
        self.argtypes: Any = ()

    def __call__(self, *arguments: Any) -> Any:
        kinds = self.argtypes or [None] * len(arguments)
        passed = [pass_on(each, kind) for each, kind in zip(arguments, kinds, strict=True)]
        memory = Memory(self.library)
        EXTENTS[self.name](memory, *(value for value, _ in passed))
        regions = memory.regions()
        integers = [(kind == "address", value) for value, kind in passed if kind != "double"]
        doubles = [value for value, kind in passed if kind == "double"]
        result = {ctypes.c_char_p: "s", ctypes.c_float: "f"}.get(self.restype, "i")
        sent = [pack_name("c", self.name), words(ord(result), len(regions))]
        for address, size in regions:
            sent += [words(address, size), ctypes.string_at(address, size)]
        for pairs in (memory.pointers, integers):
            sent += [words(len(pairs)), *(words(*pair) for pair in pairs)]
        sent.append(words(len(doubles)) + struct.pack(f"={len(doubles)}d", *doubles))
        return self.library.call(b"".join(sent), result, regions)


class EmulatedInt:
    """A global int of the library, as `ctypes.c_int.in_dll` has it; it can be set alone."""

    def __init__(self, library: EmulatedLibrary, name: str) -> None:
        self._library, self._name = library, name

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "value":
            self._library.send(pack_name("s", self._name) + words(value))
        else:
            super().__setattr__(name, value)


class EmulatedLibrary:
    """A library for Arm, in a process of its own under qemu, which ends with this object."""

    def __init__(self, path: Path, driver: Path) -> None:
        self._name = str(path)
        openmp = ask_compiler("-print-file-name=libgomp.so.1")
        libc = Path(ask_compiler("-print-file-name=libc.so.6")).resolve()
        self._process = subprocess.Popen(
            [EMULATOR, "-L", str(libc.parents[1]), str(driver), self._name, openmp],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        weakref.finalize(self, self._process.kill)
        self._functions: dict[str, EmulatedFunction] = {}

    def __getattr__(self, name: str) -> EmulatedFunction:
        if not name.startswith("folospec_"):
            raise AttributeError(name)
        return self._functions.setdefault(name, EmulatedFunction(self, name))

    def send(self, request: bytes) -> None:
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()

    def call(self, request: bytes, result: str, regions: list[tuple[int, int]]) -> Any:
        self.send(request)
        found: Any
        if result == "f":
            [found] = struct.unpack("=f", self._take(4))
        else:
            [found] = struct.unpack("=q", self._take(8))
        if result == "s":
            found = self._take(found)
        for address, size in regions:
            ctypes.memmove(address, self._take(size), size)
        return found

    def _take(self, size: int) -> bytes:
        taken = self._process.stdout.read(size)
        if len(taken) < size:
            self._fail()
        return taken

    def _fail(self) -> None:
        said = self._process.communicate()[1].decode()
        raise RuntimeError(f"the driver ended with {self._process.returncode}: {said}")


def pass_on(argument: Any, declared: type | None) -> tuple[Any, str]:
    """An argument as the function gets it, and whether that is an "address", an "integer" or a
    "double"."""
    if isinstance(argument, bytes):
        return ctypes.cast(argument, c_void_p).value, "address"
    if isinstance(argument, (ctypes.Array, Structure)):
        return ctypes.addressof(argument), "address"
    if hasattr(argument, "_obj"):  # of ctypes.byref
        return ctypes.addressof(argument._obj), "address"
    if declared is c_void_p:
        return argument or 0, "address"
    return (float(argument), "double") if declared is ctypes.c_double else (argument, "integer")


def words(*numbers: int) -> bytes:
    return struct.pack(f"={len(numbers)}Q", *(number % 2**64 for number in numbers))


def pack_name(kind: str, name: str) -> bytes:
    return words(ord(kind), len(name)) + name.encode()
