"""From a name to a model: where checkpoints are found, and how their tensors are read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from folospec.attention.base import AttentionBackend, choose_backend, refusal
from folospec.models import decoder, rope
from folospec.models.base import Model, ModelSpec

BUNDLED = ("folospec-demo", "folospec-demo-draft")
BUNDLED_DRAFTS = {"folospec-demo": "folospec-demo-draft"}
"""The draft model that was made for a bundled target."""
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DERIVED = ("rotary_emb.inv_freq",)
"""Tensors of old checkpoints that follow from the config."""


def resolve_model(name: str) -> Path:
    """Find the folder of a bundled name, a path or a hub id; what is on the hub is downloaded.

    Raises:
        ValueError: there is no such folder or repository, or it has no config.json.
    """
    if name in BUNDLED:
        folder = Path(str(resources.files("folospec"))) / "demo_models" / name
    elif Path(name).is_dir():
        folder = Path(name)
    else:
        folder = _from_hub(name)
    if not (folder / "config.json").is_file():
        raise ValueError(f"model {name!r}: there is no config.json in {folder}")
    return folder


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """Load the transformers tokenizer of a bundled name, a path or a hub id.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    folder = resolve_model(name)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model {name!r} has no tokenizer that loads: {error}") from error


def load_model(
    name: str,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    attention: AttentionBackend | str = "auto",
    block_size: int = 16,
    max_model_len: int | None = None,
    deterministic: bool = False,
    quantization: str | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """Load a causal language model.

    Args:
        name: bundled name, folder, or hub id of a safetensors checkpoint.
        dtype: type of weights and activations; "auto" is the checkpoint's on a GPU, float32 on a
            CPU.
        device: where the weights go.
        attention: how rows see paged KV, or a backend's name; "auto" is the fastest that can.
        block_size: slots per block of the KV, which a backend may have limits for.
        max_model_len: most tokens of a sequence. Default: the model's max_position_embeddings.
            Rope types that stretch (linear, dynamic, yarn) may be asked for more.
        deterministic: prefer what promises that a row's bits depend on the row alone, however slow.
        quantization: what the matrices of the layers are rounded to: None, "int8" or "fp8".
        trust_remote_code: run the checkpoint's own Python.

    Raises:
        ValueError: the model is unknown or unsupported, max_model_len exceeds it, it cannot be
            quantized, or a tensor is missing, misshapen or unexpected; the message names it.
    """
    folder = resolve_model(name)
    device = torch.device(device)
    hf_config = _read_config(name, folder, trust_remote_code)
    loaded_dtype = resolve_dtype(dtype, hf_config, device)
    if quantization is not None:
        from folospec.models.quantization import check_quantization

        check_quantization(quantization, architecture(hf_config), loaded_dtype, device)
    if architecture(hf_config) not in decoder.ARCHITECTURES:
        from folospec.models import transformers_backend

        def attention_of(spec: ModelSpec) -> AttentionBackend:
            return attention_for(spec, attention, block_size, device, deterministic)

        transformers_backend.check_class(hf_config, architecture(hf_config), trust_remote_code)
        length = _resolve_length(name, hf_config, max_model_len)
        return transformers_backend.load_transformers_model(
            folder,
            hf_config,
            architecture=architecture(hf_config),
            dtype=loaded_dtype,
            device=device,
            attention=attention_of,
            max_model_len=length,
            eos_token_ids=read_eos_token_ids(folder, hf_config),
            trust_remote_code=trust_remote_code,
        )
    length = _resolve_length(name, hf_config, max_model_len)
    spec = _decoder_spec(folder, hf_config, loaded_dtype, length)
    chosen = attention_for(spec, attention, block_size, device, deterministic)
    model = decoder.Decoder(hf_config, spec, chosen, device)
    fill(model.destinations(), folder, device, tied=hf_config.tie_word_embeddings)
    if quantization is not None:
        from folospec.models.quantization import quantize

        quantize(model, quantization)
    return model


def attention_for(
    spec: ModelSpec,
    wanted: AttentionBackend | str,
    block_size: int,
    device: torch.device,
    deterministic: bool = False,
) -> AttentionBackend:
    """The attention backend for a model, by name where none is given.

    Raises:
        ValueError: the name is unknown, or the backend cannot serve the model.
    """
    sizes = [size for _, size in spec.kv_shapes]
    if isinstance(wanted, str):
        return choose_backend(wanted, spec.dtype, sizes, block_size, device, deterministic)
    if reason := refusal(wanted, spec.dtype, sizes, block_size, device):
        raise ValueError(f"attention {wanted.name!r} cannot serve this: {reason}")
    return wanted


def fill(
    destinations: dict[str, Tensor], folder: Path, device: torch.device, *, tied: bool
) -> None:
    """Copy a checkpoint's tensors into place, one at a time, converting to each place's type.

    Args:
        destinations: name in the checkpoint -> tensor to fill.
        folder: holds model.safetensors, or shards with their index.
        device: where the destinations are.
        tied: the embedding is the output matrix too, so that an lm_head.weight is not needed.

    Raises:
        ValueError: a tensor is missing, misshapen, or not expected.
    """
    missing = dict(destinations)
    for tensor_name, tensor in read_tensors(folder, device):
        if tensor_name not in destinations:
            if tensor_name.endswith(DERIVED) or (tied and tensor_name == "lm_head.weight"):
                continue
            raise ValueError(f"{folder} has the tensor {tensor_name!r}, which the config has not")
        place = missing.pop(tensor_name)
        if tensor.shape != place.shape:
            raise ValueError(
                f"tensor {tensor_name!r} in {folder} must be {list(place.shape)} by the config, "
                f"got {list(tensor.shape)}"
            )
        place.copy_(tensor)
    if missing:
        raise ValueError(f"{folder} lacks the tensor {', '.join(map(repr, sorted(missing)))}")


def read_tensors(folder: Path, device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor]]:
    """Read the tensors of a checkpoint, each from its mapped file when its turn comes.

    A tensor for a GPU goes there as it lies in the file, and is converted there; from the host,
    torch would convert it into a second copy first. On a CPU it is the mapped file itself.

    Raises:
        ValueError: there is no safetensors file, or the index names one that is not there.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    elif (folder / "model.safetensors").is_file():
        files = ["model.safetensors"]
    else:
        raise ValueError(f"{folder} has no model.safetensors; other weight formats are not read")
    place = torch.device(device)
    target = _indexed(place) if place.type == "cuda" else "cpu"
    for file in files:
        with ExitStack() as stack:
            try:
                shard = stack.enter_context(safe_open(folder / file, "pt", device=target))
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{folder / file} cannot be read: {error}") from error
            for tensor_name in shard.keys():  # noqa: SIM118 (not a mapping)
                yield tensor_name, shard.get_tensor(tensor_name)


def _indexed(device: torch.device) -> str:
    """The name of a GPU with its number, which safetensors takes to be 0 where there is none."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return f"cuda:{index}"


def architecture(hf_config: Any) -> str:
    """Name of the architecture that a config asks for."""
    names = getattr(hf_config, "architectures", None) or [type(hf_config).__name__]
    return str(names[0])


def resolve_dtype(dtype: torch.dtype | str, hf_config: Any, device: torch.device) -> torch.dtype:
    """Turn "auto" or a name into a type.

    Raises:
        ValueError: it is none of float32, bfloat16, float16, float64.
    """
    if dtype == "auto":
        checkpoint = getattr(hf_config, "dtype", None) or torch.float32
        return torch.float32 if device.type == "cpu" else checkpoint
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise ValueError(f"dtype must be auto or one of {names}, got {dtype!r}")
    return found


def read_eos_token_ids(folder: Path, hf_config: Any) -> tuple[int, ...]:
    """Every token that ends an output: the generation config's, else the config's."""
    found = getattr(hf_config, "eos_token_id", None)
    path = folder / "generation_config.json"
    if path.is_file():
        found = json.loads(path.read_text()).get("eos_token_id", found)
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list) else (int(found),)


def _decoder_spec(
    folder: Path, hf_config: Any, dtype: torch.dtype, max_model_len: int
) -> ModelSpec:
    num_layers, heads = hf_config.num_hidden_layers, hf_config.num_attention_heads
    kv_heads = hf_config.num_key_value_heads or heads
    head_size = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads {heads} must be a multiple of {kv_heads} KV heads")
    return ModelSpec(
        architecture=architecture(hf_config),
        vocab_size=hf_config.vocab_size,
        hidden_size=hf_config.hidden_size,
        num_layers=num_layers,
        max_model_len=max_model_len,
        kv_shapes=((kv_heads, head_size),) * num_layers,
        sliding_windows=_windows(hf_config),
        eos_token_ids=read_eos_token_ids(folder, hf_config),
        dtype=dtype,
        early_exit_layer=getattr(hf_config, "early_exit_layer", None),
    )


def _windows(hf_config: Any) -> tuple[int | None, ...]:
    """Mistral's window holds in every layer; Qwen says layer by layer; Llama has none."""
    num_layers, window = hf_config.num_hidden_layers, getattr(hf_config, "sliding_window", None)
    if hf_config.model_type == "mistral":
        return (window,) * num_layers
    if hf_config.model_type == "llama":
        return (None,) * num_layers
    kinds = hf_config.layer_types
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _read_config(name: str, folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"model {name!r} has a config that transformers refuses: {error}"
        ) from error
    if getattr(hf_config, "quantization_config", None) is not None:
        raise ValueError(f"model {name!r} is quantized, which is not supported")
    return hf_config


def _resolve_length(name: str, hf_config: Any, max_model_len: int | None) -> int:
    text_config = hf_config.get_text_config(decoder=True)
    default = getattr(text_config, "max_position_embeddings", None)
    if default is None:
        if max_model_len is None:
            raise ValueError(f"model {name!r} states no max_position_embeddings; set max_model_len")
        return max_model_len
    if max_model_len is None:
        return int(default)
    limit = rope.position_limit(text_config)
    if not 1 <= max_model_len <= limit:
        raise ValueError(f"max_model_len must be in 1..{limit} for {name!r}, got {max_model_len}")
    return max_model_len


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"model {name!r} is neither a folder, nor one of {', '.join(BUNDLED)}, "
            f"nor a repository that could be downloaded: {error}"
        ) from error
