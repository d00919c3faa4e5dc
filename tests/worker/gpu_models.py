"""Tiny models for Triton's interpreter: heads as small as its attention takes, and little else."""

from __future__ import annotations

from pathlib import Path

import torch
from sharp_models import save_sharp
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 61


def save_gpu_llama(folder: Path, *, layers: int = 1, seed: int = 0) -> str:
    """A random Llama with two query heads for one KV head, whose greedy output varies."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    tokens = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 96, "eos_token_id": 0}
    config = LlamaConfig(**sizes, **heads, **tokens, bos_token_id=None, tie_word_embeddings=True)
    return save_sharp(LlamaForCausalLM(config), folder)
