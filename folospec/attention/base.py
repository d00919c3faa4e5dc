"""What an attention backend is, and the registry of the known ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
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
            key, value: [num_tokens, num_kv_heads, head_size], of the KV's type.
            kv: the layer's KV, written in place. metadata: the step's rows. scale: factor of
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
    chosen = "torch" if name == "auto" else name
    if chosen not in _FACTORIES:
        raise ValueError(
            f"attention_backend must be one of auto, {', '.join(_FACTORIES)}, got {name!r}"
        )
    try:
        return _FACTORIES[chosen]()
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"attention_backend {name!r} cannot run here: {error}") from error


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


register("torch", _torch_reference)
