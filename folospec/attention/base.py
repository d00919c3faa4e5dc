"""Defines what an attention backend is, and registers the backends by name.

To know a backend imports nothing of it: a factory imports it when it is asked for, and only where
there is a device for it.
"""

from __future__ import annotations

import importlib.metadata
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from folospec.attention.metadata import AttentionMetadata
from folospec.kernels.gpu import launch

AUTO_ORDER = ("native", "triton", "flash_attn", "xformers", "torch")
"""What "auto" tries, in this order; torch runs everywhere."""
MADE_FOR = {"native": "cpu", "triton": "cuda", "flash_attn": "cuda", "xformers": "cuda"}
"""The type of device on which "auto" considers a backend, so that none is made in vain. Kernels
that are interpreted run on a CPU too, but for tests."""
BLOCK_STEPS = {"flash_attn": 256, "xformers": 64}
"""What `block_size` must be a multiple of, where a library's kernels read pages."""
OLDEST = {"flash-attn": (2, 6), "xformers": (0, 0, 28)}
"""Versions of libraries before which a backend's calls are not there, or mean something else."""


class LayerKV(NamedTuple):
    """One layer's paged KV; slot = block id * block size + offset."""

    key: Tensor
    """[num_slots, num_kv_heads, head_size]"""
    value: Tensor
    """[num_slots, num_kv_heads, head_size]"""


class AttentionBackend(ABC):
    """How rows see paged KV."""

    name: str
    devices: tuple[str, ...] = ("cpu", "cuda")
    deterministic: bool = False
    """Whether a row's bits are the same whatever rows run with it, and wherever a tree put its
    ancestors."""
    deterministic_alone: bool = False
    """Whether a row's bits are the same where every row runs in a step of its own."""
    converts_kv: bool = True
    """Whether the KV may be of another type than the model."""

    @abstractmethod
    def supports(self, dtype: torch.dtype, head_size: int, block_size: int) -> str | None:
        """Say why this backend cannot serve such a model here; None if it can."""

    @abstractmethod
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv: LayerKV,
        metadata: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Write the step's keys and values at their slots, then let every row see its keys.

        Args:
            query: [num_tokens, num_heads, head_size]; query head h reads KV head
                h // (num_heads / num_kv_heads).
            key, value: [num_tokens, num_kv_heads, head_size], of the query's type.
            kv: the layer's KV, written in place; where its type is another, keys and values are
                rounded to it, a row's own ones too. metadata: the step's rows. scale: factor of
                the scores. sliding_window: a row at position i sees positions above i -
                sliding_window only. softcap: scores become softcap * tanh(scores / softcap) before
                the mask.

        Returns:
            [num_tokens, num_heads, head_size].
        """


Factory = Callable[[bool], AttentionBackend]
_FACTORIES: dict[str, Factory] = {}


def register(name: str, factory: Factory) -> None:
    """Make a backend known by `name`. The factory is told whether bits must not depend on the
    batch, which not every backend can help; it raises ImportError or RuntimeError, in words, where
    it cannot run."""
    _FACTORIES[name] = factory


def get_backend(name: str = "auto") -> AttentionBackend:
    """Make the backend `name`; "auto" takes what is fastest here, on a GPU if there is one.

    Raises:
        ValueError: the name is unknown, or the backend cannot run here.
    """
    if name == "auto":
        return _choose(torch.float32, (), 1, default_device(), False)[0]
    return _make(name, False)


def choose_backend(
    name: str,
    dtype: torch.dtype,
    head_sizes: Iterable[int],
    block_size: int,
    device: torch.device,
    deterministic: bool = False,
) -> AttentionBackend:
    """Make the backend `name` for such a model; "auto" takes the fastest that can serve it.

    Args:
        deterministic: take only what can promise that a row's bits do not depend on the batch, be
            it by running every row in a step of its own.

    Raises:
        ValueError: the name is unknown, or the backend cannot serve this.
    """
    if name == "auto":
        return _choose(dtype, head_sizes, block_size, device, deterministic)[0]
    backend = _make(name, deterministic)
    if reason := refusal(backend, dtype, head_sizes, block_size, device, deterministic):
        raise ValueError(f"attention_backend {name!r} cannot serve this: {reason}")
    return backend


def considered(device: torch.device) -> list[str]:
    """What "auto" has to choose from on `device`, best first."""
    return [name for name in AUTO_ORDER if MADE_FOR.get(name, device.type) == device.type]


def passed_over(
    dtype: torch.dtype, head_sizes: Iterable[int], block_size: int, device: torch.device
) -> dict[str, str]:
    """Why "auto" takes none of those `considered` before the one it takes, by name."""
    return _choose(dtype, head_sizes, block_size, device, False)[1]


def refusal(
    backend: AttentionBackend,
    dtype: torch.dtype,
    head_sizes: Iterable[int],
    block_size: int,
    device: torch.device,
    deterministic: bool = False,
) -> str | None:
    """Say why a backend cannot serve such a model; None if it can."""
    if device.type not in backend.devices:
        return f"it runs on {' or '.join(backend.devices)}, and the device is {device}"
    if deterministic and not (backend.deterministic or backend.deterministic_alone):
        return (
            "deterministic must not be True: its sums depend on how the batch splits long contexts "
            "and on which keys are merged by log-sum-exp"
        )
    reasons = (backend.supports(dtype, size, block_size) for size in sorted(set(head_sizes)))
    return next((reason for reason in reasons if reason is not None), None)


def known_backends() -> dict[str, str | None]:
    """Every known backend, with the reason why it cannot run here, or None if it can."""
    reasons: dict[str, str | None] = {}
    for name, factory in _FACTORIES.items():
        try:
            factory(False)
            reasons[name] = None
        except (ImportError, RuntimeError) as error:
            reasons[name] = str(error)
    return reasons


def default_device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _make(name: str, deterministic: bool) -> AttentionBackend:
    if name not in _FACTORIES:
        raise ValueError(
            f"attention_backend must be one of auto, {', '.join(_FACTORIES)}, got {name!r}"
        )
    try:
        return _FACTORIES[name](deterministic)
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"attention_backend {name!r} cannot run here: {error}") from error


def _choose(
    dtype: torch.dtype,
    head_sizes: Iterable[int],
    block_size: int,
    device: torch.device,
    deterministic: bool,
) -> tuple[AttentionBackend, dict[str, str]]:
    """What "auto" takes, and why it takes none before it."""
    passed: dict[str, str] = {}
    sizes = set(head_sizes)
    for name in considered(device):
        try:
            backend = _FACTORIES[name](deterministic)
        except (ImportError, RuntimeError) as error:
            passed[name] = str(error)
            continue
        reason = refusal(backend, dtype, sizes, block_size, device, deterministic)
        if reason is None:
            return backend, passed
        passed[name] = reason
    raise ValueError(f"no attention backend can serve this: {passed}")


def _require_gpu(package: str) -> None:
    """Make sure that there is a card that Triton runs on, and a package; imports neither.

    Raises:
        RuntimeError: there is no such card.
        ImportError: the package is not installed, or too old.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device")
    if (reason := launch.why_not()) is not None:
        raise RuntimeError(reason)
    try:
        installed = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"{package} is not installed") from None
    numbers = tuple(int(n) for n in re.findall(r"\d+", installed))
    if numbers < OLDEST[package]:
        oldest = ".".join(map(str, OLDEST[package]))
        raise ImportError(f"{package} must be {oldest} or newer, got {installed}")


def _native_cpu(deterministic: bool) -> AttentionBackend:
    from folospec.attention.native_cpu import NativeAttention

    return NativeAttention()


def _triton(deterministic: bool) -> AttentionBackend:
    from folospec.attention.triton_paged import TritonAttention

    return TritonAttention(deterministic)


def _flash_attention(deterministic: bool) -> AttentionBackend:
    _require_gpu("flash-attn")
    from folospec.attention.flash_attention import FlashAttention

    return FlashAttention()


def _xformers(deterministic: bool) -> AttentionBackend:
    _require_gpu("xformers")
    from folospec.attention.xformers import XformersAttention

    return XformersAttention()


def _torch_reference(deterministic: bool) -> AttentionBackend:
    from folospec.attention.torch_reference import TorchAttention

    return TorchAttention()


register("native", _native_cpu)
register("triton", _triton)
register("flash_attn", _flash_attention)
register("xformers", _xformers)
register("torch", _torch_reference)
