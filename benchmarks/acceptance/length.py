"""How many tokens of each drafter the target accepts, on texts of several kinds.

    python -m benchmarks.acceptance.length  # JSON lines to stdout, a table to stderr
    python -m benchmarks.acceptance.length --quick --out rows.jsonl
    python -m benchmarks.acceptance.length --drafters "ngram; draft_model" --tasks completion,prose
    python -m benchmarks.acceptance.length --model build/models/smollm2/bf16 --tasks chat,code

Every row is one contestant on one task of `tasks` at one temperature, in an engine of its own.
Acceptance is counted, and the tokens are compared with those of plain decoding, in float64 with
several requests at a time: no near tie is decided by rounding there, so a single token that differs
is an error, and the exit status is 1. Costs are of a second, shorter run in float32 with one
request at a time, as ratios of medians to a plain pass of the target on the same items:

    draft cost          time to draft, of the steps that had a draft
    verification cost   time of the target's pass over root and draft

The units of an acceptance length are tokens per draft, bonus included; `SpeculationCounts` in
folospec/outputs.py has the definitions. Steps without a draft count for the passes per token alone.
"""

from __future__ import annotations

import argparse
import difflib
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from rich.table import Table
from tqdm import tqdm

from benchmarks.acceptance.copying import CopyCounts, ideal_copier
from benchmarks.lib.drafters import COPIERS, choose, takes_part
from benchmarks.lib.output import begin, show, write_rows
from benchmarks.lib.stepping import Run, make_llm, run_task
from benchmarks.lib.tasks import ALL_TASKS, TASKS, Task, make_task
from folospec.models.loader import load_tokenizer
from folospec.trace.records import StepTrace

TEMPERATURES = (0.0, 0.8)
BATCH = 8
COUNTED_DTYPE, TIMED_DTYPE = "float64", "float32"
TIMED_ITEMS = 3
QUICK = {"items": 2, "max_tokens": 12}

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if tokens differed or a contestant failed."""
    args = parse_arguments(argv)
    common = {"benchmark": "acceptance", "model": args.model, "provenance": begin(argv, __file__)}
    rows = write_rows(({**common, **row} for row in measure_all(args)), args.out)
    show(table(rows))
    return int(any("error" in row or not row["tokens_equal_to_plain"] for row in rows))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Acceptance of folospec's drafters.")
    parser.add_argument(
        "--drafters",
        help='contestants, such as "ngram; draft_model"; default all, or for a model without a '
        "bundled draft model those that need no other",
    )
    parser.add_argument("--tasks", help=f"of {','.join(ALL_TASKS)}; default {','.join(TASKS)}")
    parser.add_argument("--items", type=int, help="of each task; default 16, or 2 with --quick")
    parser.add_argument(
        "--max-tokens", type=int, help="of each item at most; default 12 with --quick"
    )
    parser.add_argument("--quick", action="store_true", help="a look, not a measurement")
    parser.add_argument("--model", default="folospec-demo")
    parser.add_argument("--out", type=Path, help="write the JSON lines here instead of to stdout")
    args = parser.parse_args(argv)
    try:
        args.contestants = choose(args.drafters, args.model)
    except ValueError as error:
        parser.error(f"argument --drafters: {error}")
    args.tasks = args.tasks.split(",") if args.tasks else list(TASKS)
    if not set(args.tasks) <= set(ALL_TASKS):
        parser.error(f"argument --tasks: must be of {', '.join(ALL_TASKS)}, got {args.tasks}")
    if args.items is None:
        args.items = QUICK["items"] if args.quick else 16
    if args.max_tokens is None and args.quick:
        args.max_tokens = QUICK["max_tokens"]
    if args.items < 1 or (args.max_tokens is not None and args.max_tokens < 2):
        parser.error("--items must be at least 1 and --max-tokens at least 2")
    return args


def measure_all(args: argparse.Namespace) -> Iterator[Row]:
    tokenizer = load_tokenizer(args.model)
    tasks = [make_task(name, tokenizer, args.items, args.max_tokens) for name in args.tasks]
    cells = [(task, temperature) for task in tasks for temperature in TEMPERATURES]
    with tqdm(total=len(cells) * len(args.contestants), leave=False) as bar:
        for task, temperature in cells:
            bar.set_description(f"{task.name} at {temperature}")
            plain = Plain(args.model, task, temperature)
            for name, speculative in args.contestants.items():
                bar.set_postfix_str(name)
                if takes_part(name, task):
                    yield measure(plain, name, speculative)
                bar.update()


@dataclass
class Plain:
    """What plain decoding does with a task: the tokens, and the time of a pass."""

    model: str
    task: Task
    temperature: float

    @cached_property
    def token_ids(self) -> list[list[int]]:
        llm = make_llm(self.model, None, COUNTED_DTYPE, BATCH)
        return run_task(llm, self.task, self.temperature, keep_steps=False).token_ids

    @cached_property
    def seconds_per_pass(self) -> float:
        llm = make_llm(self.model, None, TIMED_DTYPE, 1)
        steps = timed_steps(run_task(llm, self.task, self.temperature, indices=timed(self.task)))
        return statistics.median(step.times.target for step in steps)

    @cached_property
    def share_reproduced(self) -> float | None:
        """The share of the expected tokens that are in the output, in order; None where nothing is
        expected."""
        expected = [item.expected_token_ids[: item.max_tokens] for item in self.task.items]
        if not any(expected):
            return None
        matched = [
            sum(block.size for block in matcher.get_matching_blocks())
            for a, b in zip(expected, self.token_ids, strict=True)
            for matcher in [difflib.SequenceMatcher(None, a, b, autojunk=False)]
        ]
        return sum(matched) / sum(map(len, expected))

    def ceiling(self, budget: int, sources: set[str]) -> CopyCounts | None:
        """What the ideal copier of these sources does with the plain output; None where nothing is
        expected."""
        if self.share_reproduced is None:
            return None
        total = CopyCounts()
        for item, output in zip(self.task.items, self.token_ids, strict=True):
            others = [item.prediction_token_ids] if "prediction" in sources else []
            from_context = "context" in sources
            total += ideal_copier(
                item.prompt_token_ids, output, others, budget, from_context=from_context
            )
        return total


def measure(plain: Plain, name: str, speculative: Any) -> Row:
    """One row; a contestant that raises has an error in it instead of figures."""
    task, temperature, begin = plain.task, plain.temperature, time.perf_counter()
    row: Row = {
        "task": task.name,
        "temperature": temperature,
        "contestant": name,
        "settings": {"speculative": speculative, "batch": BATCH},
        "num_items": len(task.items),
        "dtype": COUNTED_DTYPE,
        "timed_dtype": TIMED_DTYPE,
    }
    try:
        llm = make_llm(plain.model, speculative, COUNTED_DTYPE, BATCH)
        run = run_task(llm, task, temperature, keep_steps=False)
        row |= counts(run)
        row["budget"] = llm.stats()["num_speculative_tokens"]
        row |= comparison(plain, run)
        if name in COPIERS:
            row |= against_ideal(plain, run, row["budget"], COPIERS[name])
        llm = make_llm(plain.model, speculative, TIMED_DTYPE, 1)
        steps = timed_steps(run_task(llm, task, temperature, indices=timed(task)))
        row |= costs(steps, plain.seconds_per_pass)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"
    return {**row, "seconds": time.perf_counter() - begin}


def timed(task: Task) -> range:
    return range(min(TIMED_ITEMS, len(task.items)))


def timed_steps(run: Run) -> list[StepTrace]:
    """The steps after the prompt, without the first ones: a new engine is slow at first."""
    steps = [step for step in run.steps if step.sequences[0].num_tokens == 1]
    return steps[min(4, len(steps) // 2) :]


def counts(run: Run) -> Row:
    tokens = sum(map(len, run.token_ids))
    passes, drafts = run.total("num_target_passes"), run.total("num_drafts")
    accepted, drafted = run.total("num_accepted_tokens"), run.total("num_draft_tokens")
    by_place = run.total_by_place("num_accepted_tokens_per_pos")
    return {
        "num_output_tokens": tokens,
        "num_target_passes": passes,
        "num_drafts": drafts,
        "num_draft_tokens": drafted,
        "num_accepted_tokens": accepted,
        "acceptance_length": 1 + accepted / drafts if drafts else None,
        "acceptance_rate": accepted / drafted if drafted else None,
        "acceptance_rate_per_pos": [count / drafts for count in by_place],
        "acceptance_histogram": run.total_by_place("acceptance_histogram"),
        "target_passes_per_token": passes / tokens,
    }


def comparison(plain: Plain, run: Run) -> Row:
    """The tokens against those of plain decoding, and these against what was expected."""
    differing = [
        {"item": index, "position": next(i for i in range(len(a)) if a[i] != b[i])}
        for index, (a, b) in enumerate(zip(plain.token_ids, run.token_ids, strict=True))
        if a != b
    ]
    return {
        "tokens_equal_to_plain": not differing,
        "first_differences": differing,
        "share_reproduced": plain.share_reproduced,
    }


def against_ideal(plain: Plain, run: Run, budget: int, sources: set[str]) -> Row:
    """A copier against the ideal one of the same sources, where a text is expected."""
    ceiling = plain.ceiling(budget, sources)
    if ceiling is None:
        return {}
    tokens_per_pass = sum(map(len, run.token_ids)) / run.total("num_target_passes")
    return {
        "ceiling_acceptance_length": ceiling.acceptance_length,
        "ceiling_target_passes_per_token": 1 / ceiling.tokens_per_pass,
        "share_of_ceiling": tokens_per_pass / ceiling.tokens_per_pass,
    }


def costs(steps: list[StepTrace], plain_pass: float) -> Row:
    drafted = [step for step in steps if step.sequences[0].proposal is not None]
    if not drafted:
        return {"plain_pass_seconds": plain_pass, "draft_cost": None, "verification_cost": None}
    return {
        "plain_pass_seconds": plain_pass,
        "draft_cost": statistics.median(s.times.draft for s in drafted) / plain_pass,
        "verification_cost": statistics.median(s.times.target for s in drafted) / plain_pass,
    }


def table(rows: list[Row]) -> Table:
    result = Table(title="Acceptance on held-out texts")
    headers = ("task", "T", "contestant", "acceptance\nlength", "of it at\nmost")
    for header in (*headers, "share of\nceiling", "passes\nper token", "draft\ncost"):
        result.add_column(header, justify="left" if header in ("task", "contestant") else "right")
    result.add_column("verification\ncost", justify="right")
    result.add_column("tokens as plain")
    for row in rows:
        head = (row["task"], f"{row['temperature']:g}", row["contestant"])
        if "error" in row:
            result.add_row(*head, f"[red]{row['error'][:60]}[/red]")
            continue
        result.add_row(
            *head,
            _number(row["acceptance_length"]),
            _number(row.get("ceiling_acceptance_length")),
            _number(row.get("share_of_ceiling")),
            _number(row["target_passes_per_token"], 3),
            _number(row["draft_cost"], 3),
            _number(row["verification_cost"]),
            "equal" if row["tokens_equal_to_plain"] else f"[red]{row['first_differences']}[/red]",
        )
    return result


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
