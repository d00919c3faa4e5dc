"""Whether drafters know how good their drafts are: confidence against what was accepted.

    python -m benchmarks.acceptance.calibration  # JSON lines to stdout, a table to stderr
    python -m benchmarks.acceptance.calibration --drafters "ngram; draft_model" --out rows.jsonl

Every node of a proposal has a confidence, the chance that it is accepted given that its parent was.
So the nodes that count are those that were put to the test: their parent is the root or was
accepted. Counted are

    calibration error    mean distance of confidence and acceptance over ten bins of confidence,
                         weighted by their nodes (expected calibration error)
    Brier score          mean of (confidence - accepted)^2; 0 is perfect, and whoever says the mean
                         acceptance of every node gets the `Brier score of the mean`

The text is held-out code: completions, and edits for who needs a prediction. Whoever learns while
it runs starts with nothing, and is held to its first guesses too.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from rich.table import Table
from tqdm import tqdm

from benchmarks.lib.drafters import choose, takes_part
from benchmarks.lib.output import begin, show, write_rows
from benchmarks.lib.stepping import make_llm, run_task
from benchmarks.lib.tasks import make_task
from folospec.models.loader import load_tokenizer
from folospec.trace.records import StepTrace

TEMPERATURES = (0.0, 0.8)
BATCH = 8
DTYPE = "float32"
NUM_BINS = 10
TASKS = ("completion", "editing")
"""The first that a contestant can be measured on."""

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the benchmark and return its rows, one per contestant and temperature."""
    args = parse_arguments(argv)
    common = {"benchmark": "calibration", "model": args.model, "provenance": begin(argv, __file__)}
    rows = write_rows(({**common, **row} for row in measure_all(args)), args.out)
    show(table(rows))
    return rows


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Calibration of folospec's drafters.")
    parser.add_argument("--drafters", help='contestants, such as "ngram; draft_model"; default all')
    parser.add_argument("--items", type=int, default=32, help="prompts")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--model", default="folospec-demo")
    parser.add_argument("--out", type=Path, help="write the JSON lines here instead of to stdout")
    args = parser.parse_args(argv)
    try:
        args.contestants = choose(args.drafters, args.model)
    except ValueError as error:
        parser.error(f"argument --drafters: {error}")
    if args.items < 1 or args.max_tokens < 2:
        parser.error("--items must be at least 1 and --max-tokens at least 2")
    return args


def measure_all(args: argparse.Namespace) -> Iterator[Row]:
    tokenizer = load_tokenizer(args.model)
    tasks = [make_task(name, tokenizer, args.items, args.max_tokens) for name in TASKS]
    cells = [(name, t) for name in args.contestants for t in TEMPERATURES]
    for name, temperature in tqdm(cells, leave=False):
        speculative = args.contestants[name]
        task = next(task for task in tasks if takes_part(name, task))
        llm = make_llm(args.model, speculative, DTYPE, BATCH)
        steps = run_task(llm, task, temperature).steps
        yield {
            "task": task.name,
            "num_items": len(task.items),
            "max_tokens": args.max_tokens,
            "temperature": temperature,
            "contestant": name,
            "settings": {"speculative": speculative, "batch": BATCH},
            "dtype": DTYPE,
            **summary(list(trials(steps))),
        }


def trials(steps: Iterable[StepTrace]) -> Iterator[tuple[float | None, bool]]:
    """The confidence and the fate of every node that was put to the test."""
    for step in steps:
        for sequence in step.sequences:
            for node in sequence.proposal.nodes if sequence.proposal else ():
                if node.verdict in ("accepted", "rejected"):
                    yield node.confidence, node.verdict == "accepted"


def summary(tried: list[tuple[float | None, bool]]) -> Row:
    """Calibration error, Brier score, and the bins of a reliability diagram: nodes without a
    confidence are counted and left out."""
    known = [(c, accepted) for c, accepted in tried if c is not None]
    row: Row = {"num_nodes": len(known), "num_without_confidence": len(tried) - len(known)}
    if not known:
        return {**row, "bins": []}
    total = len(known)
    mean = sum(accepted for _, accepted in known) / total
    bins = []
    for number in range(NUM_BINS):
        inside = [k for k in known if min(int(k[0] * NUM_BINS), NUM_BINS - 1) == number]
        if inside:
            bins.append(
                {
                    "from": number / NUM_BINS,
                    "num_nodes": len(inside),
                    "confidence": sum(c for c, _ in inside) / len(inside),
                    "accepted": sum(accepted for _, accepted in inside) / len(inside),
                }
            )
    distances = [b["num_nodes"] * abs(b["confidence"] - b["accepted"]) for b in bins]
    return {
        **row,
        "mean_accepted": mean,
        "mean_confidence": sum(c for c, _ in known) / total,
        "calibration_error": sum(distances) / total,
        "brier_score": sum((c - accepted) ** 2 for c, accepted in known) / total,
        "brier_score_of_mean": mean * (1 - mean),
        "bins": bins,
    }


def table(rows: list[Row]) -> Table:
    result = Table(title="Confidence against acceptance, held-out code")
    for header in ("contestant", "T", "nodes", "accepted", "confidence"):
        result.add_column(header, justify="left" if header == "contestant" else "right")
    for header in ("calibration\nerror", "Brier\nscore", "of the\nmean"):
        result.add_column(header, justify="right")
    for row in rows:
        head = (row["contestant"], f"{row['temperature']:g}", str(row["num_nodes"]))
        names = ("mean_accepted", "mean_confidence", "calibration_error")
        values = [row.get(name) for name in (*names, "brier_score", "brier_score_of_mean")]
        result.add_row(*head, *("-" if value is None else f"{value:.3f}" for value in values))
    return result


if __name__ == "__main__":
    main()
