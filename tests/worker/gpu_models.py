"""Tiny models for Triton's interpreter: heads as small as its attention takes, and little else."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 61


def save_gpu_llama(folder: Path, *, layers: int = 1, seed: int = 0) -> str:
    """A random Llama with two query heads for one KV head, whose greedy output varies."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=96,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 1.3 * parameter.shape[1] ** -0.5)
        model.model.embed_tokens.weight.normal_(0.0, 0.35)
    model.save_pretrained(folder)
    return str(folder)
