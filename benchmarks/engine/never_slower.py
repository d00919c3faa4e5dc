"""Is `speculative="auto"` ever slower than plain decoding? Alternated pairs of runs, on texts that
draft well and on texts that do not.

    python -m benchmarks.engine.never_slower --out never_slower.jsonl
    python -m benchmarks.engine.never_slower --model PATH --draft-model PATH --dtype bfloat16
    python -m benchmarks.engine.never_slower --model build/models/smollm2/bf16 --dtype bfloat16 \
        --tasks chat,code,file_editing --temperatures 0,0.8 --batches 1,8

Each pair completes prompts that no engine has seen: with the same ones again, the suffix drafter
would copy its own answers. Which engine goes first is drawn. The engines live as long as a workload
does, so the planner keeps what it has learned, as it would in service; the first pair warms up and
is left out. A ratio is plain time over auto time: above 1, auto is faster.

Next to auto stand two controls: a second plain engine, which shows what the machine's noise does to
a ratio of 1, and a planner that is forced to draft, which must come out as slower where drafts do
not pay. Each cell has the median of its ratios and a one-sided 95 % bound for it, corrected for the
number of cells by Bonferroni; see `slower_checks`. On a shared machine, and with one thread,
`--clock cpu` takes the CPU time of the process.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks import ROOT
from benchmarks.engine.slower_checks import force_drafts, lower_bound, verdict
from benchmarks.lib.chat_tasks import CHAT_TASKS
from benchmarks.lib.contestants import COUNTS
from benchmarks.lib.output import begin, show, write_rows
from benchmarks.lib.prompts import LENGTHS, held_out_prompts
from benchmarks.lib.tasks import make_task
from folospec import LLM, SamplingParams

Row = dict[str, Any]

RESAMPLES = 10_000
AGAIN, FORCED = "plain again", "forced to draft"
LEAST_PROMPTS = 4
"""Of a run: in smaller batches they are done one batch after another."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts of one kind, and how they are sampled."""

    name: str
    temperature: float
    kind: str
    is_task: bool = False
    """Whether the kind is a task of `chat_tasks`, which says how long its outputs are."""


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("code", 0.0, "code"),
        Workload("prose", 0.0, "prose"),
        Workload("random", 0.0, "random"),
        Workload("sampled", 0.8, "code"),
        Workload("hot", 1.5, "code"),
    )
}


def task_workloads(tasks: Sequence[str], temperatures: Sequence[float]) -> list[Workload]:
    """The tasks of `chat_tasks`, at every temperature."""
    return [
        Workload(f"{task} at {temperature:g}", temperature, task, is_task=True)
        for task in tasks
        for temperature in temperatures
    ]


def prompts_of(kind: str, tokenizer: Any, vocab_size: int, count: int) -> list[list[int]]:
    """`count` prompts of the lengths that the other benchmarks have, the same in every run.

    Raises:
        ValueError: there is not enough text.
    """
    if kind == "code":
        return held_out_prompts(tokenizer, count)
    rng = random.Random(0)
    lengths = [LENGTHS[index % len(LENGTHS)] for index in range(count)]
    if kind == "random":
        return [[rng.randrange(3, vocab_size) for _ in range(length)] for length in lengths]
    pages = sorted(ROOT.glob("docs/**/*.md"))
    token_ids = tokenizer("\n".join(page.read_text() for page in pages), verbose=False)["input_ids"]
    last = len(token_ids) - max(LENGTHS)
    if last < count:
        raise ValueError(f"the pages give {last} prompts, got {count=}")
    return [
        token_ids[place : place + length]
        for place, length in zip(rng.sample(range(last), count), lengths, strict=True)
    ]


@dataclass(slots=True)
class Run:
    wall: float
    cpu: float
    token_ids: list[list[int]]
    counts: dict[str, float]
    undrafted: dict[str, int]


def run(llm: LLM, prompts: Sequence[list[int]], batch: int, params: SamplingParams) -> Run:
    before = llm.stats()
    begin, cpu_begin = time.perf_counter(), time.process_time()
    outputs = []
    for first in range(0, len(prompts), batch):
        own = [{"prompt_token_ids": p} for p in prompts[first : first + batch]]
        outputs += llm.generate(own, params, use_tqdm=False)
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    after = llm.stats()
    old = before["num_undrafted"]
    return Run(
        seconds,
        cpu_seconds,
        [output.outputs[0].token_ids for output in outputs],
        {name: after[name] - before[name] for name in COUNTS},
        {name: n - old.get(name, 0) for name, n in after["num_undrafted"].items()},
    )


def measure(engines: dict[str, LLM], workload: Workload, batch: int, args: Any) -> Iterator[Row]:
    """Run the pairs of one workload and batch size; a row for each engine but the plain one."""
    size = max(batch, LEAST_PROMPTS)
    prompts, max_tokens = _prompts(engines["plain"], workload, size, args)
    runs: dict[str, list[Run]] = {name: [] for name in engines}
    for pair in range(args.pairs + 1):
        own = prompts[pair * size : (pair + 1) * size]
        params = SamplingParams(
            temperature=workload.temperature,
            max_tokens=max_tokens,
            ignore_eos=True,
            seed=pair if workload.temperature else None,
        )
        for name in random.Random(pair).sample(list(engines), len(engines)):
            runs[name].append(run(engines[name], own, batch, params))
    for name in (name for name in engines if name != "plain"):
        yield {
            "contestant": name,
            "workload": workload.name,
            "temperature": workload.temperature,
            "batch": batch,
            "pairs": args.pairs,
            "prompts_per_run": size,
            "max_tokens": max_tokens,
            "clock": args.clock,
            **compare(runs["plain"], runs[name], args),
            "planner": engines[name].stats()["planner"],
        }


def compare(plain: Sequence[Run], others: Sequence[Run], args: Any) -> Row:
    """Sum the pairs of a contestant up, without the first."""
    same = [a.token_ids == b.token_ids for a, b in zip(plain, others, strict=True)]
    plain, others = plain[1:], others[1:]
    times = [[getattr(one, args.clock) for one in taken] for taken in (plain, others)]
    ratios = [a / b for a, b in zip(*times, strict=True)]
    low, high = bootstrap(ratios)
    median, num_cells = statistics.median(ratios), len(args.workloads) * len(args.batches)
    bound = lower_bound(ratios, num_cells)
    return {
        "ratio": median,
        "ratio_low": low,
        "ratio_high": high,
        "bound": bound,
        "num_cells": num_cells,
        "verdict": verdict(median, bound),
        "ratios": ratios,
        "tokens_equal": all(same),
        "num_differing_pairs": same.count(False),
        "plain_seconds": times[0],
        "auto_seconds": times[1],
        "auto_counts": {k: sum(one.counts[k] for one in others) for k in COUNTS},
        "auto_undrafted": _sums(one.undrafted for one in others),
    }


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the median, by resampling."""
    rng = random.Random(seed)
    medians = sorted(
        statistics.median(rng.choices(values, k=len(values))) for _ in range(RESAMPLES)
    )
    return medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]


def _prompts(
    plain: LLM, workload: Workload, size: int, args: Any
) -> tuple[list[list[int]], int | None]:
    """The prompts of all pairs, `size` of them each, and how many tokens each gets.

    Raises:
        ValueError: there are not so many.
    """
    count = (args.pairs + 1) * size
    if workload.is_task:
        items = make_task(workload.kind, plain.tokenizer, count, args.max_tokens).items
        return [item.prompt_token_ids for item in items], items[0].max_tokens
    prompts = prompts_of(workload.kind, plain.tokenizer, _vocab_size(plain), count)
    return prompts, args.max_tokens


def rows(args: Any, facts: Row) -> Iterator[Row]:
    plain, most = _engine(args, None), max(*args.batches, LEAST_PROMPTS)
    for workload in args.workloads:
        _prompts(plain, workload, most, args)  # what is missing is said before hours of measuring
    del plain
    for workload in args.workloads:
        engines = {"plain": _engine(args, None), "auto": _engine(args, _speculative(args))}
        if args.controls:
            engines[AGAIN] = _engine(args, None)
            engines[FORCED] = force_drafts(_engine(args, _speculative(args)))
        for batch in args.batches:
            known = {"benchmark": "never_slower", **_settings(args)}
            for found in measure(engines, workload, batch, args):
                yield {**known, **found, "provenance": facts}


def _speculative(args: Any) -> Any:
    if args.speculative:
        return args.speculative
    return {"method": "auto", "model": args.draft_model} if args.draft_model else "auto"


def _engine(args: Any, speculative: Any) -> LLM:
    return LLM(
        args.model,
        speculative=speculative,
        dtype=args.dtype,
        max_num_seqs=max(args.batches),
        enable_prefix_caching=False,
        strict_drafters=True,
    )


def _settings(args: Any) -> Row:
    names = ("model", "draft_model", "speculative", "dtype")
    return {name: getattr(args, name) for name in names}


def _vocab_size(llm: LLM) -> int:
    return llm.engine.components.target.model.config.vocab_size


def _sums(counts: Any) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counts:
        for name, count in one.items():
            total[name] = total.get(name, 0) + count
    return total


def table(found: list[Row]) -> Table:
    table = Table(title="Speed relative to plain decoding")
    for header in ("", "workload", "batch", "median", "95 %", "bound", "verdict", "acceptance"):
        table.add_column(header, justify="left" if header in ("", "workload") else "right")
    for header in ("tokens", "no draft"):
        table.add_column(header)
    for row in found:
        counts, reasons = row["auto_counts"], row["auto_undrafted"]
        drafts = counts["num_drafts"]
        length = f"{1 + counts['num_accepted_tokens'] / drafts:.2f}" if drafts else "-"
        most = sorted(reasons, key=lambda name: -reasons[name])[:3]
        table.add_row(
            row["contestant"],
            row["workload"],
            str(row["batch"]),
            f"{row['ratio']:.3f}",
            f"{row['ratio_low']:.3f}-{row['ratio_high']:.3f}",
            "-" if row["bound"] is None else f"{row['bound']:.3f}",
            row["verdict"],
            length,
            "equal" if row["tokens_equal"] else f"{row['num_differing_pairs']} pairs differ",
            ", ".join(f"{name} {reasons[name]}" for name in most),
        )
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="folospec-demo", help="checkpoint or bundled name")
    parser.add_argument("--draft-model", help="draft model for auto; default: the bundled one")
    parser.add_argument("--speculative", help="in place of auto, as `LLM` takes it")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--workloads", default="code,prose,random,sampled,hot", type=_workloads)
    parser.add_argument("--batches", default="1,8,32", type=_counts)
    parser.add_argument("--pairs", default=15, type=int)
    parser.add_argument("--max-tokens", default=128, type=int)
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own")
    parser.add_argument("--out", type=Path, help="file of JSON lines; default: stdout")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"))
    parser.add_argument(
        "--controls",
        default=True,
        action=argparse.BooleanOptionalAction,
        help="run a second plain engine and a planner that is forced to draft, too",
    )
    parser.add_argument("--tasks", type=_tasks, help="of a chat model, instead of workloads")
    parser.add_argument("--temperatures", default="0,0.8,1.5", type=_floats, help="of the tasks")
    args = parser.parse_args(argv)
    if args.tasks:
        args.workloads = task_workloads(args.tasks, args.temperatures)
    if args.threads:
        torch.set_num_threads(args.threads)
    facts = begin(argv, __file__)
    show(table(write_rows(rows(args, facts), args.out)))


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _workloads(text: str) -> list[Workload]:
    return [WORKLOADS[name] for name in _names(text, WORKLOADS)]


def _tasks(text: str) -> list[str]:
    return _names(text, CHAT_TASKS)


def _names(text: str, known: Mapping[str, Any]) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"must be among {', '.join(known)}, got {unknown}")
    return names


if __name__ == "__main__":
    main()
