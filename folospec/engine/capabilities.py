"""What this installation can run, as far as folospec itself knows: the facts behind `folospec
info`."""

from __future__ import annotations

from dataclasses import dataclass

from folospec.attention.base import get_backend, known_backends
from folospec.kernels import native
from folospec.kernels.build import cache_folder
from folospec.models.loader import BUNDLED, resolve_model
from folospec.spec.drafters import base as drafters


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Known names, and what stands against each.

    `attention_backends` maps names to the reason why one cannot run here, None if it can;
    `auto_attention_backend` is the one that "auto" takes. `no_native_kernels` says why the native
    CPU kernels do not run, None if they do; then `kernel_instructions` is what they were built for,
    and `kernel_cache` the folder that they are kept in. `bundled_models` maps names to folders,
    None where the checkpoint is not installed.
    """

    attention_backends: dict[str, str | None]
    auto_attention_backend: str
    no_native_kernels: str | None
    kernel_instructions: str | None
    kernel_cache: str | None
    drafters: tuple[str, ...]
    bundled_models: dict[str, str | None]


def capabilities() -> Capabilities:
    """Ask every registry what it has, without loading a model."""
    library = native.load()
    return Capabilities(
        attention_backends=known_backends(),
        auto_attention_backend=get_backend("auto").name,
        no_native_kernels=native.why_not(),
        kernel_instructions=None if library is None else library.instructions,
        kernel_cache=None if library is None else str(cache_folder() / "kernels"),
        drafters=drafters.known_drafters(),
        bundled_models={name: _folder(name) for name in BUNDLED},
    )


def _folder(name: str) -> str | None:
    try:
        return str(resolve_model(name))
    except ValueError:
        return None
