"""Rounds the matrices of a decoder's layers to 8 bits, with torchao.

It is imported only where that is asked for.

    layer      input_norm   qkv   output   post_norm   gate_up   down
    rounded         .        x      x          .          x        x

Each becomes a tensor subclass that `torch.nn.functional.linear` knows: 8-bit values, and a float32
scale per output channel. Activations stay as they are, and products are in the model's type: a
product first widens its matrix, so this is for memory. For float8 torchao could round activations
too and multiply in 8 bits; but that takes bfloat16 only, and leaves a matrix whose sizes are no
multiples of 16 as it is, without a word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from folospec.config import QUANTIZATIONS
from folospec.models.decoder import Decoder, Weight
from folospec.models.decoder_options import SERVED

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP8_CAPABILITY = (8, 9)
"""The first compute capability with float8 in hardware."""


def check_quantization(
    method: str, architecture: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse what cannot be rounded, before any weight is read.

    Args:
        method: "int8" or "fp8".
        architecture: of the checkpoint.
        dtype: type of the model.
        device: where it will run.

    Raises:
        ValueError: the method is unknown, the architecture, type or device cannot have it, or
            torchao is not there.
    """
    if method not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {method!r}")
    if architecture not in SERVED:
        raise ValueError(f"quantization needs one of {', '.join(SERVED)}, got {architecture}")
    if dtype not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise ValueError(f"dtype must be one of {names} with quantization, got {dtype}")
    if method == "fp8":
        _check_fp8(device)
    _torchao()


def quantize(decoder: Decoder, method: str) -> None:
    """Round the layers of a loaded decoder in place, one matrix at a time: beside the model there
    is never more than one matrix and what torchao needs to round it.

    Kernels that read weights by their address cannot read these: the decoder's pass runs in torch.

    Raises:
        ValueError: torchao is not there.
    """
    torchao = _torchao()
    # Its settings for torch.compile, which is not used here, are for the whole process.
    if method == "int8":
        config = torchao.Int8WeightOnlyConfig(set_inductor_config=False)
    else:
        config = torchao.Float8WeightOnlyConfig(set_inductor_config=False)
    decoder.quantization = method
    decoder.runs_natively = False
    for layer in decoder.layers:
        layer.qkv = _rounded(layer.qkv, config)
        layer.output = _rounded(layer.output, config)
        layer.gate_up = _rounded(layer.gate_up, config)
        layer.down = _rounded(layer.down, config)
    if decoder.device.type == "cuda":
        torch.cuda.empty_cache()  # what the matrices took is free for the KV


def _rounded(weight: Weight, config: Any) -> Tensor:
    """torchao rounds modules, not tensors; this one lives for the call."""
    assert isinstance(weight, Tensor), "a view is not rounded"
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    _torchao().quantize_(linear, config)
    return linear.weight.detach()


def _check_fp8(device: torch.device) -> None:
    needed = "a CUDA device of compute capability {}.{} or more".format(*FP8_CAPABILITY)
    if device.type != "cuda":
        raise ValueError(f"quantization 'fp8' needs {needed}, got {device}")
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        has = "{}.{}".format(*capability)
        raise ValueError(f"quantization 'fp8' needs {needed}, and {device} has {has}")


def _torchao() -> Any:
    try:
        import torchao.quantization
    except ImportError as error:
        raise ValueError(
            f'quantization needs torchao: pip install "folospec[quantization]" ({error})'
        ) from error
    return torchao.quantization
