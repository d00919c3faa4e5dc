"""Grows the demo target to the size of a large model that computes the same function.

    python -m benchmarks.models.grown 160m build/grown/160m
    python -m benchmarks.models.grown 1.2b build/grown/1.2b-float32 --dtype float32

What a drafter guesses right then is what it guesses right of a trained model, while a step of the
target costs what one of a large model costs: as many bytes are read, as many products summed. How
that is done, and why it is exact, is in `growth`. The result is an ordinary Llama checkpoint;
`grown_check.py` compares it with the demo.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from benchmarks.models.growth import Plan, Shape, grown_parts
from folospec.models.checkpoint import read_tensors
from folospec.models.loader import resolve_model

DEMO = "folospec-demo"
DTYPES = ("float32", "bfloat16")
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""The name that older readers know, too."""
SHAPES = {
    "160m": Shape(hidden=1024, layers=13, heads=16, kv_heads=8, inner=2816),
    "1.2b": Shape(hidden=2048, layers=20, heads=32, kv_heads=8, inner=8192),
}
"""With the demo's vocabulary: 157.6 and 1224.8 million parameters."""


def grown_config(config: dict[str, Any], shape: Shape, dtype: str) -> dict[str, Any]:
    """The config of the grown model."""
    early = config["early_exit_layer"]
    sizes = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.inner,
        "early_exit_layer": Plan.of(config, shape).layers[early - 1] + 1,
    }
    return with_old_names({**config, **sizes}, dtype)


def with_old_names(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config in the style of today, and beside it what older readers look for."""
    theta = config["rope_parameters"]["rope_theta"]
    return {**config, "dtype": dtype, "torch_dtype": dtype, "rope_theta": theta}


def write_grown(folder: Path, shape: Shape, dtype: str) -> int:
    """Write the demo, grown to a shape, as a sharded checkpoint; return its parameters' number.

    One layer is in memory at a time.

    Raises:
        ValueError: the demo cannot grow to the shape, or bfloat16 cannot hold a weight as it is.
    """
    source = resolve_model(DEMO)
    config = json.loads((source / "config.json").read_text())
    demo = {name: weight.float() for name, weight in read_tensors(source)}
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    total = 0
    parts = grown_parts(config, demo, shape)
    for index, part in enumerate(tqdm(parts, total=1 + shape.layers, desc="writing", leave=False)):
        file = f"model-{index + 1:05d}-of-{1 + shape.layers:05d}.safetensors"
        rounded = {name: weight.bfloat16() for name, weight in part.items()}
        if not index or (index - 1) in Plan.of(config, shape).layers:
            for name, weight in part.items():
                if not torch.equal(rounded[name].float(), weight):
                    raise ValueError(f"weights must be exact in bfloat16, {name} is not")
        kept = {n: w.to(getattr(torch, dtype)).contiguous() for n, w in rounded.items()}
        save_file(kept, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(kept, file))
        total += sum(weight.numel() for weight in kept.values())
    size = total * getattr(torch, dtype).itemsize
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    for name in ("tokenizer.json", "generation_config.json"):
        shutil.copy(source / name, folder / name)
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    tokenizer["tokenizer_class"] = TOKENIZER_CLASS
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n")
    text = json.dumps(grown_config(config, shape, dtype), indent=2)
    (folder / "config.json").write_text(text + "\n")
    return total


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Grow the demo target to the size of a large one.")
    parser.add_argument("size", choices=tuple(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    args = parser.parse_args(argv)
    total = write_grown(args.folder, SHAPES[args.size], args.dtype)
    print(f"{args.folder}: {total / 1e6:.1f} million parameters, {args.dtype}")


if __name__ == "__main__":
    main()
