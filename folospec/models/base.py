"""Defines what the engine needs to know of a model, and what it calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from folospec.attention.base import AttentionBackend, LayerKV
from folospec.attention.metadata import AttentionMetadata


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The facts of a loaded model."""

    architecture: str
    """Name of the class that transformers has for the checkpoint's config, "LlamaForCausalLM"; for
    a checkpoint with its own Python, the name in its config."""
    vocab_size: int
    hidden_size: int
    """Width of what `Model.forward` returns."""
    num_layers: int
    max_model_len: int
    """Most tokens of a sequence; positions are below it."""
    kv_shapes: tuple[tuple[int, int], ...]
    """(num_kv_heads, head_size) of each layer, keys and values alike."""
    sliding_windows: tuple[int | None, ...]
    """Window of each layer in tokens; None: the layer sees everything."""
    eos_token_ids: tuple[int, ...]
    """Every token that ends an output, from the generation config where there is one."""
    dtype: torch.dtype
    """Type of weights and activations, and of KV unless the engine is told otherwise."""
    early_exit_layer: int | None = None
    """The model was trained to speak after this many layers too, through the same norm and head."""


class Model(Protocol):
    """A causal language model over flat rows and paged KV."""

    @property
    def config(self) -> ModelSpec:
        """The model's facts."""

    @property
    def attention(self) -> AttentionBackend:
        """How its rows see the KV."""

    @property
    def deterministic(self) -> bool:
        """Whether a row's bits are the same whatever runs beside it, and wherever a tree put its
        ancestors."""

    @property
    def supports_cuda_graphs(self) -> bool:
        """Whether its passes may be recorded as CUDA graphs: nothing in them is read on the host,
        and no shape depends on what tensors hold."""

    @property
    def device(self) -> torch.device:
        """Where the weights are, and the inputs must be."""

    def forward(
        self,
        input_ids: Tensor,
        metadata: AttentionMetadata,
        kv: Sequence[LayerKV],
        aux_layers: tuple[int, ...] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the step's rows and write their keys and values.

        Args:
            input_ids: int64 [N], one token per row.
            metadata: where the rows are and what they see.
            kv: one entry per layer, written in place. auxiliary hidden states: which residual
                streams to return; a in 0..num_layers is the stream before layer a, num_layers the
                stream before the final norm.

        Returns:
            Hidden states after the final norm [N, hidden_size], and the tapped streams by layer.

        Raises:
            ValueError: a auxiliary layer is out of range.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of chosen rows: [M, hidden_size] -> float32 [M, vocab_size].

        They are float64 where the model is.
        """


def check_aux_layers(aux_layers: tuple[int, ...], num_layers: int) -> None:
    """Raise ValueError if a auxiliary layer is not in 0..num_layers."""
    for layer in aux_layers:
        if not 0 <= layer <= num_layers:
            raise ValueError(f"a auxiliary layer must be a layer in 0..{num_layers}, got {layer}")


def as_logits(logits: Tensor) -> Tensor:
    """Widen to float32; float64 stays."""
    return logits if logits.dtype == torch.float64 else logits.float()
