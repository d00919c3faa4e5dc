"""Measure the exported demo models on the held-out modules and write their model cards.

    python training/evaluate.py     # folospec/demo_models -> training/results.json, model cards

What is measured is what is shipped: the bfloat16 weights of the checkpoints, run in float32.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import torch
import torch.nn.functional as F
import train
import transformers
from export import NAMES
from model_card import write_cards
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

SEED = 20261121
NUM_DRAFT_TOKENS = 5
CONTEXT = 256  # tokens before a position at which the draft model proposes
BATCH = 16
PROMPT_TOKENS, COMPLETION_TOKENS = 384, 128
COMPLETED = (  # module, function: all held out
    ("textwrap.py", "shorten"),
    ("heapq.py", "heappushpop"),
    ("statistics.py", "harmonic_mean"),
    ("shlex.py", "join"),
)


@torch.inference_mode()
def held_out_scores(
    models: dict[str, PreTrainedModel], stream: np.ndarray, num_bytes: np.ndarray
) -> dict[str, Any]:
    """Return bits per byte of all three, and how often exit and draft agree with the target.

    `stream`: token ids of the held-out text. `num_bytes[t]`: UTF-8 bytes of token t. Every token
    but the first is scored once, in windows of `LONG_WINDOW` tokens that overlap by half: what was
    scored in one is context in the next.
    """
    device = models["target"].device
    half = train.LONG_WINDOW // 2
    nats = dict.fromkeys(("target", "exit", "draft"), 0.0)
    equal = dict.fromkeys(("exit", "draft"), 0)
    for start in tqdm(range(0, max(1, len(stream) - 1 - half), half), desc="held-out text"):
        window = torch.from_numpy(stream[start : start + 2 * half + 1].astype(np.int64)).to(device)
        first = half if start else 0
        states = train.hidden_states(models["target"], window[None, :-1])
        draft_state = train.hidden_states(models["draft"], window[None, :-1])[-1]
        exit_state = states[models["target"].config.early_exit_layer]
        logits = {
            "target": train.logits_of(models["target"], states[-1][:, first:]),
            "exit": train.logits_of(models["target"], exit_state[:, first:]),
            "draft": train.logits_of(models["draft"], draft_state[:, first:]),
        }
        choice = logits["target"].argmax(-1)
        for name, rows in logits.items():
            loss = F.cross_entropy(rows, window[1 + first :], reduction="none")
            nats[name] += loss.double().sum().item()
            if name in equal:
                equal[name] += int((rows.argmax(-1) == choice).sum())
    scored_bytes = int(num_bytes[stream[1:]].sum())
    return {
        "tokens": len(stream) - 1,
        "bytes": scored_bytes,
        "bits_per_byte": {k: round(v / math.log(2) / scored_bytes, 4) for k, v in nats.items()},
        "greedy_agreement_with_target": {
            k: round(v / (len(stream) - 1), 4) for k, v in equal.items()
        },
    }


@torch.inference_mode()
def greedy(model: PreTrainedModel, token_ids: Tensor, num_tokens: int) -> Iterator[Tensor]:
    """Yield the arg-max continuation of `token_ids` [batch, length], a [batch, 1] at a time."""
    cache = None
    for _ in range(num_tokens):
        out = model(token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, token_ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        yield token_ids


def chain_agreement(
    models: dict[str, PreTrainedModel], stream: np.ndarray, positions: int
) -> dict[str, Any]:
    """Return how often the i-th of k greedy draft tokens is the target's, where all before it were.

    The contexts are `CONTEXT` tokens of held-out text that end at random positions; both models
    continue each greedily.
    """
    rng = np.random.default_rng(SEED)
    starts = rng.integers(0, len(stream) - CONTEXT, positions)
    contexts = np.stack([stream[s : s + CONTEXT] for s in starts]).astype(np.int64)
    tried = np.zeros(NUM_DRAFT_TOKENS, int)
    equal = np.zeros(NUM_DRAFT_TOKENS, int)
    for batch in tqdm(torch.from_numpy(contexts).split(BATCH), desc="draft chains"):
        batch = batch.to(models["target"].device)
        target, draft = (
            torch.cat(list(greedy(models[key], batch, NUM_DRAFT_TOKENS)), 1) for key in NAMES
        )
        prefix_equal = (target == draft).cumprod(1).sum(0).cpu().numpy()
        equal += prefix_equal
        tried += np.concatenate([[len(batch)], prefix_equal[:-1]])
    return {
        "positions": positions,
        "context_tokens": CONTEXT,
        "tried_per_position": tried.tolist(),
        "equal_per_position": equal.tolist(),
        "agreement_per_position": (equal / np.maximum(tried, 1)).round(4).tolist(),
        "mean_equal_prefix": round(equal.sum() / positions, 4),
    }


def function_prompt(text: str, name: str) -> tuple[str, str]:
    """Return (module text before function `name`, its signature and docstring)."""
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            stop = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
            # Without the line end: the tokenizer joins it with the indentation that follows.
            return "".join(lines[:start]), "".join(lines[start:stop]).rstrip("\n")
    raise ValueError(f"the text has no function {name!r}")


def body_of(completion: str) -> str:
    """Cut a completion where the function ends: before the first line that is not indented."""
    lines = completion.splitlines(keepends=True)
    ends = [i for i, line in enumerate(lines) if i and line.strip() and not line[0].isspace()]
    return "".join(lines[: ends[0]] if ends else lines).rstrip() + "\n"


def completions(model: PreTrainedModel, tokenizer: Any) -> list[dict[str, Any]]:
    """Complete the functions of `COMPLETED` greedily, given the text up to their docstring."""
    texts = dict(corpus.documents())
    rows = []
    for module, function in tqdm(COMPLETED, desc="functions"):
        before, head = function_prompt(texts[module], function)
        prompt = tokenizer(before + head, verbose=False).input_ids[-PROMPT_TOKENS:]
        tokens = greedy(model, torch.tensor([prompt], device=model.device), COMPLETION_TOKENS)
        body = body_of(tokenizer.decode(torch.cat(list(tokens), 1)[0]))
        row = {"module": module, "function": function, "prompt": head, "completion": body}
        limits = {"max_prompt_tokens": PROMPT_TOKENS, "max_completion_tokens": COMPLETION_TOKENS}
        rows.append({**row, **limits})
    return rows


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def provenance(device: torch.device) -> dict[str, Any]:
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": "make train",
        "commit": git.stdout.strip() if git.returncode == 0 else None,
        "hardware": hardware(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def training_facts(work: Path) -> dict[str, Any]:
    saved = torch.load(work / "checkpoint.pt", map_location="cpu", mmap=True)
    _, streams, num_bytes = corpus.prepare(work)
    files = Counter(corpus.split(name) for name, _ in corpus.documents())
    return {
        "steps": saved["step"],
        "seconds": round(saved["seconds"]),
        "tokens": saved["step"] * train.BATCH_TOKENS,
        "batch_tokens": train.BATCH_TOKENS,
        "window_tokens": [train.SHORT_WINDOW, train.LONG_WINDOW],
        "learning_rate": train.LEARNING_RATE,
        "exit_weight": train.EXIT_WEIGHT,
        "seed": train.SEED,
        "files": dict(files),
        "bytes": num_bytes,
        "stream_tokens": {side: len(stream) for side, stream in streams.items()},
        "held_out_modules": sorted(corpus.HELD_OUT),
    }


def model_facts(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    config = model.config
    keys = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
    more = ("num_key_value_heads", "vocab_size", "max_position_embeddings")
    weights = (folder / "model.safetensors").read_bytes()
    return {
        "parameters": model.num_parameters(),
        **{key: getattr(config, key) for key in (*keys, *more)},
        "early_exit_layer": getattr(config, "early_exit_layer", None),
        "weights_bytes": len(weights),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(args.device)
    folders = {key: args.models / name for key, name in NAMES.items()}
    models = {
        key: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        for key, folder in folders.items()
    }
    tokenizer = AutoTokenizer.from_pretrained(folders["target"])
    _, streams, _ = corpus.prepare(args.work)
    stream = streams["held_out"][: args.max_tokens]
    return {
        "provenance": provenance(device),
        "training": training_facts(args.work),
        "models": {NAMES[key]: model_facts(models[key], folders[key]) for key in NAMES},
        "held_out": held_out_scores(models, stream, token_bytes(tokenizer)),
        "draft_chains": chain_agreement(models, stream, args.positions),
        "completions": completions(models["target"], tokenizer),
    }


def token_bytes(tokenizer: Any) -> np.ndarray:
    """Return the UTF-8 bytes of every token [vocab_size]: in byte-level BPE, its characters."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return np.array([0 if token == corpus.END_OF_TEXT else len(token) for token in tokens])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path("build/demo"), help="where train.py wrote"
    )
    parser.add_argument("--models", type=Path, default=Path("folospec/demo_models"))
    parser.add_argument("--results", type=Path, default=Path("training/results.json"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-tokens", type=int, help="score only the start of the held-out text")
    parser.add_argument("--positions", type=int, default=1600, help="draft chains to compare")
    args = parser.parse_args()
    results = evaluate(args)
    args.results.write_text(json.dumps(results, indent=2) + "\n")
    write_cards(results, args.models)
    print(json.dumps({key: results[key] for key in ("held_out", "draft_chains")}, indent=2))


if __name__ == "__main__":
    main()
