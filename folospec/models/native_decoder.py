"""The decoder's pass as one call of the native CPU kernels, over the decoder's own weights.

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
    """

    def __init__(self, decoder: Decoder, attention: native_cpu.NativeAttention) -> None:
        self.library = attention.library
        self.decoder = decoder
        self._kept: list[Tensor] = []
        spec = decoder.config
        windows = dict.fromkeys(w for w in spec.sliding_windows if w is not None)
        self.windows = list(windows)
        layers = (native.Layer * spec.num_layers)()
        for index, layer in enumerate(decoder.layers):
            layers[index] = self._layer(index, layer)
        self.layers = layers
        self.model = native.ModelStruct(
            spec.num_layers,
            spec.hidden_size,
            decoder.inner_size,
            decoder.eps,
            decoder.embedding.data_ptr(),
            native.FORMATS[decoder.embedding.dtype],
            self._wide(decoder.final_norm),
            layers,
        )
        self.lm_head = native.matrix(decoder.lm_head)
        self._no_streams = (ctypes.c_void_p * (spec.num_layers + 1))()
        self._kv: Sequence[LayerKV] | None = None
        self._scratch = native.floats(0)
        self._cos = self._sin = native.floats(0, decoder.head_size // 2)

    def forward(
        self,
        input_ids: Tensor,
        metadata: AttentionMetadata,
        kv: Sequence[LayerKV],
        taps: tuple[int, ...],
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """See `Model.forward`; hidden states and taps are float32."""
        decoder = self.decoder
        rows, hidden_size = metadata.num_tokens, decoder.config.hidden_size
        self._point_at(kv)
        step = native_cpu.describe(
            metadata, decoder.num_heads, kv[0], scale=decoder.head_size**-0.5
        )
        window_first = self._window_first(metadata)
        cos, sin = self._angles(int(metadata.positions.numpy().max()) + 1)
        hidden = native.floats(rows, hidden_size)
        tapped = {tap: native.floats(rows, hidden_size) for tap in taps}
        streams = self._no_streams
        if taps:
            streams = type(streams)()
            for tap, stream in tapped.items():
                streams[tap] = stream.data_ptr()
        call = native.Pass(
            step,
            input_ids.data_ptr(),
            metadata.positions.data_ptr(),
            metadata.slot_mapping.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            None if window_first is None else native_cpu.address(window_first),
            hidden.data_ptr(),
            ctypes.addressof(streams),
            None,
            torch.get_num_threads(),
        )
        call.scratch = self._room(call)
        self.library.forward(ctypes.byref(self.model), ctypes.byref(call))
        return hidden, tapped

    def _window_first(self, metadata: AttentionMetadata) -> NDArray[np.int32] | None:
        """[windows, rows]: the first key that each row sees in a layer of each window."""
        if not self.windows:
            return None
        plan = native_cpu.plan_step(metadata)
        return np.concatenate([native_cpu.first_keys(plan, window) for window in self.windows])

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Model.logits`."""
        return self.library.apply_linear(hidden, self.lm_head, self.lm_head.out_size)

    def _layer(self, index: int, layer: DecoderLayer) -> native.Layer:
        decoder = self.decoder
        window = decoder.config.sliding_windows[index]
        query_norm, key_norm = layer.qk_norm or (None, None)
        return native.Layer(
            self._wide(layer.input_norm),
            self._wide(query_norm),
            self._wide(key_norm),
            self._wide(layer.post_norm),
            self._matrix(layer.qkv, layer.qkv_bias),
            self._matrix(layer.output, layer.output_bias),
            self._matrix(layer.gate_up, layer.gate_up_bias),
            self._matrix(layer.down, layer.down_bias),
            native.Pages(),
            0 if window is None else self.windows.index(window) + 1,
            int(index in decoder.skip_attention),
            int(index in decoder.skip_mlp),
        )

    def _matrix(self, weight: native.Weight, bias: Tensor | None) -> native.Matrix:
        return native.matrix(weight, None if bias is None else self._keep(bias))

    def _wide(self, vector: Tensor | None) -> int | None:
        return None if vector is None else self._keep(vector).data_ptr()

    def _keep(self, vector: Tensor) -> Tensor:
        self._kept.append(vector.float().contiguous())
        return self._kept[-1]

    def _point_at(self, kv: Sequence[LayerKV]) -> None:
        if kv is not self._kv:
            for layer, pages in zip(self.layers, kv, strict=True):
                layer.pages = native.Pages(pages.key.data_ptr(), pages.value.data_ptr())
            self._kv = kv

    def _room(self, call: native.Pass) -> int:
        wanted = self.library.scratch_floats(ctypes.byref(self.model), ctypes.byref(call))
        if self._scratch.numel() < wanted:
            self._scratch = native.floats(wanted)
        return self._scratch.data_ptr()

    def _angles(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions below `length` at least; a table that has grown repeats
        itself to the bit."""
        have = len(self._cos)
        if have < length:
            decoder = self.decoder
            self._cos, self._sin = rope.tables(
                max(length, 2 * have, 256), decoder.inverse_frequencies, decoder.rope_scaling
            )
        return self._cos, self._sin
