"""Runs the decoder on a GPU: library products, with one kernel where torch has many.

    layer    norm | qkv product | norms, rotation, KV write | attention | output product
             norm | gate and up product | gate | down product

The residual stream is one tensor. What a half of a layer adds to it is added by the norm before the
next half, which reads it anyway. Nothing of the step is read on the host: a graph can capture it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from folospec.attention.base import LayerKV
from folospec.attention.metadata import AttentionMetadata
from folospec.attention.paged import PagedBackend
from folospec.kernels import torch_ops
from folospec.kernels.gpu import kv as gpu_kv
from folospec.kernels.gpu import linear as gpu_linear
from folospec.kernels.gpu import rows

if TYPE_CHECKING:
    from folospec.models.decoder import Decoder, Weight


class GpuDecoder:
    """Runs one decoder, or one view of it, over its own weights.

    Args:
        decoder: loaded, in float32, bfloat16 or float16.
        attention: how rows see keys that lie in the KV already.
        deterministic: products are `kernels.gpu.linear`'s, whose sums do not depend on the number
            of rows. Weights that a view or a library has rounded go the usual way even so.
    """

    def __init__(self, decoder: Decoder, attention: PagedBackend, deterministic: bool) -> None:
        self.decoder = decoder
        self.attention = attention
        self.deterministic = deterministic
        assert decoder.angles is not None
        self.cos, self.sin = decoder.angles

    def forward(
        self,
        input_ids: Tensor,
        metadata: AttentionMetadata,
        kv: Sequence[LayerKV],
        aux_layers: tuple[int, ...],
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """See `Model.forward`. Of `metadata`, itself reads `positions` and `slot_mapping` only."""
        decoder = self.decoder
        stream = functional.embedding(input_ids, decoder.embedding)
        delta: Tensor | None = None
        aux_hidden_states: dict[int, Tensor] = {}
        depth = decoder.depth()
        for index in range(depth):
            layer = decoder.layers[index]
            if index in aux_layers:
                stream, delta = _settled(stream, delta), None
                aux_hidden_states[index] = stream.clone()
            if index not in decoder.skip_attention:
                normed = rows.add_rms_norm(stream, delta, layer.input_norm, decoder.eps)
                delta = self._attend(index, normed, metadata, kv[index])
            if index not in decoder.skip_mlp:
                normed = rows.add_rms_norm(stream, delta, layer.post_norm, decoder.eps)
                delta = self._mlp(index, normed)
        normed = rows.add_rms_norm(stream, delta, decoder.final_norm, decoder.eps)
        aux_hidden_states.update((layer, stream) for layer in aux_layers if layer >= depth)
        return normed, aux_hidden_states

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Model.logits`; not rounded to the model's type before they are float32 where the
        product is `kernels.gpu.linear`'s."""
        return self._linear(hidden, self.decoder.lm_head, None, torch.float32).float()

    def _attend(
        self, index: int, normed: Tensor, metadata: AttentionMetadata, kv: LayerKV
    ) -> Tensor:
        decoder, layer = self.decoder, self.decoder.layers[index]
        heads = self._linear(normed, layer.qkv, layer.qkv_bias)
        query = gpu_kv.rotate_and_write(
            heads.view(len(heads), -1, decoder.head_size),
            decoder.num_heads,
            metadata.positions,
            metadata.slot_mapping,
            self.cos,
            self.sin,
            kv,
            layer.qk_norm,
            decoder.eps,
        )
        attended = self.attention.attend(
            query,
            kv,
            metadata,
            scale=decoder.head_size**-0.5,
            sliding_window=decoder.config.sliding_windows[index],
        )
        return self._linear(attended.flatten(1), layer.output, layer.output_bias)

    def _mlp(self, index: int, normed: Tensor) -> Tensor:
        decoder, layer = self.decoder, self.decoder.layers[index]
        gate_up = self._linear(normed, layer.gate_up, layer.gate_up_bias)
        if decoder.has_silu:
            inner = rows.silu_mul(gate_up)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            inner = decoder.activation(gate) * up
        return self._linear(inner, layer.down, layer.down_bias)

    def _linear(
        self,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """`out_dtype` is a wish that only the own product grants."""
        if self.deterministic and type(weight) is Tensor:
            return gpu_linear.linear(x, weight, bias, out_dtype=out_dtype)
        return torch_ops.linear(x, weight, bias)


def _settled(stream: Tensor, delta: Tensor | None) -> Tensor:
    """The stream with what the last half adds to it."""
    return stream if delta is None else stream.add_(delta)
