"""A checkpoint that is damaged, or does not fit its config, is a ValueError before anything runs.

The list has one of each kind; the fuzz makes seeded mutations of every file. What still loads must
run: some changes are harmless. `FOLOSPEC_FUZZ=2000` makes more of them.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
)

from folospec import LLM, SamplingParams
from folospec.models.loader import load_tokenizer, resolve_model

DEMO = "folospec-demo"
SHARD = "model-00001-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
SHORT, LONG = 40, 400
ODD = [None, -1, 0, 1, 3, 2.5, 1e308, float("nan"), float("inf"), "x", "", [], [[1]], {}]
ODD += [True, False, {"a": None}, 2**31, 2**63, 10**30, "../x", ["x"] * 3]
CONFIGS = {"decoder": LlamaConfig, "window": Qwen3Config, "transformers": GPT2Config}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Folders of sound checkpoints by kind, in shards, with a tokenizer."""
    folders = {}
    for kind, config in CONFIGS.items():
        folder = folders[kind] = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        made = config(
            vocab_size=len(load_tokenizer(DEMO)),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=0,
            **({} if kind == "transformers" else {"intermediate_size": 32, "head_dim": 16}),
            **({} if kind == "transformers" else {"num_key_value_heads": 1}),
        )
        model = AutoModelForCausalLM.from_config(made)
        model.save_pretrained(folder, max_shard_size="300KB")
        for path in resolve_model(DEMO).glob("*token*"):
            shutil.copy(path, folder)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0]}))
    return folders


def run(folder: Path) -> None:
    llm = LLM(str(folder), kv_cache_memory=1 << 20, max_num_batched_tokens=64, max_num_seqs=2)
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2, temperature=0), use_tqdm=False)


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def reshape(path: Path) -> None:
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def to_bytes(path: Path) -> None:
    tensors = {name: tensor.to(torch.int8) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def twice(folder: Path) -> None:
    first, second = (load_file(path) for path in shards(folder)[:2])
    save_file(second | {next(iter(first)): next(iter(first.values()))}, shards(folder)[1])


def in_index(folder: Path, file: Any) -> None:
    path = folder / INDEX
    names = json.loads(path.read_text())["weight_map"]
    edit(path, weight_map={**names, next(iter(names)): file})


BROKEN = {
    "a truncated shard": lambda f: truncate(shards(f)[1]),
    "an empty shard": lambda f: shards(f)[0].write_bytes(b""),
    "a shard of zeros": lambda f: shards(f)[0].write_bytes(bytes(1000)),
    "a missing shard": lambda f: shards(f)[0].unlink(),
    "a folder for a shard": lambda f: make_folder(shards(f)[0]),
    "a tensor of another shape": lambda f: reshape(shards(f)[0]),
    "tensors of integers": lambda f: to_bytes(shards(f)[0]),
    "a tensor in two shards": twice,
    "an index that leaves the folder": lambda f: in_index(f, "../model.safetensors"),
    "an index with an absolute path": lambda f: in_index(f, "/etc/passwd"),
    "an index with a number": lambda f: in_index(f, 3),
    "an index without a map": lambda f: (f / INDEX).write_text("{}"),
    "an empty index": lambda f: (f / INDEX).write_text(""),
    "an index that is a list": lambda f: (f / INDEX).write_text("[]"),
    "a folder for the index": lambda f: make_folder(f / INDEX),
    "an empty config": lambda f: (f / "config.json").write_text(""),
    "a config that is a list": lambda f: (f / "config.json").write_text("[1]"),
    "a config that is null": lambda f: (f / "config.json").write_text("null"),
    "a config without fields": lambda f: (f / "config.json").write_text("{}"),
    "a config not in UTF-8": lambda f: (f / "config.json").write_bytes(b'{"a": "\xff"}'),
    "a config of brackets": lambda f: (f / "config.json").write_text("[" * 100_000),
    "a folder for the config": lambda f: make_folder(f / "config.json"),
    "too many layers": lambda f: edit(f / "config.json", num_hidden_layers=3, n_layer=3),
    "layers without end": lambda f: edit(f / "config.json", num_hidden_layers=10**12),
    "a giant vocabulary": lambda f: edit(f / "config.json", vocab_size=10**15),
    "a giant width": lambda f: edit(f / "config.json", hidden_size=10**9, n_embd=10**9),
    "a negative width": lambda f: edit(f / "config.json", hidden_size=-32, n_embd=-32),
    "no heads": lambda f: edit(f / "config.json", num_attention_heads=0, n_head=0),
    "a width that is no number": lambda f: edit(f / "config.json", hidden_size=float("nan")),
    "a width in words": lambda f: edit(f / "config.json", hidden_size="wide"),
    "no positions": lambda f: edit(f / "config.json", max_position_embeddings=0, n_positions=0),
    "an unknown type": lambda f: edit(f / "config.json", model_type="no such type"),
    "a type that is no name": lambda f: edit(f / "config.json", model_type=[1]),
    "a rope type that is no name": lambda f: edit(
        f / "config.json", rope_parameters={"rope_type": ["linear"], "rope_theta": 10000.0}
    ),
    "an empty generation config": lambda f: (f / "generation_config.json").write_text(""),
    "a generation config that is a list": lambda f: (f / "generation_config.json").write_text("[]"),
    "a folder for the generation config": lambda f: make_folder(f / "generation_config.json"),
    "an empty tokenizer": lambda f: (f / "tokenizer.json").write_text(""),
    "a tokenizer of nothing": lambda f: (f / "tokenizer.json").write_text("{}"),
    "a truncated tokenizer": lambda f: truncate(f / "tokenizer.json"),
    "a tokenizer config that is a list": lambda f: (f / "tokenizer_config.json").write_text("[]"),
}
WEIGHTS_AND_SIZES = [name for name in BROKEN if "shard" in name or "tensor" in name]
WEIGHTS_AND_SIZES += ["too many layers", "a giant vocabulary", "a giant width", "a negative width"]
WEIGHTS_AND_SIZES += ["no heads", "no positions"]
CASES = [("decoder", name) for name in BROKEN]
CASES += [("transformers", name) for name in WEIGHTS_AND_SIZES]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_broken_checkpoint_is_a_value_error(good, tmp_path, kind, name):
    folder = shutil.copytree(good[kind], tmp_path / "broken")
    BROKEN[name](folder)
    with pytest.raises(ValueError, match="."):
        run(folder)


@pytest.mark.parametrize("kind", CONFIGS)
def test_control_a_sound_checkpoint_runs(good, kind):
    run(good[kind])


def mutate(folder: Path, draws: random.Random) -> str:
    """Change one thing in one file; returns what."""
    path = draws.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    kind = draws.choice(["value", "value", "value", "bytes", "cut", "drop", "nest"])
    if path.suffix == ".json" and kind in ("value", "nest", "drop") and path.stat().st_size < 20000:
        found = json.loads(path.read_text())
        inner = found
        nested = [value for value in found.values() if isinstance(value, dict) and value]
        if nested and draws.random() < 0.4:
            inner = draws.choice(nested)
        key = draws.choice(sorted(inner))
        value = draws.choice(ODD)
        if kind == "drop":
            del inner[key]
        else:
            inner[key] = [value] if kind == "nest" else value
        path.write_text(json.dumps(found))
        return f"{path.name}: {key} {kind} {value!r}"
    data = bytearray(path.read_bytes())
    place = draws.randrange(min(len(data), 3000))
    if kind == "cut":
        path.write_bytes(data[:place])
        return f"{path.name}: cut at {place}"
    data[place] = draws.randrange(256)
    path.write_bytes(data)
    return f"{path.name}: byte {place} is {data[place]}"


def check_mutations(good, tmp_path, kind, count, seed):
    draws, results, crashes = random.Random(seed), [], []
    for _ in range(count):
        folder = shutil.copytree(good[kind], tmp_path / "mutated")
        what = mutate(folder, draws)
        try:
            run(folder)
            results.append("runs")
        except ValueError:
            results.append("refused")
        except Exception as error:
            crashes.append(f"{what}: {error!r} in {traceback.extract_tb(error.__traceback__)[-1]}")
        shutil.rmtree(folder)
    assert crashes == []
    assert len(set(results)) == 2, results


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_mutated_checkpoint_runs_or_is_a_value_error(good, tmp_path, kind):
    check_mutations(good, tmp_path, kind, SHORT // len(CONFIGS), seed=1)


@pytest.mark.soak
@pytest.mark.parametrize("kind", CONFIGS)
def test_many_mutated_checkpoints_run_or_are_value_errors(good, tmp_path, kind):
    check_mutations(good, tmp_path, kind, int(os.environ.get("FOLOSPEC_FUZZ", LONG)), seed=2)
