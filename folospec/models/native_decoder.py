"""Runs the decoder in one call of the native CPU kernels, over the decoder's own weights.

Nothing large is copied: the matrices stay where the loader put them, and only norms and biases,
which the kernels want in float32, are converted.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from folospec.attention import native_cpu
from folospec.attention.base import LayerKV
from folospec.attention.metadata import AttentionMetadata
from folospec.kernels import native
from folospec.kernels.checked import array_pointer, id_pointer, pointer
from folospec.models import rope

if TYPE_CHECKING:
    from folospec.models.decoder import Decoder, DecoderLayer

COLUMN_STEP = 32
"""What the widths of the stream and of the MLP must be multiples of."""


class NativeDecoder:
    """Runs one decoder, or one view of it.

    Args:
        decoder: loaded, on the CPU, with native attention, SiLU and widths in whole `COLUMN_STEP`s.
            Its weights must not move.

    Raises:
        ValueError: a weight is not of the shape that the decoder's sizes ask for, or not of a type
            that the kernels read.
    """

    def __init__(self, decoder: Decoder, attention: native_cpu.NativeAttention) -> None:
        self.library = attention.library
        self.decoder = decoder
        self._kept: list[Tensor] = []
        spec, hidden = decoder.config, decoder.config.hidden_size
        widths = (hidden, decoder.inner_size)
        if any(width % COLUMN_STEP for width in widths):
            raise ValueError(f"widths must be multiples of {COLUMN_STEP}, got {widths}")
        windows = dict.fromkeys(w for w in spec.sliding_windows if w is not None)
        self.windows = list(windows)
        layers = (native.Layer * spec.num_layers)()
        for index, layer in enumerate(decoder.layers):
            layers[index] = self._layer(index, layer)
        self.layers = layers
        embedding = self._matrix(decoder.embedding, None, (None, hidden))
        self.model = native.ModelStruct(
            spec.num_layers,
            spec.hidden_size,
            decoder.inner_size,
            decoder.eps,
            embedding.data,
            embedding.format,
            self._wide(decoder.final_norm, hidden),
            layers,
        )
        self.vocab_size = embedding.out_size
        self.lm_head = self._matrix(decoder.lm_head, None, (None, hidden))
        self._no_streams = (ctypes.c_void_p * (spec.num_layers + 1))()
        self._kv: Sequence[LayerKV] | None = None
        self._scratch = native.floats(0)
        self._cos = self._sin = native.floats(0, decoder.head_size // 2)

    def forward(
        self,
        input_ids: Tensor,
        metadata: AttentionMetadata,
        kv: Sequence[LayerKV],
        aux_layers: tuple[int, ...],
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """See `Model.forward`; hidden states and auxiliary hidden states are float32.

        Raises:
            ValueError: a token id has no embedding, a slot or a layer is not there, or an argument
                is of another type or size.
        """
        decoder = self.decoder
        rows, hidden_size = metadata.num_tokens, decoder.config.hidden_size
        self.point_at(kv)
        step = native_cpu.describe(
            metadata, decoder.num_heads, kv[0], scale=decoder.head_size**-0.5
        )
        window_first = self._window_first(metadata)
        ids = id_pointer("input_ids", input_ids, rows, self.vocab_size)
        cos, sin, num_positions = self.angles(int(metadata.positions.numpy().max()))
        positions = id_pointer("positions", metadata.positions, rows, num_positions)
        hidden = native.floats(rows, hidden_size)
        aux_hidden_states = {layer: native.floats(rows, hidden_size) for layer in aux_layers}
        streams = self._no_streams
        if aux_layers:
            streams = type(streams)()
            for layer, stream in aux_hidden_states.items():
                streams[layer] = stream.data_ptr()
        call = native.Pass(
            step,
            ids,
            positions,
            native_cpu.find_slots(metadata, kv[0].key.shape[0]),
            cos,
            sin,
            array_pointer("first keys", window_first, np.int32, (len(self.windows), rows)),
            hidden.data_ptr(),
            ctypes.addressof(streams),
            None,
            torch.get_num_threads(),
        )
        wanted = self.library.scratch_floats(ctypes.byref(self.model), ctypes.byref(call))
        call.scratch = self.room(wanted)
        self.library.forward(ctypes.byref(self.model), ctypes.byref(call))
        return hidden, aux_hidden_states

    def _window_first(self, metadata: AttentionMetadata) -> NDArray[np.int32]:
        """[windows, rows]: the first key that each row sees in a layer of each window."""
        if not self.windows:
            return np.empty((0, metadata.num_tokens), np.int32)
        plan = native_cpu.plan_step(metadata)
        return np.stack([native_cpu.first_keys(plan, window) for window in self.windows])

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Model.logits`."""
        return self.library.apply_linear(hidden, self.lm_head)

    def _layer(self, index: int, layer: DecoderLayer) -> native.Layer:
        decoder, size = self.decoder, self.decoder.head_size
        hidden, inner = decoder.config.hidden_size, decoder.inner_size
        queries, keys = decoder.num_heads * size, decoder.num_kv_heads * size
        window = decoder.config.sliding_windows[index]
        query_norm, key_norm = layer.qk_norm or (None, None)
        return native.Layer(
            self._wide(layer.input_norm, hidden),
            self._wide(query_norm, size),
            self._wide(key_norm, size),
            self._wide(layer.post_norm, hidden),
            self._matrix(layer.qkv, layer.qkv_bias, (queries + 2 * keys, hidden)),
            self._matrix(layer.output, layer.output_bias, (hidden, queries)),
            self._matrix(layer.gate_up, layer.gate_up_bias, (2 * inner, hidden)),
            self._matrix(layer.down, layer.down_bias, (hidden, inner)),
            native.Pages(),
            0 if window is None else self.windows.index(window) + 1,
            int(index in decoder.skip_attention),
            int(index in decoder.skip_mlp),
        )

    def _matrix(
        self, weight: native.Weight, bias: Tensor | None, shape: tuple[int | None, int]
    ) -> native.Matrix:
        made = native.matrix(weight, None if bias is None else self._keep(bias))
        if made.in_size != shape[1] or shape[0] not in (None, made.out_size):
            raise ValueError(f"a weight must be {shape}, got {(made.out_size, made.in_size)}")
        return made

    def _wide(self, vector: Tensor | None, size: int) -> int | None:
        if vector is None:
            return None
        return pointer("a norm", self._keep(vector), torch.float32, (size,))

    def _keep(self, vector: Tensor) -> Tensor:
        self._kept.append(vector.float().contiguous())
        return self._kept[-1]

    def point_at(self, kv: Sequence[LayerKV]) -> None:
        """Let the layers write their keys and values there.

        Raises:
            ValueError: a layer's are not of the shape that the decoder's sizes ask for.
        """
        if kv is not self._kv:
            shape = (len(kv[0].key), self.decoder.num_kv_heads, self.decoder.head_size)
            for layer, one in zip(self.layers, kv, strict=True):
                layer.pages = native_cpu.find_pages(one, shape, kv[0].key.dtype)
            self._kv = kv

    def room(self, wanted: int) -> int:
        """The address of so many floats of scratch, for one call."""
        if self._scratch.numel() < wanted:
            self._scratch = native.floats(wanted)
        return self._scratch.data_ptr()

    def angles(self, last: int) -> tuple[int, int, int]:
        """The addresses of cosines and sines, and of how many positions from 0 on they are: of
        `last` too. A table that has grown repeats itself to the bit."""
        have = self._cos.shape[0]
        if have <= last:
            decoder = self.decoder
            self._cos, self._sin = rope.tables(
                max(last + 1, 2 * have, 256), decoder.inverse_frequencies, decoder.rope_scaling
            )
            shape = (None, decoder.head_size // 2)
            for table in (self._cos, self._sin):
                pointer("angles", table, torch.float32, shape)
        return self._cos.data_ptr(), self._sin.data_ptr(), self._cos.shape[0]
