"""A tiny config for every causal model class of transformers, and sharp weights for it.

A field that has one of the names below gets the value there. What a class needs besides is in
`NEEDS`, by model type.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS, VOCAB_SIZE, POSITIONS = 3, 101, 256
KINDS = ["full_attention", "sliding_attention", "full_attention"]
FULL = ["full_attention"] * LAYERS
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB_SIZE),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "dff", "ffn_hidden_size"), 48),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), POSITIONS),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("expert_ffn_hidden_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "hidden_size_per_layer_input", "index_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "laurel_rank"), 4),
    **dict.fromkeys(("num_key_value_heads", "index_n_heads", "type_vocab_size"), 2),
    "pad_token_id": 0,
    "index_topk": 16,
    "sliding_window": 6,
}
KINDS_MIXED = {"full_attention", "sliding_attention"}
CONV = ["conv", "full_attention", "conv"]
SHARED = {"num_kv_shared_layers": 1}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
NEEDS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}, "layer_types": FULL},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma3n_text": {**SHARED, "layer_types": KINDS, "activation_sparsity_pattern": None},
    **dict.fromkeys(("lfm2", "lfm2_moe"), {"layer_types": CONV}),
    **dict.fromkeys(("dots1", "laguna", "mellum"), {"layer_types": KINDS}),
    **dict.fromkeys(
        ("qwen2", "qwen2_moe", "qwen3", "smollm3"),
        {"layer_types": KINDS, "use_sliding_window": True},
    ),
    "minimax_m3_vl_text": {"layer_types": ["full_attention", *["minimax_m3_sparse"] * 2]},
    "longcat_flash": {"num_layers": 2, "head_dim": 4, "moe_topk": 2},
    # Its generate drops what is behind the window, its forward does not.
    "xmod": {"default_language": "en_XX"},
    "moshi": {"audio_vocab_size": VOCAB_SIZE, "sliding_window": POSITIONS},
}

INNER: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "num_kv_shared_layers": LAYERS,
    },
}
"""What the configs within a config need, by the model type of the outer one."""


def tiny_config(model_type: str) -> Any:
    """The tiny config of a model type of transformers' mapping for causal models."""
    return _tiny(CONFIG_MAPPING[model_type], model_type)


def _tiny(kind: type, model_type: str) -> Any:
    fields = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    chosen = {name: value for name, value in SIZES.items() if name in fields}
    for name in ("bos_token_id", "eos_token_id"):
        if name in fields:
            chosen[name] = None if "None" in fields[name] else 1
    if "qk_rope_head_dim" in fields:  # as many key heads as query heads, of a size of their own
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]
        chosen.pop("head_dim", None)
    if "is_decoder" in fields and "add_cross_attention" in fields:
        chosen["is_decoder"] = True
    for name, part in (getattr(kind, "sub_configs_defaults", None) or {}).items():
        inner = part.config_class
        if not dataclasses.is_dataclass(inner):  # a model type says which
            inner = CONFIG_MAPPING[part.model_type]
        chosen[name] = {**_tiny(inner, inner.model_type).to_dict(), **INNER.get(model_type, {})}
    made = kind(**{**chosen, **NEEDS.get(model_type, {})})
    if _default_kinds(kind) >= KINDS_MIXED and model_type not in NEEDS:
        made = kind(**{**chosen, "layer_types": KINDS})
    return made


def _default_kinds(kind: type) -> set[str]:
    """The kinds of layers that a config has where it is told nothing."""
    try:
        return set(getattr(kind(), "layer_types", None) or ())
    except ValueError:  # its own defaults do not pass its checks
        return set()


def save_sharp(config: Any, folder: Path, seed: int = 0) -> Any:
    """Write a random checkpoint whose layers decide about its tokens; returns it, loaded back."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    width = getattr(config.get_text_config(decoder=True), "hidden_size", 32)
    scale = 0.05 if config.model_type.startswith(("gemma", "vaultgemma")) else 0.3
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.shape == (VOCAB_SIZE,):
                continue  # a bias that would decide alone
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "emb" in name or "wte" in name or "wpe" in name:
                parameter.normal_(0.0, scale)
            else:
                parameter.normal_(0.0, 1.5 * width**-0.5)
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()
