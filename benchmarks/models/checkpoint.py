"""Writes a Llama checkpoint of random weights, sharded, of any size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig

SHARD_BYTES = 256_000_000
VOCAB_SIZE = 4096
HEAD_SIZE = 64
MAX_MODEL_LEN = 1024


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama model with untied embeddings."""

    hidden_size: int
    num_layers: int

    @property
    def intermediate_size(self) -> int:
        return 11 * self.hidden_size // 4

    @property
    def num_heads(self) -> int:
        return self.hidden_size // HEAD_SIZE

    @property
    def num_kv_heads(self) -> int:
        return max(1, self.num_heads // 4)

    @property
    def num_parameters(self) -> int:
        return sum(rows * columns for _, (rows, columns) in self.tensors())

    def kv_bytes(self, num_tokens: int, dtype: torch.dtype) -> int:
        """Bytes of keys and values of so many tokens."""
        return 2 * self.num_layers * num_tokens * self.num_kv_heads * HEAD_SIZE * dtype.itemsize

    def tensors(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield the name and shape of every tensor, vectors as one row."""
        hidden, inner, keys = (
            self.hidden_size,
            self.intermediate_size,
            self.num_kv_heads * HEAD_SIZE,
        )
        yield "model.embed_tokens.weight", (VOCAB_SIZE, hidden)
        for index in range(self.num_layers):
            layer = f"model.layers.{index}"
            yield f"{layer}.input_layernorm.weight", (1, hidden)
            yield f"{layer}.self_attn.q_proj.weight", (hidden, hidden)
            yield f"{layer}.self_attn.k_proj.weight", (keys, hidden)
            yield f"{layer}.self_attn.v_proj.weight", (keys, hidden)
            yield f"{layer}.self_attn.o_proj.weight", (hidden, hidden)
            yield f"{layer}.post_attention_layernorm.weight", (1, hidden)
            yield f"{layer}.mlp.gate_proj.weight", (inner, hidden)
            yield f"{layer}.mlp.up_proj.weight", (inner, hidden)
            yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
        yield "model.norm.weight", (1, hidden)
        yield "lm_head.weight", (VOCAB_SIZE, hidden)


def shape_of_at_least(num_bytes: int, hidden_size: int) -> Shape:
    """The model with the fewest layers whose bfloat16 weights take at least `num_bytes`."""
    num_layers = 1
    while 2 * Shape(hidden_size, num_layers).num_parameters < num_bytes:
        num_layers += 1
    return Shape(hidden_size, num_layers)


def write_checkpoint(folder: Path, shape: Shape) -> int:
    """Write config, shards and index in bfloat16; return the bytes of the tensors.

    One shard is in memory at a time.
    """
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCAB_SIZE,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=HEAD_SIZE,
        max_position_embeddings=MAX_MODEL_LEN,
        eos_token_id=0,
        dtype=torch.bfloat16,
    ).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    total, shard = 0, dict[str, Tensor]()
    names = list(shape.tensors())
    for index, (name, (rows, columns)) in enumerate(tqdm(names, desc="writing", leave=False)):
        tensor = torch.empty(rows, columns, dtype=torch.bfloat16)
        tensor.normal_(1.0 if rows == 1 else 0.0, 0.02, generator=generator)
        shard[name] = tensor[0] if rows == 1 else tensor
        total += tensor.nbytes
        if sum(t.nbytes for t in shard.values()) >= SHARD_BYTES or index == len(names) - 1:
            file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(shard, file))
            shard.clear()
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return total
