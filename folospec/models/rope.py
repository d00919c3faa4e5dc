"""Computes rotary frequencies, once per model.

`dynamic` and `longrope` change their frequencies with the length of the text. A served model keeps
keys in a cache and runs many lengths in one batch, so here the choice is made once, from
max_model_len: as transformers would choose for a sequence of exactly that length.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

STRETCHED = ("linear", "dynamic", "yarn")
"""Rope types whose factor says how far beyond the trained length positions may go."""


def frequencies(config: Any, head_size: int, max_model_len: int) -> tuple[Tensor, float]:
    """Choose the inverse frequencies of a model's heads.

    Args:
        config: a transformers config with one set of `rope_parameters`.
        head_size: every pair of the head's dimensions must rotate.
        max_model_len: the length that `dynamic` and `longrope` are set up for.

    Returns:
        float32 [head_size / 2], and the factor that cosines and sines are scaled by.

    Raises:
        ValueError: the rope type is unknown, its parameters are incomplete, or only part of a head
            rotates.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.rope_parameters or {}
    rope_type = parameters.get("rope_type", "default")
    if parameters.get("rope_theta") is None:
        raise ValueError(f"rope needs one rope_theta for all layers, got {parameters}")
    if rope_type == "default":
        exponents = torch.arange(0, head_size, 2, dtype=torch.float) / head_size
        inverse, scaling = 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    elif isinstance(rope_type, str) and rope_type in ROPE_INIT_FUNCTIONS:
        try:
            inverse, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, None, seq_len=max_model_len)
        except Exception as error:  # it takes its parameters to be there, and to be right
            raise ValueError(f"rope type {rope_type!r} needs {error}, got {parameters}") from error
    else:
        known = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
        raise ValueError(f"rope_type must be one of {known}, got {rope_type!r}")
    if not inverse.isfinite().all():
        raise ValueError(f"rope_parameters must give finite frequencies, got {parameters}")
    if inverse.shape != (head_size // 2,):
        raise ValueError(
            f"rope must rotate whole heads of {head_size}, got {len(inverse)} frequencies"
        )
    return inverse, float(scaling)


def check_parameters(parameters: Any) -> None:
    """Raise ValueError unless every number in a config's `rope_parameters` is finite, and every
    rope_theta and factor above 0."""
    if isinstance(parameters, dict):
        for name, value in parameters.items():
            if name in ("rope_theta", "factor"):
                ok = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
                if not ok and value is not None:
                    raise ValueError(f"{name} must be a number above 0, got {value!r}")
            check_parameters(value)
    elif isinstance(parameters, (list, tuple)):
        for value in parameters:
            check_parameters(value)
    elif isinstance(parameters, float) and not math.isfinite(parameters):
        raise ValueError(f"rope_parameters must be finite numbers, got {parameters!r}")


def position_limit(config: Any) -> int:
    """Most positions a model may be asked for: max_position_embeddings, times the rope factor.

    Only `linear`, `dynamic` and `yarn` stretch; the other types state their full length.
    """
    trained = int(config.max_position_embeddings)
    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters.get("rope_type") not in STRETCHED:
        return trained
    original = parameters.get("original_max_position_embeddings") or trained
    return max(trained, int(original * parameters.get("factor", 1.0)))


def cos_sin(
    positions: Tensor, inverse: Tensor, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each row's angles, [N, 1, head_size / 2] in `dtype`.

    The angles are float32, as in transformers, or float64 for a float64 model.
    """
    wide = torch.promote_types(dtype, torch.float32)
    angles = positions[:, None, None].to(wide) * inverse.to(wide)
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


def tables(length: int, inverse: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles of all positions below `length`, float32 [length,
    head_size / 2] on the device of `inverse`.

    They are made in float64, on the CPU: a longer table begins with a shorter one, to the bit, and
    no library of a device has a say in it.
    """
    positions = torch.arange(length, dtype=torch.float32)
    # As in transformers the angle itself is float32.
    angles = (positions[:, None] * inverse.float().cpu()).double()
    cos, sin = ((wave * scaling).float() for wave in (angles.cos(), angles.sin()))
    return cos.to(inverse.device), sin.to(inverse.device)
