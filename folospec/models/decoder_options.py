"""Decides which checkpoints the Llama-family decoder serves, and with which options.

The one place where a transformers config is read for it. What counts is the model class that
transformers has for the config, not the names in it: InternLM3 and IQuest-Coder are other configs
of the Llama class. Whatever the class takes from its config is here or follows from these fields;
what it ignores (an `attention_bias` of Mistral's, say) is ignored here too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from folospec.models import rope

logger = logging.getLogger(__name__)

LARGEST_SIZE, LARGEST_HEAD = (1 << 31) - 1, 1 << 16
Windows = tuple[int | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderOptions:
    """What the decoder is built from."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    inner_size: int
    """Width of the MLP."""
    eps: float
    """Of every RMS norm."""
    hidden_act: str
    """A name in transformers' table of activations."""
    has_qkv_bias: bool
    has_output_bias: bool
    has_mlp_bias: bool
    has_qk_norm: bool
    """Every query and key head is normed before it rotates (Qwen3)."""
    sliding_windows: Windows
    """By layer; None: the layer sees everything."""
    ties: bool
    """Embedding and output matrix are one."""
    early_exit_layer: int | None
    """See `ModelSpec`."""
    frequencies: Tensor
    """Of the rotation, float32 [head_size / 2]."""
    rope_scaling: float
    """Factor of its cosines and sines."""

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """The MLP's activation."""
        from transformers.activations import ACT2FN

        return ACT2FN[self.hidden_act]


def model_class(hf_config: Any) -> str | None:
    """Name of the class that transformers runs a config with; None if it has none.

    It is looked up by name: to import the class would take seconds.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind, own = hf_config.model_type, type(hf_config)
    if own.__module__.partition(".")[0] != "transformers":
        return None
    if CONFIG_MAPPING_NAMES.get(kind) != own.__name__:
        return None
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)


def is_served(hf_config: Any) -> bool:
    """Whether the decoder computes what transformers' class computes for this config."""
    if getattr(hf_config, "is_heterogeneous", False):  # its layers differ in size
        return False
    return model_class(hf_config) in SERVED


def decoder_options(hf_config: Any, max_model_len: int, ties: bool) -> DecoderOptions:
    """Read the options of a config that `is_served`.

    Args:
        max_model_len: the length that rope types of a variable length are set up for.
        ties: whether embedding and output matrix are one, of which the files have a say.

    Raises:
        ValueError: a value is out of range; the message names it and what is allowed.
    """
    name = model_class(hf_config)
    assert name in SERVED, name
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    for field in (*sizes, "intermediate_size", "num_key_value_heads"):
        _require_count(hf_config, field)
    heads, kv_heads = hf_config.num_attention_heads, hf_config.num_key_value_heads
    if heads % kv_heads:
        raise ValueError(
            f"num_attention_heads must be a multiple of num_key_value_heads={kv_heads}, got {heads}"
        )
    head_size = getattr(hf_config, "head_dim", None)
    if head_size is None:
        head_size = hf_config.hidden_size // heads
    if not 2 <= head_size <= LARGEST_HEAD or head_size % 2:
        raise ValueError(f"head_dim must be an even number in 2..{LARGEST_HEAD}, got {head_size}")
    early_exit = getattr(hf_config, "early_exit_layer", None)
    if early_exit is not None and early_exit not in range(1, hf_config.num_hidden_layers + 1):
        raise ValueError(
            f"early_exit_layer must be in 1..{hf_config.num_hidden_layers}, got {early_exit!r}"
        )
    eps = hf_config.rms_norm_eps
    if not 0 <= eps < float("inf"):
        raise ValueError(f"rms_norm_eps must be a number of at least 0, got {eps}")
    frequencies, scaling = rope.frequencies(hf_config, head_size, max_model_len)
    return DecoderOptions(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        inner_size=hf_config.intermediate_size,
        eps=eps,
        hidden_act=_activation(hf_config.hidden_act),
        ties=ties,
        early_exit_layer=early_exit,
        frequencies=frequencies,
        rope_scaling=scaling,
        **SERVED[name](hf_config),
    )


def _llama(config: Any) -> dict[str, Any]:
    if (window := getattr(config, "sliding_window", None)) is not None:
        logger.warning("sliding_window=%s is ignored: the class has no window", window)
    return {
        **_biases(config.attention_bias, config.attention_bias, config.mlp_bias),
        "has_qk_norm": False,
        "sliding_windows": (None,) * config.num_hidden_layers,
    }


def _mistral(config: Any) -> dict[str, Any]:
    """Its window holds in every layer."""
    return {
        **_biases(False, False, False),
        "has_qk_norm": False,
        "sliding_windows": (_window(config),) * config.num_hidden_layers,
    }


def _qwen2(config: Any) -> dict[str, Any]:
    """It has the biases of query, key and value without saying so, and none on the output."""
    windows = _windows_by_layer(config)
    return {**_biases(True, False, False), "has_qk_norm": False, "sliding_windows": windows}


def _qwen3(config: Any) -> dict[str, Any]:
    biases = _biases(config.attention_bias, config.attention_bias, False)
    return {**biases, "has_qk_norm": True, "sliding_windows": _windows_by_layer(config)}


SERVED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
}
"""By transformers' class: where its biases, norms and windows are."""


def _biases(qkv: bool, output: bool, mlp: bool) -> dict[str, bool]:
    return {"has_qkv_bias": qkv, "has_output_bias": output, "has_mlp_bias": mlp}


def _window(config: Any) -> int | None:
    window = config.sliding_window
    if window is not None and window < 1:
        raise ValueError(f"sliding_window must be None or at least 1, got {window}")
    return window


def _windows_by_layer(config: Any) -> Windows:
    window, allowed = _window(config), {"full_attention", "sliding_attention"}
    kinds = config.layer_types
    if len(kinds) != config.num_hidden_layers:
        raise ValueError(
            f"layer_types must have {config.num_hidden_layers} entries, got {len(kinds)}"
        )
    if unknown := sorted(set(kinds) - allowed):
        raise ValueError(f"layer_types must be {' or '.join(sorted(allowed))}, got {unknown}")
    if window is None and "sliding_attention" in kinds:
        raise ValueError(
            "layer_types has sliding_attention, which needs use_sliding_window and a "
            f"sliding_window, got use_sliding_window={config.use_sliding_window}"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _activation(name: Any) -> str:
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ValueError(f"hidden_act must be one of {', '.join(sorted(ACT2FN))}, got {name!r}")
    return str(name)


def _require_count(config: Any, field: str) -> None:
    value = getattr(config, field)
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not is_int or not 1 <= value <= LARGEST_SIZE:
        raise ValueError(f"{field} must be an integer in 1..{LARGEST_SIZE}, got {value!r}")
