"""What an attention backend is, and the registry of the known ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from folospec.attention.metadata import AttentionMetadata


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


_FACTORIES: dict[str, Callable[[], AttentionBackend]] = {}


def register(name: str, factory: Callable[[], AttentionBackend]) -> None:
    """Make a backend known by `name`; the factory raises ImportError or RuntimeError, in words,
    where it cannot run."""
    _FACTORIES[name] = factory


def get_backend(name: str = "auto") -> AttentionBackend:
    """Make the backend `name`; "auto" takes what is fastest here.

    Raises:
        ValueError: the name is unknown, or the backend cannot run here.
    """
    if name == "auto":
        reasons = known_backends()
        return _FACTORIES[next(known for known in AUTO_ORDER if reasons[known] is None)]()
    if name not in _FACTORIES:
        raise ValueError(
            f"attention_backend must be one of auto, {', '.join(_FACTORIES)}, got {name!r}"
        )
    try:
        return _FACTORIES[name]()
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"attention_backend {name!r} cannot run here: {error}") from error


def choose_backend(
    name: str,
    dtype: torch.dtype,
    head_sizes: Iterable[int],
    block_size: int,
    device: torch.device,
) -> AttentionBackend:
    """Make the backend `name` for such a model; "auto" takes the fastest that can serve it.

    Raises:
        ValueError: the name is unknown, or the backend cannot serve this.
    """
    if name != "auto":
        backend = get_backend(name)
        if reason := refusal(backend, dtype, head_sizes, block_size, device):
            raise ValueError(f"attention_backend {name!r} cannot serve this: {reason}")
        return backend
    reasons = known_backends()
    sizes = set(head_sizes)
    backends = (_FACTORIES[known]() for known in AUTO_ORDER if reasons[known] is None)
    return next(b for b in backends if refusal(b, dtype, sizes, block_size, device) is None)


def refusal(
    backend: AttentionBackend,
    dtype: torch.dtype,
    head_sizes: Iterable[int],
    block_size: int,
    device: torch.device,
) -> str | None:
    """Say why a backend cannot serve such a model; None if it can."""
    if device.type not in backend.devices:
        return f"it runs on {' or '.join(backend.devices)}, and the device is {device}"
    reasons = (backend.supports(dtype, size, block_size) for size in sorted(set(head_sizes)))
    return next((reason for reason in reasons if reason is not None), None)


def known_backends() -> dict[str, str | None]:
    """Every known backend, with the reason why it cannot run here, or None if it can."""
    reasons: dict[str, str | None] = {}
    for name, factory in _FACTORIES.items():
        try:
            factory()
            reasons[name] = None
        except (ImportError, RuntimeError) as error:
            reasons[name] = str(error)
    return reasons


def _torch_reference() -> AttentionBackend:
    from folospec.attention.torch_reference import TorchAttention

    return TorchAttention()


def _native_cpu() -> AttentionBackend:
    from folospec.attention.native_cpu import NativeAttention

    return NativeAttention()


AUTO_ORDER = ("native", "torch")
"""What "auto" tries, in this order; torch runs everywhere."""
register("native", _native_cpu)
register("torch", _torch_reference)
