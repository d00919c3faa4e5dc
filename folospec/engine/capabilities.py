"""Reports what this installation can run: the facts behind `folospec info`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from folospec.attention.base import (
    BLOCK_STEPS,
    choose_backend,
    considered,
    default_device,
    known_backends,
    passed_over,
)
from folospec.config import EngineConfig
from folospec.kernels import native, targets
from folospec.models.loader import BUNDLED, resolve_model
from folospec.spec.drafters import base as drafters

COMMON_HEAD_SIZES = (64, 128)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Known names, and what stands against each.

    `cpu_flags` is what the processor can do, as /proc/cpuinfo names it.
    `attention_backends` maps names to the reason why one cannot run here, None if it can;
    `auto_attention_backend` is the one that "auto" takes on `device`, for a model of common type
    and heads with blocks of the default `block_size`, out of those `considered`, best first;
    `passed_over` says why it takes none of those before. `attention_block_steps` says what the
    block size must be a multiple of, where a backend has such a limit. `no_native_kernels` says why
    the native CPU kernels do not run, None if they do; then `kernel_instructions` is what they were
    built for, `kernel_origin` whether they were "prebuilt" or "compiled" here, and `kernel_library`
    their file. `bundled_models` maps names to folders, None where the checkpoint is not installed.
    """

    cpu_flags: frozenset[str]
    attention_backends: dict[str, str | None]
    auto_attention_backend: str
    considered: tuple[str, ...]
    passed_over: dict[str, str]
    attention_block_steps: dict[str, int]
    device: str
    block_size: int
    no_native_kernels: str | None
    kernel_instructions: str | None
    kernel_origin: str | None
    kernel_library: str | None
    drafters: tuple[str, ...]
    bundled_models: dict[str, str | None]


def capabilities() -> Capabilities:
    """Ask every registry what it has, without loading a model."""
    library = native.load()
    device = default_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    block_size = _default("block_size")
    asked = (dtype, COMMON_HEAD_SIZES, block_size, device)
    return Capabilities(
        cpu_flags=targets.cpu_flags(),
        attention_backends=known_backends(),
        auto_attention_backend=choose_backend("auto", *asked).name,
        considered=tuple(considered(device)),
        passed_over=passed_over(*asked),
        attention_block_steps=dict(BLOCK_STEPS),
        device=str(device),
        block_size=block_size,
        no_native_kernels=native.why_not(),
        kernel_instructions=None if library is None else library.instructions,
        kernel_origin=None if library is None else library.origin,
        kernel_library=None if library is None else str(library.path),
        drafters=drafters.known_drafters(),
        bundled_models={name: _folder(name) for name in BUNDLED},
    )


def _default(name: str) -> Any:
    return next(field.default for field in fields(EngineConfig) if field.name == name)


def _folder(name: str) -> str | None:
    try:
        return str(resolve_model(name))
    except ValueError:
        return None
