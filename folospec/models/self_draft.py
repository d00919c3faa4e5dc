"""Makes cheaper copies of a target to draft with: they share its KV, and weights where they can.

A view runs the decoder's own code with something left out of it. Per layer a half can go, or all
layers from some on; or the matrices are int8 copies. Everything else is the target's own tensors.

    layer       0     1     2     3     4     5            a = attention, m = MLP
    target      a m   a m   a m   a m   a m   a m   norm, output matrix
    skip sets   a m   . m   a m   a .   . .   a m   norm, output matrix
    exit at 3   a m   a m   a m                     norm, output matrix
"""

from __future__ import annotations

import copy
import dataclasses

from torch import Tensor

from folospec.kernels.torch_ops import Int8Weight, quantize_int8
from folospec.models.base import Model
from folospec.models.decoder import Decoder, DecoderLayer, Weight
from folospec.models.weight_memory import WeightMemory


def self_draft_of(
    model: Model,
    *,
    quantized: bool = False,
    skip_attention: frozenset[int] = frozenset(),
    skip_mlp: frozenset[int] = frozenset(),
) -> Model:
    """Return a model that computes less and has the same KV layout: layer i writes layer i's KV.

    It runs natively where the model can, whatever the number of rows.

    What it writes is not what the target would: another layer input, or rounded weights. So a row
    that a view has written is good for the view's own drafts only, until the target runs it too.

    Args:
        quantized: its linears are per-channel int8 copies, the output matrix among them: of a small
            model it is a large part, and rounding it costs next to nothing (accepted drafts of the
            bundled model: 0.989 with it, 0.998 without, greedy; 0.977 and 0.974 at temperature
            0.8). Where it is the embedding too, that stays as it is.
        skip_attention, skip_mlp: layers whose attention or MLP is left out; what is left out of a
            layer adds nothing to the residual stream, and a skipped attention writes no KV. An
            early exit after layer E leaves out both of layers E, E + 1, ...

    Raises:
        ValueError: the model is not served by the decoder, a layer does not exist, or an int8 copy
            is wanted of weights that are rounded already.
    """
    if not isinstance(model, Decoder):
        raise ValueError(
            f"{model.config.architecture} cannot draft for itself: only models that the "
            "Llama-family decoder serves can be copied"
        )
    if quantized and model.quantization is not None:
        raise ValueError(
            "the target cannot draft for itself with int8 weights: its own are rounded already, by "
            f"quantization={model.quantization!r}"
        )
    num_layers = model.config.num_layers
    for name, skipped in (("skip_attention", skip_attention), ("skip_mlp", skip_mlp)):
        for layer in sorted(skipped):
            if not 0 <= layer < num_layers:
                raise ValueError(f"{name} must have layers in 0..{num_layers - 1}, got {layer}")
    view = copy.copy(model)
    view.native = view.gpu = view.torch_products_from = None
    view.skip_attention, view.skip_mlp = frozenset(skip_attention), frozenset(skip_mlp)
    if quantized:
        unused = view.skip_attention & view.skip_mlp
        memory = WeightMemory(model.device)
        view.lm_head = _int8(model.lm_head, memory)
        view.layers = [
            layer if index in unused else _quantized(layer, memory)
            for index, layer in enumerate(model.layers)
        ]
    return view


def _quantized(layer: DecoderLayer, memory: WeightMemory) -> DecoderLayer:
    return dataclasses.replace(
        layer,
        qkv=_int8(layer.qkv, memory),
        output=_int8(layer.output, memory),
        gate_up=_int8(layer.gate_up, memory),
        down=_int8(layer.down, memory),
    )


def _int8(weight: Weight, memory: WeightMemory) -> Weight:
    if not isinstance(weight, Tensor):
        return weight
    rounded = quantize_int8(weight)
    values = memory.take(rounded.values.shape, rounded.values.dtype)
    return Int8Weight(values.copy_(rounded.values), rounded.scale)
