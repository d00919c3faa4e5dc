"""`folospec info`: what this machine and this installation have, and what folospec makes of it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from folospec.cli.render import console, write
from folospec.config import DTYPES
from folospec.speculative_config import ACCEPTANCE_RULES

if TYPE_CHECKING:
    from folospec.engine.capabilities import Capabilities

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
OPTIONAL_PACKAGES = ("triton", "flash-attn", "xformers", "torchao")
COMPILERS = ("cc", "gcc", "clang", "c++")
FLAGS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16"),
    *("asimd", "bf16", "i8mm", "sve", "sve2"),
)
"""CPU flags that matter for speed, x86 and Arm."""
BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")


def gather() -> dict[str, Any]:
    """Collect everything, as `--json` prints it."""
    import torch

    import folospec
    from folospec.engine.capabilities import capabilities

    known = capabilities()
    flags = [flag for flag in FLAGS if flag in known.cpu_flags]
    return {
        "versions": {
            "folospec": folospec.__version__,
            "python": platform.python_version(),
            **{name: package_version(name) for name in (*PACKAGES, *OPTIONAL_PACKAGES)},
            "system": platform.platform(),
        },
        "cpu": {
            "model": cpu_name(),
            "cores": os.cpu_count(),
            "usable_cores": _usable_cores(),
            "torch_threads": torch.get_num_threads(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "flags": flags,
            "memory_bytes": _memory_bytes(),
        },
        "cuda": torch.version.cuda,
        "gpus": _gpus(),
        "dtypes": _dtypes(torch.cuda.is_available(), flags),
        "attention_backends": {
            name: reason or "available" for name, reason in known.attention_backends.items()
        },
        "attention_block_sizes": {
            name: f"multiples of {step} (default {known.block_size})"
            for name, step in known.attention_block_steps.items()
        },
        "attention_backend_chosen": {
            "name": known.auto_attention_backend,
            "device": known.device,
            "why": _why(known),
            "passed_over": known.passed_over,
        },
        "native_kernels": {
            "state": known.no_native_kernels or "available",
            "instructions": known.kernel_instructions,
            "origin": known.kernel_origin,
            "library": known.kernel_library,
        },
        "drafters": list(known.drafters),
        "acceptance_rules": list(ACCEPTANCE_RULES),
        "compilers": {name: compiler_version(name) for name in COMPILERS},
        "bundled_models": {
            name: _model_facts(folder) for name, folder in known.bundled_models.items()
        },
    }


def run_info(*, as_json: bool) -> None:
    """Print it, as a table or as JSON."""
    facts = gather()
    if as_json:
        write(console(), json.dumps(facts, indent=2) + "\n")
    else:
        console().print(_table(facts))


def package_version(name: str) -> str | None:
    """The installed version of a package, None if there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def compiler_version(name: str) -> str | None:
    """The first line that a compiler says of itself, None if it is not on the path."""
    path = shutil.which(name)
    if path is None:
        return None
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{path} does not run: {error}"
    return f"{path}: {(said.stdout.splitlines() or ['no version'])[0]}"


def cpu_name() -> str:
    """The processor's name in words, as far as the system tells."""
    if sys.platform == "darwin":
        said = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True
        )
        return said.stdout.strip() or platform.machine()
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str | None:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return None
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def _usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _gpus() -> list[dict[str, Any]]:
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            {
                "name": gpu.name,
                "compute_capability": f"{gpu.major}.{gpu.minor}",
                "processors": gpu.multi_processor_count,
                "memory_free_bytes": free,
                "memory_total_bytes": total,
            }
        )
    return found


def _dtypes(has_gpu: bool, flags: list[str]) -> dict[str, str]:
    native = [flag for flag in flags if flag in BF16_FLAGS]
    how = f"native dot products ({', '.join(native)})" if native else "computed in float32"
    notes = {
        "auto": "the checkpoint's type on the GPU" if has_gpu else "float32 on this machine",
        "float32": "the CPU's default",
        "bfloat16": f"on the CPU: {how}",
        "float16": "works on the CPU, meant for GPUs",
        "float64": "for tests",
    }
    return {name: notes.get(name, "") for name in DTYPES}


def _why(known: Capabilities) -> str:
    chosen, backends = known.auto_attention_backend, known.attention_backends
    able = [name for name in known.considered if backends[name] is None]
    others = [name for name in able if name != chosen and name not in known.passed_over]
    if others:
        why = f"'auto' prefers it to {', '.join(others)}"
    else:
        why = f"the only one for {known.device} with blocks of {known.block_size}"
    # What cannot run here at all says so on its own line.
    passed = [f"not {n}: {r}" for n, r in known.passed_over.items() if n in able]
    return "; ".join([why, *passed])


def _model_facts(folder: str | None) -> str:
    if folder is None:
        return "not installed"
    config = json.loads((Path(folder) / "config.json").read_text())
    size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    return (
        f"{config['num_hidden_layers']} layers, hidden {config['hidden_size']}, "
        f"{config['max_position_embeddings']} positions, {size / 1e6:.1f} MB"
    )


def _table(facts: dict[str, Any]) -> Table:
    """Two columns; a long value wraps within its own."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for title, lines in _sections(facts):
        table.add_row(title, Text("\n".join(lines) or "none"))
    return table


def _kernel_lines(kernels: dict[str, Any]) -> list[str]:
    if kernels["instructions"] is None:
        return [f"torch's own; native CPU kernels: {kernels['state']}"]
    origin = "prebuilt" if kernels["origin"] == "prebuilt" else "compiled here"
    return [f"native, built for {kernels['instructions']}", f"{origin}: {kernels['library']}"]


def _gpu_lines(facts: dict[str, Any]) -> list[str]:
    lines = []
    for gpu in facts["gpus"]:
        free, total = (gpu[f"memory_{which}_bytes"] / 2**30 for which in ("free", "total"))
        lines += [
            f"{gpu['name']}, compute capability {gpu['compute_capability']}",
            f"{gpu['processors']} multiprocessors, {free:.1f} of {total:.1f} GiB free",
        ]
    cuda, triton = facts["cuda"], facts["versions"]["triton"]
    made_for = f"made for CUDA {cuda}" if cuda else "made without CUDA"
    return [*(lines or ["none"]), f"torch {made_for}, triton {triton or 'not installed'}"]


def _attention_lines(facts: dict[str, Any]) -> list[str]:
    sizes, chosen = facts["attention_block_sizes"], facts["attention_backend_chosen"]
    lines = [
        f"{name}: {state}" + (f"; block_size: {sizes[name]}" if name in sizes else "")
        for name, state in facts["attention_backends"].items()
    ]
    return [*lines, f"chosen: {chosen['name']}, {chosen['why']}"]


def _sections(facts: dict[str, Any]) -> list[tuple[str, list[str]]]:
    cpu, versions = facts["cpu"], facts["versions"]
    packages = [f"{name} {versions[name]}" for name in PACKAGES]
    memory = cpu["memory_bytes"]
    return [
        ("folospec", [f"{versions['folospec']}, Python {versions['python']}", versions["system"]]),
        ("packages", [", ".join(packages)]),
        ("optional", [f"{n}: {versions[n] or 'not installed'}" for n in OPTIONAL_PACKAGES]),
        (
            "CPU",
            [
                cpu["model"],
                f"{cpu['cores']} cores, {cpu['usable_cores']} usable, "
                f"{cpu['torch_threads']} torch threads, torch sees {cpu['torch_capability']}",
                " ".join(cpu["flags"]) or "flags unknown",
            ],
        ),
        ("memory", [f"{memory / 2**30:.1f} GiB" if memory else "unknown"]),
        ("GPUs", _gpu_lines(facts)),
        ("dtypes", [f"{name}: {note}" for name, note in facts["dtypes"].items()]),
        ("attention", _attention_lines(facts)),
        ("kernels", _kernel_lines(facts["native_kernels"])),
        ("drafters", [", ".join(facts["drafters"])]),
        ("acceptance", [", ".join(facts["acceptance_rules"])]),
        (
            "compilers",
            [f"{name}: {found or 'not found'}" for name, found in facts["compilers"].items()],
        ),
        ("models", [f"{name}: {words}" for name, words in facts["bundled_models"].items()]),
    ]
