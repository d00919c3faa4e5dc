"""Compares a grown checkpoint with the demo target that it should compute the same as.

    python -m benchmarks.models.grown_check build/grown/160m --dtype float32

Both complete held-out code greedily with transformers; then both read the demo's completions, and
their logits are compared place by place. One line of JSON goes to stdout. In float32 the models may
differ by rounding; in bfloat16 the roundings are larger, and a tie of two tokens may go either way,
after which the completions part.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.lib.output import begin, write_rows
from benchmarks.lib.prompts import held_out_prompts
from folospec.models.loader import load_tokenizer, resolve_model

DEMO = "folospec-demo"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the comparison and return its row."""
    parser = argparse.ArgumentParser(description="Compare a grown checkpoint with the demo target.")
    parser.add_argument("folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args(argv)
    facts = begin(argv, __file__)
    prompts = held_out_prompts(load_tokenizer(DEMO), args.prompts)
    dtype = getattr(torch, args.dtype)
    demo, grown = (load(name, dtype) for name in (DEMO, args.folder))
    expected = [complete(demo, ids, args.max_tokens) for ids in prompts]
    found = [complete(grown, ids, args.max_tokens) for ids in prompts]
    texts = [ids + rest for ids, rest in zip(prompts, expected, strict=True)]
    pairs = [(logits(demo, ids), logits(grown, ids)) for ids in texts]
    row = {
        "benchmark": "grown_check",
        "model": args.folder,
        "dtype": args.dtype,
        "num_prompts": len(prompts),
        "max_tokens": args.max_tokens,
        "same_completions": sum(a == b for a, b in zip(expected, found, strict=True)),
        "largest_logit": max(a.abs().max().item() for a, _ in pairs),
        "largest_difference": max((a - b).abs().max().item() for a, b in pairs),
        "same_next_token": sum((a.argmax(1) == b.argmax(1)).sum().item() for a, b in pairs)
        / sum(len(a) for a, _ in pairs),
        "provenance": facts,
    }
    write_rows([row], None)
    return row


def load(name: str, dtype: torch.dtype) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype=dtype)
    return model.eval()


@torch.inference_mode()
def complete(model: Any, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy tokens after a prompt, always so many."""
    ids = torch.tensor([prompt])
    options = {"min_new_tokens": max_tokens, "max_new_tokens": max_tokens, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    output = model.generate(ids, attention_mask=mask, do_sample=False, **options)
    return output[0, len(prompt) :].tolist()


@torch.inference_mode()
def logits(model: Any, ids: list[int]) -> Tensor:
    """float64 [tokens, vocabulary]"""
    return model(torch.tensor([ids])).logits[0].double()


if __name__ == "__main__":
    main()
