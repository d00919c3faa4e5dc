"""The models of the check, which it makes itself, and their prompts.

    demo     the bundled pair
    tiny     a random Qwen3 with a sliding window in a layer, and a draft model: itself with noise
    grown    the demo, grown to 1.2 billion parameters that compute the same; on disk
    8b       the shape of Llama 3 8B, random, never on disk: filled where it is

A random model's next tokens are all but tied, and rounding would decide. So the 8b one has an
opinion: its output matrix is its embedding, moved by one place, and what its layers add to the
stream is small. After token t comes t + 1, by far. Its layers have the work of ordinary ones, no
weight is zero, and no text of it repeats.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import ROOT
from benchmarks.models.grown import SHAPES, write_grown
from benchmarks.models.growth import Shape
from folospec.models import loader
from folospec.models.checkpoint import Checkpoint
from gpu_check.jobs import Context, Row

DEMO, DEMO_DRAFT = "folospec-demo", "folospec-demo-draft"
LONG = 8192
"""Positions of the grown model, which knows 1024 from the demo: beyond them its text is of no use,
and its steps cost what they cost."""
QUICK_SHAPE = Shape(hidden=512, layers=6, heads=16, kv_heads=4, inner=1408)
GROWN_NAME = "grown 1.2b"
GROWN_DONE = "written"
QUIET = 2.0**-12
"""Standard deviation of what writes the stream in the 8b model."""
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
QUICK_8B = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


@dataclass(frozen=True, slots=True)
class Pair:
    """A target, a draft model for it if there is one, and its type."""

    target: str
    draft: str | None
    dtype: str
    vocab_size: int


def make_grown(context: Context) -> Iterator[Row]:
    """A job: write the grown model into the scratch folder, for the jobs after it."""
    folder = context.folder / "grown"
    shape = QUICK_SHAPE if context.quick else SHAPES["1.2b"]
    parameters = write_grown(folder, shape, "bfloat16")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": LONG}))
    (folder / GROWN_DONE).touch()
    yield {"kind": "model", "model": "grown", "parameters": parameters, "passed": True}


def grown_name(context: Context) -> str:
    """What rows call the grown model."""
    return "grown, small" if context.quick else GROWN_NAME


def grown(context: Context) -> str:
    """The folder of the grown model, written now if it is not there."""
    folder = context.folder / "grown"
    if not (folder / GROWN_DONE).exists():
        for _ in make_grown(context):
            pass
    return str(folder)


def demo_pair() -> Pair:
    return Pair(DEMO, DEMO_DRAFT, "bfloat16", 4096)


def tiny_pair(folder: Path) -> Pair:
    """Write the tiny model and its draft model, in float32."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=509,
        hidden_size=192,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        use_sliding_window=True,
        sliding_window=48,
        max_window_layers=2,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    generator = torch.Generator().manual_seed(5)
    model = Qwen3ForCausalLM(config)
    for noise, name in ((None, "target"), (0.08, "draft")):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    drawn = torch.randn(parameter.shape, generator=generator)
                    wide = 1.3 * parameter.shape[1] ** -0.5
                    drawn *= wide
                    parameter.copy_(drawn if noise is None else parameter + drawn * noise)
        model.save_pretrained(folder / name)
    return Pair(str(folder / "target"), str(folder / "draft"), "float32", config.vocab_size)


def write_8b_config(folder: Path, quick: bool) -> str:
    """Write the config of the 8b model; its tensors come from `random_tensors`."""
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        **(QUICK_8B if quick else LLAMA_8B),
        max_position_embeddings=LONG,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    ).save_pretrained(folder)
    return str(folder)


def name_8b(context: Context) -> str:
    """What rows call the 8b model."""
    return "8b, small" if context.quick else "8b"


def vocab_size_8b(quick: bool) -> int:
    return (QUICK_8B if quick else LLAMA_8B)["vocab_size"]


def random_tensors(config: dict[str, Any], device: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the 8b model in bfloat16, made on the device, the same at every call."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]

    def normal(name: str, *shape: int, scale: float) -> Tensor:
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=device)
        if tensor.is_meta:
            return tensor
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
        generator = torch.Generator(device).manual_seed(seed)
        return tensor.normal_(0.0, scale, generator=generator)

    embedding = normal("embedding", config["vocab_size"], hidden, scale=1.0)
    yield "model.embed_tokens.weight", embedding
    # Row t + 1 is the embedding of t: after t, token t + 1 has by far the largest product.
    yield "lm_head.weight", embedding.roll(1, dims=0)
    ones = torch.ones(hidden, dtype=torch.bfloat16, device=device)
    yield "model.norm.weight", ones
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        yield layer + "input_layernorm.weight", ones
        yield layer + "post_attention_layernorm.weight", ones
        for name, rows, columns, scale in (
            ("self_attn.q_proj", queries, hidden, 0.02),
            ("self_attn.k_proj", keys, hidden, 0.02),
            ("self_attn.v_proj", keys, hidden, 0.02),
            ("self_attn.o_proj", hidden, queries, QUIET),
            ("mlp.gate_proj", inner, hidden, 0.02),
            ("mlp.up_proj", inner, hidden, 0.02),
            ("mlp.down_proj", hidden, inner, QUIET),
        ):
            yield f"{layer}{name}.weight", normal(layer + name, rows, columns, scale=scale)


class RandomCheckpoint(Checkpoint):
    """Stands in for the files of the 8b model: their tensors are made when they are read."""

    def __init__(self, folder: str, device: str) -> None:
        self.folder, self.device = Path(folder), device
        self.config = json.loads((self.folder / "config.json").read_text())
        outline = random_tensors(self.config, "meta")
        self.shapes = {name: tuple(tensor.shape) for name, tensor in outline}
        self.types = dict.fromkeys(self.shapes, "BF16")

    def read(self, device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor]]:
        return random_tensors(self.config, self.device)


def without_files(folder: str, device: str) -> AbstractContextManager[Any]:
    """While it is open, the loader finds the random tensors where it looks for files."""

    def made(asked: Path) -> RandomCheckpoint:
        assert str(asked) == folder, f"only {folder} is without files, got {asked}"
        return RandomCheckpoint(folder, device)

    return mock.patch.object(loader, "Checkpoint", made)


def transformers_8b(folder: str, device: str) -> Any:
    """The same model of transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    places = model.state_dict()
    for name, tensor in random_tensors(config.to_dict(), device):
        places.pop(name).copy_(tensor)
    assert not places, f"no tensor for {sorted(places)}"
    return model.eval()


def source_prompts(tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """Prompts of so many tokens, cut out of folospec's own sources; all differ."""
    texts = [path.read_text() for path in sorted((ROOT / "folospec").rglob("*.py"))]
    rng = random.Random(0)
    token_ids = [token for text in texts for token in tokenizer(text)["input_ids"]]
    starts = rng.sample(range(max(1, len(token_ids) - length)), count)
    return [token_ids[start : start + length] for start in starts]


def random_prompts(
    vocab_size: int, count: int, lengths: list[int], seed: int = 0
) -> list[list[int]]:
    """Prompts of random tokens, of these lengths in turn."""
    rng = random.Random(seed)
    return [
        [rng.randrange(1, vocab_size) for _ in range(length)]
        for _, length in zip(range(count), cycle(lengths), strict=False)
    ]
