"""What `speculative="auto"` reaches of what acceptance and the cost of rows allow, at batch 1.

    python -m benchmarks.acceptance.bound --model build/models/smollm2/bf16 --dtype bfloat16
    python -m benchmarks.acceptance.bound --model folospec-demo --tasks editing --dtype float32

In every round plain decoding and "auto" complete the same prompts, one first and then the other;
steps of 1 to 32 rows are timed behind one of the prompts; and the drafter of "auto" drafts for all
of them with nobody who plans, which is not timed. `hindsight` says what these allow:

    bound      the best rule of how much to draft, chosen when all is over, without the time of
               drafting; with the prompts' time as plain decoding has it
    foresight  the same by one who knows what is accepted

For models without a draft model, where "auto" has the suffix drafter alone. A ratio is a median of
the rounds' own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.acceptance.hindsight import Draft, Node, RowCurve, best_rule, foresight
from benchmarks.engine.step_cost import ScriptedDrafter
from benchmarks.lib.output import begin, show, write_rows
from benchmarks.lib.tasks import ALL_TASKS, Task, make_task
from folospec import LLM, SamplingParams
from folospec.models.loader import load_tokenizer
from folospec.trace.records import StepTrace

CHAINS = "scripted"
"""The drafter that says whatever makes a step of so many rows."""
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
STEPS = 6
"""Timed steps of every number of rows, in every round."""
PROMPTS = 4
"""Of a round."""

Row = dict[str, Any]


@dataclass(slots=True)
class Measured:
    """What one task at one temperature showed, round by round."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {"plain": [], "auto": []})
    prompt_seconds: list[float] = field(default_factory=list)
    """Of plain decoding: until the first tokens."""
    curves: list[dict[int, float]] = field(default_factory=list)
    drafts: list[Draft] = field(default_factory=list)
    tokens_equal: bool = True


class Engines:
    """The model, once for each way to run it."""

    def __init__(self, args: argparse.Namespace, max_len: int) -> None:
        self.max_len = max_len
        drafter = args.drafter
        chains = {"method": CHAINS, "num_speculative_tokens": max(ROWS) - 1}
        self.plain, self.auto, self.asked, self.chains = (
            _engine(args, speculative, max_len)
            for speculative in (
                None,
                "auto",
                {"method": drafter, "adaptive": False},
                {**chains, "adaptive": False},
            )
        )


def _engine(args: argparse.Namespace, speculative: Any, max_len: int) -> LLM:
    return LLM(
        args.model,
        speculative=speculative,
        dtype=args.dtype,
        max_num_seqs=1,
        max_model_len=max_len,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        strict_drafters=True,
    )


def measure(engines: Engines, task: Task, temperature: float, rounds: int) -> Measured:
    """Run the rounds; one before them, with prompts of its own, warms up."""
    found = Measured()
    for turn in range(-1, rounds):
        indices = range((turn + 1) * PROMPTS, (turn + 2) * PROMPTS)
        token_ids = {}
        for name in ("plain", "auto") if turn % 2 else ("auto", "plain"):
            llm = getattr(engines, name)
            seconds, until_first, token_ids[name] = complete(llm, task, indices, temperature)
            if turn >= 0:
                found.seconds[name].append(seconds)
                if name == "plain":
                    found.prompt_seconds.append(until_first)
        found.tokens_equal &= token_ids["plain"] == token_ids["auto"]
        curve = row_curve(engines.chains, task.items[indices[0]].prompt_token_ids, engines.max_len)
        drafts = all_drafts(engines.asked, task, indices, temperature)
        if turn >= 0:
            found.curves.append(curve)
            found.drafts += drafts
    return found


def complete(
    llm: LLM, task: Task, indices: Sequence[int], temperature: float
) -> tuple[float, float, list[list[int]]]:
    """Complete prompts one by one: seconds in all, and those until the first tokens."""
    outputs = []
    begin_at = time.perf_counter()
    for index in indices:
        request = {"prompt_token_ids": task.items[index].prompt_token_ids}
        outputs += llm.generate([request], task.params(index, temperature), use_tqdm=False)
    seconds = time.perf_counter() - begin_at
    metrics = [output.metrics for output in outputs]
    until_first = sum((m.first_token_time or 0.0) - m.arrival_time for m in metrics)
    return seconds, until_first, [output.outputs[0].token_ids for output in outputs]


def row_curve(llm: LLM, prompt: list[int], max_len: int) -> dict[int, float]:
    """Seconds of a step of the engine by its rows: a root and a chain that is mostly wrong."""
    ScriptedDrafter.futures = {}
    curve = {}
    for rows in ROWS:
        params = SamplingParams(
            temperature=0.0,
            max_tokens=max_len - len(prompt),
            ignore_eos=True,
            num_speculative_tokens=rows - 1,
        )
        request_id = f"rows-{rows}"
        llm.engine.add_request({"prompt_token_ids": prompt}, params, request_id)
        sequence = llm.engine.requests[request_id].sequences[0]
        while sequence.num_output_tokens == 0:
            llm.engine.step()
        times = []
        for _ in range(STEPS):
            begin_at = time.perf_counter()
            llm.engine.step()
            times.append(time.perf_counter() - begin_at)
        llm.engine.abort(request_id)
        curve[rows] = statistics.median(times)
    return curve


def all_drafts(llm: LLM, task: Task, indices: Sequence[int], temperature: float) -> list[Draft]:
    """What is drafted in every step behind the prompts, and what becomes of it."""
    steps: list[StepTrace] = []
    llm.engine.on_step = steps.append
    complete(llm, task, indices, temperature)
    llm.engine.on_step = None
    return [draft_of(step) for step in steps if step.sequences[0].num_tokens == 1]


def draft_of(step: StepTrace) -> Draft:
    proposal = step.sequences[0].proposal
    nodes: list[Node] = []
    for node in proposal.nodes if proposal is not None else ():
        before = nodes[node.parent].chance if node.parent >= 0 else 1.0
        chance = before * (1.0 if node.confidence is None else node.confidence)
        nodes.append(Node(chance, node.verdict == "accepted"))
    return nodes


def summary(found: Measured, tokens: int) -> Row:
    """The figures of a task.

    Args:
        tokens: new ones of a round.
    """
    plain = statistics.median(found.seconds["plain"])
    prompts = statistics.median(found.prompt_seconds)
    ratios = [p / a for p, a in zip(found.seconds["plain"], found.seconds["auto"], strict=True)]
    curve = RowCurve(
        {rows: statistics.median(own[rows] / own[1] for own in found.curves) for rows in ROWS}
    )
    rule, known = best_rule(found.drafts, curve), foresight(found.drafts, curve)

    def ratio_at(plain_steps_per_token: float) -> float:
        return plain / (prompts + (plain - prompts) * plain_steps_per_token)

    bound, auto = ratio_at(rule.plain_steps_per_token), statistics.median(ratios)
    accepted = sum(node.accepted for draft in found.drafts for node in draft)
    drafted = sum(bool(draft) for draft in found.drafts)
    return {
        "plain_tokens_per_second": tokens / plain,
        "auto_tokens_per_second": tokens / plain * auto,
        "bound_tokens_per_second": tokens / plain * bound,
        "auto_ratio": auto,
        "auto_ratios": ratios,
        "bound_ratio": bound,
        "foresight_ratio": ratio_at(known),
        "share_of_bound": auto / bound,
        "prompt_share": prompts / plain,
        "best_limit": rule.limit,
        "best_floor": rule.floor,
        "row_curve": {str(rows): curve(rows) for rows in ROWS},
        "acceptance_length": 1 + accepted / drafted if drafted else None,
        "share_drafted": drafted / len(found.drafts),
        "tokens_equal": found.tokens_equal,
    }


def measure_all(args: argparse.Namespace) -> Iterator[Row]:
    tokenizer = load_tokenizer(args.model)
    count = PROMPTS * (args.rounds + 1)
    tasks = [make_task(name, tokenizer, count, args.max_tokens) for name in args.tasks]
    items = [item for task in tasks for item in task.items]
    longest = max(len(item.prompt_token_ids) + item.max_tokens for item in items)
    max_len = longest + (STEPS + 1) * (max(ROWS) + 1)
    for task in tasks:
        for temperature in args.temperatures:
            engines = Engines(args, max_len)
            found = measure(engines, task, temperature, args.rounds)
            max_tokens = task.items[0].max_tokens
            yield {
                "benchmark": "bound",
                "model": args.model,
                "dtype": args.dtype,
                "drafter": args.drafter,
                "task": task.name,
                "temperature": temperature,
                "rounds": args.rounds,
                "max_tokens": max_tokens,
                "threads": torch.get_num_threads(),
                **summary(found, PROMPTS * max_tokens),
            }


def table(rows: Sequence[Row]) -> Table:
    result = Table(title="tokens per second, and times plain decoding")
    for header in ("task", "T", "plain", "auto", "bound", "auto x", "bound x", "foresight x"):
        result.add_column(header, justify="left" if header == "task" else "right", no_wrap=True)
    for header in ("auto / bound", "best: at most", "with a chance of", "prompts", "tokens"):
        result.add_column(header, justify="right")
    for row in rows:
        result.add_row(
            row["task"],
            f"{row['temperature']:g}",
            *(f"{row[f'{name}_tokens_per_second']:.1f}" for name in ("plain", "auto", "bound")),
            *(f"{row[f'{name}_ratio']:.2f}" for name in ("auto", "bound", "foresight")),
            f"{row['share_of_bound']:.2f}",
            str(row["best_limit"]),
            f"{row['best_floor']:.2f}",
            f"{row['prompt_share']:.0%}",
            "equal" if row["tokens_equal"] else "[red]differ[/red]",
        )
    return result


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="build/models/smollm2/bf16")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--tasks", type=_tasks, default="chat,code,file_editing")
    parser.add_argument("--temperatures", type=_floats, default="0")
    parser.add_argument("--drafter", default="suffix", help="the one that auto has")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, help="of an output at most")
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own")
    parser.add_argument("--out", type=Path, help="file of JSON lines; default: stdout")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"argument --rounds: must be at least 1, got {args.rounds}")
    if args.threads:
        torch.set_num_threads(args.threads)
    facts = begin(argv, __file__)
    rows = write_rows(({**row, "provenance": facts} for row in measure_all(args)), args.out)
    show(table(rows))
    return rows


def _floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _tasks(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in ALL_TASKS:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(ALL_TASKS)}, got {name!r}")
    return names


if __name__ == "__main__":
    main()
