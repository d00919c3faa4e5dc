"""Throughput of folospec and of transformers, measured in turns in one run.

    python -m benchmarks.engine.throughput                   # JSON lines, and tables on stderr
    python -m benchmarks.engine.throughput --out rows.jsonl  # JSON lines to a file

Every contestant completes the same held-out code, greedily, a fixed number of tokens. In each round
every contestant runs once, and the round starts with another one each time, so that a drift of the
machine meets all. A ratio is the median of the rounds' own ratios. Tokens per second count the
generated tokens over the whole call, prompts included; for `generate_batch` over the requests' own
lifespans, which leaves the start of its thread out. At batch 1 the prompts run one by one.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from rich.table import Table
from tqdm import tqdm

from benchmarks.lib.contestants import Contestant, Run, Setup, make_contestants
from benchmarks.lib.output import begin, show, write_rows
from benchmarks.lib.prompts import held_out_prompts
from folospec.models.loader import load_tokenizer

BASELINES = {
    "ratio_to_transformers_generate": "transformers generate",
    "ratio_to_folospec_plain": "folospec plain",
}
REFERENCE = "folospec plain"
MIN_PROMPTS = 4
"""At small batch sizes several batches run one after the other: one prompt's luck is not a rate."""
WARM_UP_TOKENS = 8
TIMES = ("draft_time", "target_time", "sampling_time")

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the benchmark and return its rows, one per contestant and batch size."""
    args = parse_arguments(argv)
    facts = begin(argv, __file__)
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    setup = Setup(
        args.model, args.draft_model, args.dtype, args.num_speculative_tokens, max(args.batches)
    )
    num_prompts = {batch: batch * -(-MIN_PROMPTS // batch) for batch in args.batches}
    prompts = held_out_prompts(load_tokenizer(args.model), max(num_prompts.values()))
    contestants = make_contestants(setup)
    common = {
        "benchmark": "throughput",
        "model": args.model,
        "dtype": args.dtype,
        "temperature": 0.0,
        "max_tokens": args.max_tokens,
        "rounds": args.rounds,
        "provenance": facts,
    }

    def measured() -> Iterator[Row]:
        for batch in args.batches:
            chosen = prompts[: num_prompts[batch]]
            entrants = [c for c in contestants if batch == 1 or not c.only_batch_1]
            for row in measure(entrants, chosen, batch, args.rounds, args.max_tokens):
                yield {**common, **row}

    rows = write_rows(measured(), args.out)
    show(rate_table(rows))
    show(time_table(rows))
    return rows


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Throughput of folospec and transformers.")
    parser.add_argument("--batches", type=_counts, default=[1, 8, 32], help="such as 1,8,32")
    parser.add_argument("--rounds", type=_count, default=5)
    parser.add_argument("--max-tokens", type=_count, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--num-speculative-tokens", type=_count, default=5)
    parser.add_argument("--model", default="folospec-demo")
    parser.add_argument("--draft-model", default="folospec-demo-draft")
    parser.add_argument("--out", type=Path, help="write the JSON lines here instead of to stdout")
    return parser.parse_args(argv)


def measure(
    contestants: Sequence[Contestant],
    prompts: list[list[int]],
    batch: int,
    rounds: int,
    max_tokens: int,
) -> list[Row]:
    """Run all contestants in turns; one that raises is out, and its row holds the error."""
    runs: dict[str, list[Run]] = {c.name: [] for c in contestants}
    errors: dict[str, str] = {}
    with tqdm(total=(rounds + 1) * len(contestants), desc=f"batch {batch}", leave=False) as bar:
        for turn in range(-1, rounds):
            first = turn % len(contestants)
            for contestant in [*contestants[first:], *contestants[:first]]:
                bar.set_postfix_str(contestant.name)
                if contestant.name not in errors:
                    try:
                        warm_up = prompts[:batch], batch, min(WARM_UP_TOKENS, max_tokens)
                        timed = prompts, batch, max_tokens
                        run = contestant.run(*(warm_up if turn < 0 else timed))
                        if turn >= 0:
                            runs[contestant.name].append(run)
                    except Exception as error:
                        errors[contestant.name] = f"{type(error).__name__}: {error}"
                bar.update()
    return [
        {
            "contestant": c.name,
            "batch": batch,
            "num_prompts": len(prompts),
            "prompt_tokens": [len(ids) for ids in prompts],
            "settings": c.settings,
            **(
                {"error": errors[c.name]}
                if c.name in errors
                else {**summary(runs[c.name]), **comparison(c.name, runs, errors)}
            ),
        }
        for c in contestants
    ]


def summary(runs: list[Run]) -> Row:
    """Times and rates of a contestant's runs, and what folospec says about its steps."""
    num_tokens = sum(map(len, runs[0].token_ids))
    seconds = [run.seconds for run in runs]
    row: Row = {
        "seconds": seconds,
        "tokens_per_second": num_tokens / statistics.median(seconds),
        "tokens_per_second_range": [num_tokens / max(seconds), num_tokens / min(seconds)],
        "tokens_same_in_all_rounds": all(run.token_ids == runs[0].token_ids for run in runs),
    }
    details = {key: sum(run.details[key] for run in runs) for key in runs[0].details}
    if "num_steps" not in details:
        return {**row, **{key: value / len(runs) for key, value in details.items()}}
    steps, drafts = details["num_steps"], details["num_drafts"]
    spent = {key: 1000 * details[key] / steps for key in TIMES}
    spent["rest"] = 1000 * sum(seconds) / steps - sum(spent.values())
    accepted = details["num_accepted_tokens"]
    return {
        **row,
        "target_passes_per_round": details["num_target_passes"] / len(runs),
        "acceptance_length": 1 + accepted / drafts if drafts else None,
        "acceptance_rate": accepted / details["num_draft_tokens"] if drafts else None,
        "milliseconds_per_step": spent,
    }


def comparison(name: str, runs: dict[str, list[Run]], errors: dict[str, str]) -> Row:
    """Speed against the baselines, and tokens against folospec plain."""
    row: Row = {}
    for key, baseline in BASELINES.items():
        others = [] if baseline in errors else runs.get(baseline, [])
        ratios = [a.seconds / b.seconds for a, b in zip(others, runs[name], strict=False)]
        row[key] = statistics.median(ratios) if ratios else None
    if REFERENCE in errors or REFERENCE not in runs:
        return row
    differing = first_differences(runs[REFERENCE][0].token_ids, runs[name][0].token_ids)
    return {
        **row,
        "tokens_equal_to_plain": not differing,
        "num_differing_prompts": len(differing),
        "first_differences": [
            {"prompt": index, "position": position} for index, position in differing.items()
        ],
    }


def first_differences(expected: list[list[int]], found: list[list[int]]) -> dict[int, int]:
    """Return the position of the first difference of each prompt that has one."""
    return {
        index: next(i for i in range(len(a)) if a[i] != b[i])
        for index, (a, b) in enumerate(zip(expected, found, strict=True))
        if a != b
    }


def rate_table(rows: list[Row]) -> Table:
    table = Table(
        title="Generated tokens per second, greedy, held-out code",
        caption="x: speed relative to transformers generate and to folospec plain, same batch. "
        "Acceptance length: 1 + accepted / drafts.",
    )
    for header in ("batch", "contestant", "median", "range", "x generate", "x plain"):
        name = header == "contestant"
        table.add_column(header, justify="left" if name else "right", no_wrap=name)
    table.add_column("acceptance\nlength", justify="right")
    table.add_column("tokens as plain")
    for row in rows:
        if "error" in row:
            table.add_row(str(row["batch"]), row["contestant"], f"[red]{row['error'][:40]}[/red]")
            continue
        low, high = row["tokens_per_second_range"]
        length = row.get("acceptance_length")
        table.add_row(
            str(row["batch"]),
            row["contestant"],
            f"{row['tokens_per_second']:.0f}",
            f"{low:.0f}-{high:.0f}",
            *(f"{row[key]:.2f}" if row[key] else "-" for key in BASELINES),
            f"{length:.2f}" if length else "-",
            _tokens_cell(row),
        )
    return table


def _tokens_cell(row: Row) -> str:
    if "tokens_equal_to_plain" not in row:
        return "-"
    if row["tokens_equal_to_plain"]:
        return "equal"
    places = ", ".join(str(d["position"]) for d in row["first_differences"][:4])
    return f"{row['num_differing_prompts']} of {row['num_prompts']} differ, from {places}"


def time_table(rows: list[Row]) -> Table:
    table = Table(title="Where folospec's time goes, milliseconds per step")
    for header in ("batch", "contestant", "draft", "target", "sampling", "rest", "target passes"):
        table.add_column(header, justify="left" if header == "contestant" else "right")
    for row in rows:
        if "milliseconds_per_step" in row:
            spent = row["milliseconds_per_step"]
            table.add_row(
                str(row["batch"]),
                row["contestant"],
                *(f"{spent[key]:.2f}" for key in (*TIMES, "rest")),
                f"{row['target_passes_per_round']:.0f}",
            )
    return table


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
