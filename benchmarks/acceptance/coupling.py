"""What drawing a draft tree with the target's noise is worth: three ways to draw the same shape.

    python -m benchmarks.acceptance.coupling  # JSON lines to stdout, a table to stderr
    python -m benchmarks.acceptance.coupling --shape 4,4 --out rows.jsonl

    coupled               children are the top k of log draft_probs + g with the target's noise g,
                          accepted iff equal to the target's token
    top_k                 children are the top k of draft_probs, accepted iff equal
    without_replacement   children are drawn without replacement with noise of their own, and
                          verified by recursive rejection (RSD, arXiv 2402.14160)
    greedy                the top k at temperature 0, where the three are one

All complete the same held-out code with the same seed for each prompt and repetition. The interval
of a ratio of acceptance lengths is that of a paired bootstrap: prompts are drawn with replacement,
the same for both sides, with all their repetitions. A verified draft is a pass of the target for
one sequence.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.lib.output import begin, show, write_rows
from benchmarks.lib.stepping import make_llm, run_task
from benchmarks.lib.tasks import Task, make_task
from folospec.models.loader import load_tokenizer

BATCH = 8
DTYPE = "float32"
RESAMPLES = 10_000
MIN_DRAFTS = 5_000
CONTESTANTS = {
    "coupled": {"children": "coupled", "acceptance": "coupled"},
    "top_k": {"children": "top_k", "acceptance": "coupled"},
    "without_replacement": {"children": "without_replacement", "acceptance": "rejection"},
    "greedy": {"children": "top_k", "acceptance": "coupled"},
}
REFERENCE = "coupled"

Row = dict[str, Any]
Counts = npt.NDArray[np.int64]  # [num_prompts, 2]: drafts, accepted tokens


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if there were too few drafts to say anything."""
    args = parse_arguments(argv)
    facts = begin(argv, __file__)
    task = make_task("completion", load_tokenizer(args.model), args.prompts, args.max_tokens)
    found = {
        name: measure(args, task, name, 0.0 if name == "greedy" else args.temperature)
        for name in tqdm(CONTESTANTS, leave=False)
    }
    rows = write_rows(
        ({**describe(args, n), **figures(found, n), "provenance": facts} for n in found), args.out
    )
    show(table(rows))
    fewest = min(row["num_drafts"] for row in rows)
    if fewest < args.min_drafts:
        Console(stderr=True).print(f"fewer than {args.min_drafts} verified drafts: {fewest}")
    return int(fewest < args.min_drafts)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Coupled trees against others of their shape.")
    parser.add_argument("--shape", type=_widths, default=[3, 3, 3], help="children at each depth")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--prompts", type=_count, default=300)
    parser.add_argument("--repetitions", type=_count, default=1)
    parser.add_argument("--max-tokens", type=_count, default=64)
    parser.add_argument(
        "--min-drafts", type=int, default=MIN_DRAFTS, help="with fewer the exit status is 1"
    )
    parser.add_argument("--model", default="folospec-demo")
    parser.add_argument("--out", type=Path, help="write the JSON lines here instead of to stdout")
    return parser.parse_args(argv)


def speculative(shape: list[int], name: str) -> dict[str, Any]:
    return {"method": "draft_model", "tree": shape, **CONTESTANTS[name]}


def measure(args: argparse.Namespace, task: Task, name: str, temperature: float) -> Counts:
    """Drafts and accepted tokens of every prompt, summed over the repetitions. At temperature 0
    all repetitions are the same, so there is one."""
    llm = make_llm(args.model, speculative(args.shape, name), DTYPE, BATCH)
    counts = np.zeros((len(task.items), 2), np.int64)
    for repetition in range(args.repetitions if temperature > 0 else 1):
        run = run_task(llm, task, temperature, repetition=repetition, keep_steps=False)
        metrics = [output.metrics for output in run.outputs]
        counts += np.array([(m.num_drafts, m.num_accepted_tokens) for m in metrics])
    return counts


def describe(args: argparse.Namespace, name: str) -> Row:
    greedy = name == "greedy"
    return {
        "benchmark": "coupling",
        "model": args.model,
        "dtype": DTYPE,
        "task": "completion",
        "contestant": name,
        "settings": {"speculative": speculative(args.shape, name), "batch": BATCH},
        "shape": args.shape,
        "depth": len(args.shape),
        "temperature": 0.0 if greedy else args.temperature,
        "num_prompts": args.prompts,
        "max_tokens": args.max_tokens,
        "repetitions": 1 if greedy else args.repetitions,
        "seeds": "1000 * repetition + prompt, from 0",
    }


def figures(found: dict[str, Counts], name: str) -> Row:
    """Acceptance length with its interval, and that of the coupled tree as a multiple of it."""
    counts = found[name]
    picks = resamples(len(counts))
    row: Row = {
        "num_drafts": int(counts[:, 0].sum()),
        "num_accepted_tokens": int(counts[:, 1].sum()),
        "acceptance_length": float(acceptance_lengths(counts, np.arange(len(counts))[None])[0]),
        "interval": interval(acceptance_lengths(counts, picks)),
        "resamples": RESAMPLES,
    }
    if name == REFERENCE:
        return row
    everyone = np.arange(len(counts))[None]
    ratio = acceptance_lengths(found[REFERENCE], everyone) / acceptance_lengths(counts, everyone)
    ratios = acceptance_lengths(found[REFERENCE], picks) / acceptance_lengths(counts, picks)
    return {**row, "coupled_ratio": float(ratio[0]), "coupled_ratio_interval": interval(ratios)}


def resamples(num_prompts: int) -> npt.NDArray[np.int64]:
    """The prompts of every resample, [RESAMPLES, num_prompts]; the same at every call."""
    return np.random.default_rng(0).integers(num_prompts, size=(RESAMPLES, num_prompts))


def acceptance_lengths(counts: Counts, picks: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The acceptance length of every pick of prompts, [num_picks]: 1 + accepted / drafts."""
    drafts, accepted = counts[picks, 0].sum(1), counts[picks, 1].sum(1)
    return 1.0 + accepted / np.maximum(drafts, 1)


def interval(values: npt.NDArray[np.float64]) -> list[float]:
    """The middle 95 %."""
    return [float(value) for value in np.percentile(values, (2.5, 97.5))]


def table(rows: list[Row]) -> Table:
    shape = rows[0]["shape"]
    result = Table(
        title=f"Trees of {shape} children, held-out code",
        caption="Ratio: acceptance length of the coupled tree / of this one; 95 % intervals.",
    )
    for header in ("contestant", "T", "drafts", "acceptance length", "coupled / this"):
        result.add_column(header, justify="left" if header == "contestant" else "right")
    for row in rows:
        low, high = row["interval"]
        ratio = "-"
        if "coupled_ratio" in row:
            bounds = row["coupled_ratio_interval"]
            ratio = f"{row['coupled_ratio']:.3f} ({bounds[0]:.3f}-{bounds[1]:.3f})"
        result.add_row(
            row["contestant"],
            f"{row['temperature']:g}",
            str(row["num_drafts"]),
            f"{row['acceptance_length']:.3f} ({low:.3f}-{high:.3f})",
            ratio,
        )
    return result


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _widths(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
