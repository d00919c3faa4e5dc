"""Cheaper copies of a target, to draft with: they share its weights where they can, and its KV."""

from __future__ import annotations

from folospec.models.base import Model
from folospec.models.decoder import Decoder


def view_of(
    model: Model,
    *,
    quantized: bool = False,
    skip_attention: frozenset[int] = frozenset(),
    skip_mlp: frozenset[int] = frozenset(),
) -> Model:
    """Return a model that computes less and has the same KV layout: layer i writes layer i's KV.

    Args:
        quantized: its linears are per-channel int8 copies.
        skip_attention, skip_mlp: layers whose attention or MLP is left out; what is left out of a
            layer adds nothing to the residual stream, and a skipped attention writes no KV.

    Raises:
        ValueError: the model is not served by the decoder, or a layer does not exist.
    """
    if not isinstance(model, Decoder):
        raise ValueError(
            f"{model.config.architecture} cannot draft for itself: only models that the "
            "Llama-family decoder serves can be copied"
        )
    raise NotImplementedError
