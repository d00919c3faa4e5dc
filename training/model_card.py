"""The model cards of the demo models, written from measured results and from nothing else."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from export import NAMES

FRONT = """---
license: apache-2.0
language: code
library_name: transformers
pipeline_tag: text-generation
---
"""


def write_cards(results: dict[str, Any], folder: Path) -> None:
    """Write `README.md` into the folder of each model below `folder`."""
    for key, name in NAMES.items():
        (folder / name / "README.md").write_text(card(results, key), encoding="utf-8")


def card(results: dict[str, Any], key: str) -> str:
    """Return the model card of "target" or "draft"."""
    sections = [
        FRONT,
        introduction(results, key),
        data_section(results["training"]),
        numbers_section(results),
        training_section(results),
    ]
    if key == "target":
        sections.append(completions_section(results["completions"]))
    sections.append(limits_section(results["models"][NAMES[key]]))
    return "\n".join(sections)


def paragraph(text: str, indent: str = "") -> str:
    return textwrap.fill(
        " ".join(text.split()),
        100,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def table(*rows: Iterable[object]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * (lines[0].count(" | ") + 1) + "|", *lines[1:]])


def introduction(results: dict[str, Any], key: str) -> str:
    model = results["models"][NAMES[key]]
    roles = {
        "target": f"""The target model of folospec's examples and tests. It has an early exit:
        the stream after layer {model["early_exit_layer"]}, through the final norm and the head,
        was trained to predict the next token too.""",
        "draft": f"The draft model for `{NAMES['target']}`, distilled from it; same tokenizer.",
    }
    sizes = table(
        ("parameters", "layers", "hidden", "MLP", "heads", "KV heads", "vocabulary", "weights"),
        (
            f"{model['parameters']:,}",
            model["num_hidden_layers"],
            model["hidden_size"],
            model["intermediate_size"],
            model["num_attention_heads"],
            model["num_key_value_heads"],
            f"{model['vocab_size']:,}",
            f"{model['weights_bytes'] / 1e6:.1f} MB, bfloat16",
        ),
    )
    form = paragraph(
        """Llama architecture with tied embeddings, byte-level BPE, no BOS token;
        `<|endoftext|>` ends a document."""
    )
    return f"# {NAMES[key]}\n\n{paragraph(roles[key])}\n\n{sizes}\n\n{form}\n"


def data_section(training: dict[str, Any]) -> str:
    files, sizes = training["files"], training["bytes"]
    modules = ", ".join(f"`{name}`" for name in training["held_out_modules"])
    text = f"""The Python files of CPython's standard library, with their tests and
        documentation strings: {files["train"]:,} files, {sizes["train"] / 1e6:.1f} MB, for
        training. Held out are {files["held_out"]} files, {sizes["held_out"] / 1e6:.2f} MB: the
        modules {modules}, and their tests. `training/corpus.py` says exactly which."""
    return f"## Data\n\n{paragraph(text)}\n"


def numbers_section(results: dict[str, Any]) -> str:
    held_out, chains = results["held_out"], results["draft_chains"]
    bits, agreement = held_out["bits_per_byte"], held_out["greedy_agreement_with_target"]
    exit_layer = results["models"][NAMES["target"]]["early_exit_layer"]
    scope = paragraph(
        f"""Held-out text: {held_out["tokens"]:,} tokens, {held_out["bytes"]:,} bytes, each
        token with at least half a context of text before it (but at the very start). Agreement:
        how often the arg-max is the target's, given the text so far. Weights in bfloat16 as
        shipped, computed in float32."""
    )
    quality = table(
        ("", "bits per byte", "agreement with the target"),
        (f"`{NAMES['target']}`", f"{bits['target']:.3f}", ""),
        (f"its exit after layer {exit_layer}", f"{bits['exit']:.3f}", f"{agreement['exit']:.3f}"),
        (f"`{NAMES['draft']}`", f"{bits['draft']:.3f}", f"{agreement['draft']:.3f}"),
    )
    per_position = chains["agreement_per_position"]
    meaning = paragraph(
        f"""Draft chains: from {chains["positions"]:,} random places of the held-out text, with
        {chains["context_tokens"]} tokens before each, target and draft continue greedily. How
        often the draft's i-th token is the target's, where all before it were:"""
    )
    chain = table(
        ("i", *range(1, 1 + len(per_position))),
        ("agreement", *(f"{value:.3f}" for value in per_position)),
    )
    mean = f"{chains['mean_equal_prefix']:.2f} of {len(per_position)}"
    parts = ["## Held-out numbers", scope, quality, meaning, chain]
    return "\n\n".join([*parts, f"Mean length of the equal prefix: {mean}."]) + "\n"


def training_section(results: dict[str, Any]) -> str:
    training, made = results["training"], results["provenance"]
    short, long = training["window_tokens"]
    epochs = training["tokens"] / training["stream_tokens"]["train"]
    commit = f" at commit {made['commit'][:12]}" if made["commit"] else ""
    cost = paragraph(
        f"""`{made["command"]}`: {training["steps"]:,} steps of {training["batch_tokens"]:,}
        tokens, {training["tokens"] / 1e6:.1f} million tokens in all ({epochs:.1f} times the
        training text), {training["seconds"] / 60:.0f} minutes on {made["hardware"]}. The run was
        resumed on the way with fewer steps in all; training/README.md says how."""
    )
    settings = paragraph(
        f"""Target, exit and draft are trained in one pass: cross-entropy for the target,
        cross-entropy times {training["exit_weight"]} for the exit (on half of each batch), the
        divergence from the target for the draft. Windows of {short} tokens, towards the end of
        {long:,}; Muon for the matrices, AdamW for the rest, peak learning rate
        {training["learning_rate"]}, bfloat16 autocast, seed {training["seed"]}."""
    )
    versions = paragraph(
        f"""Python {made["python"]}, torch {made["torch"]}, transformers {made["transformers"]};
        measured {made["date"]}{commit}."""
    )
    return f"## Training\n\n{cost}\n\n{settings}\n\n{versions}\n"


def completions_section(completions: list[dict[str, Any]]) -> str:
    intro = """Held-out functions, completed greedily (at most {limit} tokens). The model saw
        the module's text up to the end of the docstring, its last {seen} tokens at most; the
        dashes mark where it took over."""
    first = completions[0]
    limits = {"limit": first["max_completion_tokens"], "seen": first["max_prompt_tokens"]}
    parts = ["## What it writes", paragraph(intro.format(**limits))]
    for row in completions:
        code = f"{row['prompt']}\n    # ---\n{row['completion'].strip(chr(10))}"
        parts.append(f"`{row['function']}` of `{row['module']}`:\n\n```python\n{code}\n```")
    return "\n\n".join(parts) + "\n"


def limits_section(model: dict[str, Any]) -> str:
    items = (
        """Made to show speculative decoding on a laptop, not to be useful: it knows the style
        of the standard library, and what it writes is often wrong. It follows no instructions;
        the chat template turns messages into comments.""",
        """The held-out modules come from the same library as the training text: the numbers say
        nothing about other code or other languages.""",
        f"The context is {model['max_position_embeddings']:,} tokens.",
    )
    licence = """Weights and tokenizer: Apache-2.0, like folospec. The training text is
        CPython's standard library, under the PSF License Version 2 and the licences that it
        lists; see NOTICE of folospec."""
    points = "\n".join(paragraph(f"- {item}", indent="  ") for item in items)
    return f"## Limits\n\n{points}\n\n## Licence\n\n{paragraph(licence)}\n"
