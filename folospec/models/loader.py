"""Finds the checkpoint of a name and reads its tensors into a model."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from folospec.attention.base import AttentionBackend, choose_backend, refusal
from folospec.attention.torch_reference import TorchAttention
from folospec.models import rope
from folospec.models.base import Model, ModelSpec
from folospec.models.checkpoint import EMBEDDING, HEAD, Checkpoint, read_json
from folospec.models.decoder import Decoder
from folospec.models.decoder_options import (
    DecoderOptions,
    decoder_options,
    is_served,
    model_class,
)
from folospec.models.generation_config import read_eos_token_ids

BUNDLED = ("folospec-demo", "folospec-demo-draft")
BUNDLED_DRAFTS = {"folospec-demo": "folospec-demo-draft"}
"""The draft model that was made for a bundled target."""
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST = 10_000
"""No config has more layers or experts; to loop over more would take for ever."""


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
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer.encode("a")
    except Exception as error:  # whatever its files make of the libraries that read them
        raise ValueError(f"model {name!r} has no tokenizer that loads: {error}") from error
    return tokenizer


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
        dtype: of weights and activations; "auto" is the checkpoint's on a GPU, float32 on a CPU.
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
    folder, device = resolve_model(name), torch.device(device)
    hf_config = _read_config(name, folder, trust_remote_code)
    loaded_dtype = resolve_dtype(dtype, hf_config, device)
    served = is_served(hf_config) and not runs_own_code(hf_config, trust_remote_code)
    what = architecture(hf_config)
    shown = what if served else f"{what} in transformers"
    _check_quantization(quantization, shown, loaded_dtype, device)

    def attention_of(spec: ModelSpec) -> AttentionBackend:
        return attention_for(spec, attention, block_size, device, deterministic)

    if served:
        checkpoint, length = Checkpoint(folder), _resolve_length(name, hf_config, max_model_len)
        model = _load_decoder(checkpoint, hf_config, loaded_dtype, length, attention_of, device)
        return _quantized(model, quantization)
    from folospec.models.transformers_backend import check_class, load_transformers_model

    check_class(hf_config, what, trust_remote_code)
    return load_transformers_model(
        Checkpoint(folder),
        hf_config,
        architecture=what,
        dtype=loaded_dtype,
        device=device,
        attention=attention_of,
        block_size=block_size,
        max_model_len=_resolve_length(name, hf_config, max_model_len),
        trust_remote_code=trust_remote_code,
    )


def _check_quantization(
    quantization: str | None, shown: str, dtype: torch.dtype, device: torch.device
) -> None:
    if quantization is not None:
        from folospec.models.quantization import check_quantization

        check_quantization(quantization, shown, dtype, device)


def _quantized(model: Decoder, quantization: str | None) -> Decoder:
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


def _load_decoder(
    checkpoint: Checkpoint,
    hf_config: Any,
    dtype: torch.dtype,
    max_model_len: int,
    attention: Callable[[ModelSpec], AttentionBackend],
    device: torch.device,
) -> Decoder:
    """Load what the Llama-family decoder serves. Shapes are compared before memory is taken."""
    if hf_config.num_hidden_layers > len(checkpoint.shapes):
        raise ValueError(
            f"{checkpoint.folder} lacks the tensors of {hf_config.num_hidden_layers} layers: its "
            f"files hold {len(checkpoint.shapes)} tensors"
        )
    ties = checkpoint.ties(hf_config.tie_word_embeddings)
    options = decoder_options(hf_config, max_model_len, ties)
    spec = ModelSpec(
        architecture=architecture(hf_config),
        vocab_size=hf_config.vocab_size,
        hidden_size=hf_config.hidden_size,
        num_layers=hf_config.num_hidden_layers,
        max_model_len=max_model_len,
        kv_shapes=((options.num_kv_heads, options.head_size),) * hf_config.num_hidden_layers,
        sliding_windows=options.sliding_windows,
        eos_token_ids=read_eos_token_ids(checkpoint.folder, hf_config, hf_config.vocab_size),
        dtype=dtype,
        early_exit_layer=options.early_exit_layer,
    )
    try:
        outline = Decoder(options, spec, TorchAttention(), torch.device("meta"))
    except RuntimeError as error:
        raise ValueError(f"{checkpoint.folder}: the config's sizes overflow: {error}") from error
    checkpoint.check(_places(outline, options, checkpoint))
    model = Decoder(options, spec, attention(spec), device)
    checkpoint.fill(_places(model, options, checkpoint), device, options.frequencies)
    return model


def _places(model: Decoder, options: DecoderOptions, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Where the tensors of the files go; one that is embedding and output matrix goes by either
    name, or by both."""
    places = model.destinations()
    if options.ties and HEAD in checkpoint.shapes:
        places[HEAD] = places[EMBEDDING]
        if EMBEDDING not in checkpoint.shapes:
            del places[EMBEDDING]
    return places


def architecture(hf_config: Any) -> str:
    """Name of the architecture of a config: transformers' class where the decoder serves it, else
    what the config says."""
    if is_served(hf_config):
        return str(model_class(hf_config))
    names = getattr(hf_config, "architectures", None)
    return str(names[0]) if isinstance(names, list) and names else type(hf_config).__name__


def runs_own_code(hf_config: Any, trust_remote_code: bool) -> bool:
    """Whether the checkpoint comes with a model class of its own that may be run."""
    return trust_remote_code and bool(getattr(hf_config, "auto_map", None))


def resolve_dtype(dtype: torch.dtype | str, hf_config: Any, device: torch.device) -> torch.dtype:
    """Turn "auto" or a name into a type.

    Raises:
        ValueError: it is none of float32, bfloat16, float16, float64.
    """
    if dtype == "auto":
        checkpoint = getattr(hf_config, "dtype", None) or torch.float32
        dtype = torch.float32 if device.type == "cpu" else checkpoint
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise ValueError(f"dtype must be auto or one of {names}, got {dtype!r}")
    return found


def _read_config(name: str, folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    found = read_json(folder / "config.json")
    _check_counts(found, folder / "config.json")
    if found.get("quantization_config") is not None:
        raise ValueError(f"model {name!r} is quantized, which is not supported")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # configs check themselves, each in its own way
        raise ValueError(
            f"model {name!r} has a config that transformers refuses: {error}"
        ) from error


def _check_counts(found: dict[str, Any], path: Path) -> None:
    """Refuse counts that transformers would loop over for ever before it looks at any tensor."""
    for key, value in found.items():
        if isinstance(value, dict):
            _check_counts(value, path)
        elif ("layer" in key or "expert" in key) and isinstance(value, int) and value > MOST:
            raise ValueError(f"{path}: {key} must be at most {MOST}, got {value}")


def _resolve_length(name: str, hf_config: Any, max_model_len: int | None) -> int:
    text_config = hf_config.get_text_config(decoder=True)
    rope.check_parameters(getattr(text_config, "rope_parameters", None))
    default = getattr(text_config, "max_position_embeddings", None)
    if default is None:
        if max_model_len is None:
            raise ValueError(f"model {name!r} states no max_position_embeddings; set max_model_len")
        return max_model_len
    if not isinstance(default, int) or default < 1:
        raise ValueError(f"max_position_embeddings of {name!r} must be at least 1, got {default!r}")
    if max_model_len is None:
        return default
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
        near = difflib.get_close_matches(name, BUNDLED, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"model {name!r} is neither a folder, nor a bundled model ({', '.join(BUNDLED)}), "
            f"nor a hub id that can be loaded: {_hub_reason(error)}{hint}"
        ) from error


def _hub_reason(error: Exception) -> str:
    """Why the hub gives no model, in a few words."""
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return "a hub id is NAME or OWNER/NAME"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "the hub is not reached, and there is no copy in the local cache"
    if isinstance(error, errors.GatedRepoError):
        return "access to this repository must be asked for, on the hub"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such repository, or it is private"
    return str(error).partition("\n")[0]
