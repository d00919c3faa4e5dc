"""Runs one Llama-family decoder on flat rows: Llama 2 and 3, Mistral, Qwen2 and Qwen3.

The weights of query, key and value are one matrix, and so are gate and up: a row's layer is four
matrix products. `destinations` says which checkpoint tensor belongs where in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from folospec.attention.base import AttentionBackend, LayerKV
from folospec.attention.metadata import AttentionMetadata
from folospec.attention.native_cpu import NativeAttention
from folospec.attention.paged import PagedBackend
from folospec.kernels.torch_ops import Int8Weight, linear, rms_norm, rotary
from folospec.models import rope
from folospec.models.base import ModelSpec, as_logits, check_aux_layers
from folospec.models.decoder_options import DecoderOptions
from folospec.models.native_decoder import COLUMN_STEP, NativeDecoder
from folospec.models.weight_memory import WeightMemory

if TYPE_CHECKING:
    from folospec.models.gpu_decoder import GpuDecoder

Weight = Tensor | Int8Weight


@dataclass(slots=True)
class DecoderLayer:
    """The weights of one layer. Hq, Hkv: query and KV heads of D; H: hidden; I: intermediate.

    A view of the model may have int8 copies of the four matrices; of a quantized model they are
    torchao's tensors (`quantization`).
    """

    input_norm: Tensor
    """[H]"""
    qkv: Weight
    """[(Hq + 2 Hkv) D, H], query heads first."""
    qkv_bias: Tensor | None
    qk_norm: tuple[Tensor, Tensor] | None
    """[D] each: the norms of every query and every key head (Qwen3)."""
    output: Weight
    """[H, Hq D]"""
    output_bias: Tensor | None
    post_norm: Tensor
    """[H]"""
    gate_up: Weight
    """[2 I, H], gate first."""
    gate_up_bias: Tensor | None
    down: Weight
    """[H, I]"""
    down_bias: Tensor | None


class Decoder:
    """The model; weights are uninitialised until the loader has filled `destinations()`.

    `skip_attention` and `skip_mlp` are the layers whose half is left out. There are none but in a
    view of the model (`self_draft`).

    Args:
        options: what the checkpoint's config says.
        spec: the model's facts; its dtype is that of the weights.
        attention: how rows see the KV.
        device: where the weights go.
    """

    def __init__(
        self,
        options: DecoderOptions,
        spec: ModelSpec,
        attention: AttentionBackend,
        device: torch.device,
    ) -> None:
        self.config = spec
        self.device = device
        self.attention = attention
        self.num_heads, self.num_kv_heads = options.num_heads, options.num_kv_heads
        self.head_size, self.inner_size = options.head_size, options.inner_size
        self.eps = options.eps
        self.activation = options.activation
        self.has_silu = options.hidden_act == "silu"
        self.inverse_frequencies = options.frequencies.to(device)
        self.rope_scaling = options.rope_scaling
        self._memory = WeightMemory(device)
        self.embedding = self._empty(spec.vocab_size, spec.hidden_size)
        self.lm_head: Weight = (
            self.embedding if options.ties else self._empty(spec.vocab_size, spec.hidden_size)
        )
        self.final_norm = self._empty(spec.hidden_size)
        self.layers = [self._layer(options) for _ in range(spec.num_layers)]
        self.skip_attention: frozenset[int] = frozenset()
        self.skip_mlp: frozenset[int] = frozenset()
        self.runs_natively = (
            isinstance(attention, NativeAttention)
            and self.has_silu
            and spec.hidden_size % COLUMN_STEP == self.inner_size % COLUMN_STEP == 0
        )
        self.quantization: str | None = None
        """What the layers' matrices were rounded to after loading. Such a matrix has no address
        that a kernel could read it from."""
        self.native: NativeDecoder | None = None
        """Runs the whole pass in native code; made at the first, when the weights are there."""
        self.torch_products_from: int | None = None
        """Where the model runs natively: passes of at least so many rows run with torch's products
        all the same, between native attention; None: no pass does."""
        self.runs_on_gpu = isinstance(attention, PagedBackend) and spec.dtype != torch.float64
        self.gpu: GpuDecoder | None = None
        """Runs the pass with kernels of a GPU; made at the first, too."""
        self.angles: tuple[Tensor, Tensor] | None = None
        """Cosines and sines of every position, for those kernels; views share them."""
        if self.runs_on_gpu:
            self.angles = rope.tables(
                spec.max_model_len, self.inverse_frequencies, self.rope_scaling
            )

    def forward(
        self,
        input_ids: Tensor,
        metadata: AttentionMetadata,
        kv: Sequence[LayerKV],
        aux_layers: tuple[int, ...] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """See `Model.forward`."""
        if aux_layers:
            check_aux_layers(aux_layers, self.config.num_layers)
        if (fast := self._fast(input_ids.shape[0])) is not None:
            return fast.forward(input_ids, metadata, kv, aux_layers)
        stream = functional.embedding(input_ids, self.embedding)
        angles = rope.cos_sin(
            metadata.positions, self.inverse_frequencies, self.rope_scaling, stream.dtype
        )
        aux_hidden_states = {}
        depth = self.depth()
        for index in range(depth):
            if index in aux_layers:
                aux_hidden_states[index] = stream
            if index not in self.skip_attention:
                stream = stream + self._attend(index, stream, angles, metadata, kv[index])
            if index not in self.skip_mlp:
                stream = stream + self._mlp(index, stream)
        aux_hidden_states.update((layer, stream) for layer in aux_layers if layer >= depth)
        if self.runs_natively:  # the streams of other passes are float32
            aux_hidden_states = {layer: each.float() for layer, each in aux_hidden_states.items()}
        return rms_norm(stream, self.final_norm, self.eps), aux_hidden_states

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Model.logits`."""
        if (fast := self._fast(hidden.shape[0])) is not None:
            return fast.logits(hidden)
        return as_logits(linear(hidden, self.lm_head))

    def destinations(self) -> dict[str, Tensor]:
        """Where each tensor of the checkpoint goes: its name -> the view of the weights to fill."""
        named = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.final_norm}
        if self.lm_head is not self.embedding:
            named["lm_head.weight"] = _loaded(self.lm_head)
        for index, layer in enumerate(self.layers):
            for name, tensor in self._layer_destinations(layer).items():
                named[f"model.layers.{index}.{name}"] = tensor
        return named

    @property
    def deterministic(self) -> bool:
        """See `Model.deterministic`; torch's products sum by the number of rows, and on a GPU those
        of rounded weights, a model's or a view's, are torch's."""
        is_rounded = self.quantization is not None or isinstance(self.lm_head, Int8Weight)
        is_native = self.runs_natively and self.torch_products_from is None
        return is_native or (self.runs_on_gpu and self.attention.deterministic and not is_rounded)

    @property
    def supports_cuda_graphs(self) -> bool:
        """See `Model.supports_cuda_graphs`."""
        return isinstance(self.attention, PagedBackend) and self.attention.supports_cuda_graphs

    def native_for(self, num_rows: int) -> NativeDecoder | None:
        """What runs so many rows with native kernels; None where something else does."""
        fast = self._fast(num_rows)
        return fast if isinstance(fast, NativeDecoder) else None

    def _fast(self, num_rows: int) -> NativeDecoder | GpuDecoder | None:
        """Return what runs so many rows; None is torch."""
        least = self.torch_products_from
        if least is not None and num_rows >= least:
            return None
        return self._native() or self._gpu()

    def _native(self) -> NativeDecoder | None:
        if self.native is None and self.runs_natively:
            assert isinstance(self.attention, NativeAttention)
            self.native = NativeDecoder(self, self.attention)
        return self.native

    def _gpu(self) -> GpuDecoder | None:
        if self.gpu is None and self.runs_on_gpu:
            # Here, since it imports triton.
            from folospec.models.gpu_decoder import GpuDecoder

            assert isinstance(self.attention, PagedBackend)
            self.gpu = GpuDecoder(self, self.attention, self.attention.deterministic)
        return self.gpu

    def depth(self) -> int:
        """Layers up to the last that computes anything."""
        skipped = self.skip_attention & self.skip_mlp
        return max((i + 1 for i in range(self.config.num_layers) if i not in skipped), default=0)

    def _attend(
        self,
        index: int,
        stream: Tensor,
        angles: tuple[Tensor, Tensor],
        metadata: AttentionMetadata,
        kv: LayerKV,
    ) -> Tensor:
        layer = self.layers[index]
        normed = rms_norm(stream, layer.input_norm, self.eps)
        heads = linear(normed, layer.qkv, layer.qkv_bias)
        heads = heads.view(len(stream), -1, self.head_size)
        rotating = heads[:, : self.num_heads + self.num_kv_heads]
        if layer.qk_norm is not None:
            parts = rotating.split((self.num_heads, self.num_kv_heads), dim=1)
            normed_parts = zip(parts, layer.qk_norm, strict=True)
            rotating = torch.cat([rms_norm(part, norm, self.eps) for part, norm in normed_parts], 1)
        rotating = rotary(rotating, *angles)
        attended = self.attention.forward(
            rotating[:, : self.num_heads],
            rotating[:, self.num_heads :],
            heads[:, self.num_heads + self.num_kv_heads :],
            kv,
            metadata,
            scale=self.head_size**-0.5,
            sliding_window=self.config.sliding_windows[index],
        )
        return linear(attended.flatten(1), layer.output, layer.output_bias)

    def _mlp(self, index: int, stream: Tensor) -> Tensor:
        layer = self.layers[index]
        normed = rms_norm(stream, layer.post_norm, self.eps)
        gate, up = linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
        return linear(self.activation(gate) * up, layer.down, layer.down_bias)

    def _empty(self, *shape: int) -> Tensor:
        if len(shape) == 1:  # it stays, while matrices may be rounded and leave their room
            return torch.empty(shape, dtype=self.config.dtype, device=self.device)
        return self._memory.take(shape, self.config.dtype)

    def _layer(self, options: DecoderOptions) -> DecoderLayer:
        hidden, inner = self.config.hidden_size, self.inner_size
        queries, keys = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        qk_norm = (self._empty(self.head_size), self._empty(self.head_size))
        return DecoderLayer(
            input_norm=self._empty(hidden),
            qkv=self._empty(queries + 2 * keys, hidden),
            qkv_bias=self._empty(queries + 2 * keys) if options.has_qkv_bias else None,
            qk_norm=qk_norm if options.has_qk_norm else None,
            output=self._empty(hidden, queries),
            output_bias=self._empty(hidden) if options.has_output_bias else None,
            post_norm=self._empty(hidden),
            gate_up=self._empty(2 * inner, hidden),
            gate_up_bias=self._empty(2 * inner) if options.has_mlp_bias else None,
            down=self._empty(hidden, inner),
            down_bias=self._empty(hidden) if options.has_mlp_bias else None,
        )

    def _layer_destinations(self, layer: DecoderLayer) -> dict[str, Tensor]:
        queries, keys = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        hidden, inner = self.config.hidden_size, self.inner_size
        named = {
            "input_layernorm.weight": layer.input_norm,
            "post_attention_layernorm.weight": layer.post_norm,
        }
        fused: list[tuple[tuple[str, ...], tuple[int, ...], Weight, Tensor | None]] = [
            (
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                (queries, keys, keys),
                layer.qkv,
                layer.qkv_bias,
            ),
            (("self_attn.o_proj",), (hidden,), layer.output, layer.output_bias),
            (("mlp.gate_proj", "mlp.up_proj"), (inner, inner), layer.gate_up, layer.gate_up_bias),
            (("mlp.down_proj",), (hidden,), layer.down, layer.down_bias),
        ]
        for names, sizes, weight, bias in fused:
            for name, part in zip(names, _loaded(weight).split(sizes), strict=True):
                named[f"{name}.weight"] = part
            if bias is not None:
                for name, part in zip(names, bias.split(sizes), strict=True):
                    named[f"{name}.bias"] = part
        if layer.qk_norm is not None:
            named["self_attn.q_norm.weight"], named["self_attn.k_norm.weight"] = layer.qk_norm
        return named


def _loaded(weight: Weight) -> Tensor:
    assert isinstance(weight, Tensor), "a checkpoint goes into the model itself, not into a view"
    return weight
