"""Compiles every launch of the modules of cases for cards that need not be there.

    python tests/kernels/gpu_compile.py 80 90 [--once]

Prints a JSON line per compiled variant: the module whose case asked for it first, kernel,
constants, compute capability, bytes of shared memory. With `--once` each kernel is compiled once
for each, as it is launched first. Nothing is run: outputs stay as they were.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from folospec.kernels.gpu import launch as door  # noqa: E402

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
LAUNCH_OPTIONS = ("num_warps", "num_stages")


def type_of(value: Any) -> str:
    """The type that Triton gives an argument; "constexpr" for None, which it builds in."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32" if isinstance(value, float) else "constexpr"


def _is_one(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value == 1


def aligned(kernel: Any, values: dict[str, Any], signature: dict[str, str]) -> dict[Any, Any]:
    """What Triton is told of a launch on a card: allocations begin at multiples of 16 bytes, and
    which integers are multiples of 16. Copies are pipelined by it, in more shared memory."""
    found = {}
    for index, name in enumerate(kernel.arg_names):
        is_even = isinstance(values[name], int) and values[name] % 16 == 0
        if signature[name].startswith("*") or (signature[name] in ("i32", "i64") and is_even):
            found[index,] = [["tt.divisibility", 16]]
    return found


class Compiler:
    """Stands in for `launch.launch`."""

    def __init__(self, capabilities: list[int], once: bool) -> None:
        self.capabilities = capabilities
        self.once = once
        self.seen: set[str] = set()
        self.module = ""

    def __call__(self, kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        constants = {p.name for p in kernel.params if p.is_constexpr}
        fixed_ints = {p.name for p in kernel.params if not p.do_not_specialize}
        values = dict(zip(kernel.arg_names, args, strict=False))
        values |= {k: v for k, v in options.items() if k not in LAUNCH_OPTIONS}
        assert set(values) == set(kernel.arg_names), set(values) ^ set(kernel.arg_names)
        signature = {
            name: "constexpr"
            if name in constants or (name in fixed_ints and _is_one(values[name]))
            else type_of(values[name])
            for name in kernel.arg_names
        }
        fixed = {name: values[name] for name, kind in signature.items() if kind == "constexpr"}
        flags = {name: options[name] for name in LAUNCH_OPTIONS if name in options}
        facts = {"kernel": kernel.fn.__name__, **{k: str(v) for k, v in (fixed | flags).items()}}
        key = kernel.fn.__name__ if self.once else json.dumps([facts, signature])
        if key in self.seen:
            return
        self.seen.add(key)
        source = ASTSource(
            fn=kernel,
            signature=signature,
            constexprs=fixed,
            attrs=aligned(kernel, values, signature),
        )
        options = {**flags, "enable_fp_fusion": True}
        for capability in self.capabilities:
            target = GPUTarget("cuda", capability, 32)
            shared = triton.compile(source, target=target, options=options).metadata.shared
            found = {"module": self.module, "capability": capability, "shared": shared}
            print(json.dumps(facts | found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("capabilities", type=int, nargs="+")
    parser.add_argument("--once", action="store_true")
    args = parser.parse_args()
    door.launch = compiler = Compiler(args.capabilities, args.once)
    for path in sorted(Path(__file__).parent.glob("gpu_cases_*.py")):
        compiler.module = path.stem
        for case in importlib.import_module(path.stem).cases(torch.device("cpu")):
            case.run()


if __name__ == "__main__":
    main()
