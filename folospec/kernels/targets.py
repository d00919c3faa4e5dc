"""Lists the instruction sets that native kernels are built for, and which of them run here.

A target is named as the compiler's -march names it, with extensions behind a "+":
"x86-64-v4+avx512bf16+avx512vnni". A wheel has a library for each target of its platform.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

_V2 = frozenset({"cx16", "lahf_lm", "pni", "popcnt", "sse4_1", "sse4_2", "ssse3"})
_V3 = _V2 | {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"}
_V4 = _V3 | {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"}
_ARM_V8_2 = frozenset({"asimdrdm", "atomics"})


class Target(NamedTuple):
    """An instruction set."""

    name: str
    needs: frozenset[str]
    """The flags of a processor that runs it, as /proc/cpuinfo names them."""

    @property
    def runs_here(self) -> bool:
        """Whether this processor has what it needs."""
        return self.needs <= cpu_flags()


TARGETS: dict[str, tuple[Target, ...]] = {
    "x86_64": (
        Target("x86-64-v4+avx512bf16+avx512vnni", _V4 | {"avx512_bf16", "avx512_vnni"}),
        Target("x86-64-v4", _V4),
        Target("x86-64-v3", _V3),
        Target("x86-64", frozenset()),
    ),
    "aarch64": (
        Target("armv8.2-a+dotprod+bf16", _ARM_V8_2 | {"asimddp", "bf16"}),
        Target("armv8-a", frozenset()),
    ),
}
"""By machine, the best first; every machine of its kind runs the last."""

_MACHINES = {"AMD64": "x86_64", "arm64": "aarch64"}
_APPLE_FLAGS = {
    "FEAT_BF16": "bf16",
    "FEAT_DotProd": "asimddp",
    "FEAT_LSE": "atomics",
    "FEAT_RDM": "asimdrdm",
}
"""The names that macOS has for flags of /proc/cpuinfo."""


def machine() -> str:
    """The kind of this machine's processor, as Linux names it: "x86_64", "aarch64"."""
    name = platform.machine()
    return _MACHINES.get(name, name)


def local_targets() -> tuple[Target, ...]:
    """The targets of this kind of machine, the best first; none where it is of another kind."""
    return TARGETS.get(machine(), ())


def lacking(name: str) -> list[str]:
    """The flags that this processor lacks for a target; none where that is not known."""
    needs = [target.needs for target in local_targets() if target.name == name]
    return sorted(needs[0] - cpu_flags()) if needs and cpu_flags() else []


def compiler_flags(name: str) -> tuple[str, ...]:
    """What tells the compiler to build for a target, for "native", this very processor, or for any
    other name that it knows."""
    base, *extensions = name.split("+")
    if base.startswith("x86-64"):
        return (f"-march={base}", *(f"-m{extension}" for extension in extensions))
    names_processor = machine() == "aarch64" and not base.startswith("armv")
    return (f"-m{'cpu' if names_processor else 'arch'}={name}",)


@lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """What the processor can do, as /proc/cpuinfo names it; empty where the system does not say."""
    if sys.platform == "darwin":
        return _apple_flags()
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                return frozenset(value.split())
    return frozenset()


def _apple_flags() -> frozenset[str]:
    try:
        said = subprocess.run(["sysctl", "hw.optional.arm"], capture_output=True, text=True)
    except OSError:
        return frozenset()
    lines = [line.partition(":") for line in said.stdout.splitlines()]
    present = {key.rpartition(".")[2] for key, _, value in lines if value.strip() == "1"}
    return frozenset(flag for name, flag in _APPLE_FLAGS.items() if name in present)
