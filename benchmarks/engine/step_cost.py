"""What a step costs, and where its time goes.

    python -m benchmarks.engine.step_cost --model MODEL --dtype bfloat16 --context 512
    python -m benchmarks.engine.step_cost --host

The first measures one target step with 1 to 64 rows: of one sequence, as the root and a chain of
drafts behind it, and of as many sequences, each with its last token; and in between how fast the
machine reads and multiplies, which says how fast a step could be, see `limits`. The second
measures what a step takes besides the model, which is about the same whatever the model is: greedy
and sampled, without drafts and with chains of `--drafts` that are right six times in seven.

JSON lines go to --out or stdout, a table to stderr. A time is the median over steps; every line has
the parts of `step_parts`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.table import Table

from benchmarks.engine.step_parts import PARTS, StepClock
from benchmarks.lib import limits
from benchmarks.lib.output import begin, show, write_rows
from benchmarks.lib.prompts import held_out_prompts, held_out_texts
from folospec import LLM, Drafter, Proposal, SamplingParams, register_drafter
from folospec.core.token_tree import TokenTree
from folospec.kernels import native_sampling
from folospec.models.loader import resolve_model

BLOCK_SIZE = 16
LIE_EVERY = 7
SAMPLED = {"temperature": 0.8, "top_p": 0.95}


class ScriptedDrafter(Drafter):
    """Drafts chains that were written down before: `futures` has the output of a sequence, of which
    every `LIE_EVERY`-th token is told wrong. Of a sequence that is not there it repeats the last
    token."""

    futures: dict[str, list[int]] = {}

    def propose(self, rows: list[Any]) -> list[Proposal | None]:
        return [self._chain(row) for row in rows]

    def _chain(self, row: Any) -> Proposal | None:
        length = min(row.max_draft_tokens, row.max_depth)
        future = self.futures.get(row.seq_id)
        if future is None:
            return Proposal(TokenTree.chain([row.token_ids[-1]] * length))
        done = len(row.token_ids) - row.num_prompt_tokens
        chain = [
            token_id ^ 1 if place % LIE_EVERY == 0 else token_id
            for place, token_id in enumerate(future[done : done + length], start=done)
        ]
        return Proposal(TokenTree.chain(chain)) if chain else None


register_drafter("scripted", ScriptedDrafter)


def timed_steps(
    clock: StepClock, llm: LLM, prompts: list[list[int]], params: SamplingParams, steps: int
) -> tuple[list[dict[str, float]], list[list[int]]]:
    """Run the prompts, then so many steps in which each has one part; the steps and the outputs."""
    engine = llm.engine
    ids = [f"r{index}" for index in range(len(prompts))]
    for request_id, prompt in zip(ids, prompts, strict=True):
        engine.add_request({"prompt_token_ids": prompt}, params, request_id)
    requests = [engine.requests[request_id] for request_id in ids]
    while any(request.sequences[0].num_output_tokens == 0 for request in requests):
        clock.step()
    begin_at = len(clock.steps)
    for _ in range(steps):
        clock.step()
    outputs = [list(request.sequences[0].output_token_ids) for request in requests]
    for request_id in ids:
        engine.abort(request_id)
    return clock.steps[begin_at:], outputs


def medians(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Milliseconds of the whole step, of the step without the model, and of each part."""
    host = [step["total"] - step["model"] for step in steps]
    return {
        "total_ms": 1e3 * statistics.median(step["total"] for step in steps),
        "host_ms": 1e3 * statistics.median(host),
        **{f"{part}_ms": 1e3 * statistics.median(step[part] for step in steps) for part in PARTS},
    }


def measure_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Chains and batches of every number of rows, in rounds, so that all see the same machine."""
    most = max(args.rows)
    length = args.context + 2 * args.steps + most
    llm = LLM(
        args.model,
        speculative={"method": "scripted", "num_speculative_tokens": max(most - 1, 1)},
        dtype=args.dtype,
        max_num_seqs=most,
        num_blocks=most * (-(-length // BLOCK_SIZE) + 1),
        block_size=BLOCK_SIZE,
        strict_drafters=True,
    )
    clock = StepClock(llm)
    ScriptedDrafter.futures = {}
    contexts = list(islice(_contexts(llm.tokenizer, args.context), most))
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    machines = []
    for _ in range(args.rounds):
        machines.append(limits.measure(torch.get_num_threads()))
        for shape in ("chain", "batch"):
            for rows in args.rows:
                params = SamplingParams(
                    temperature=0.0,
                    max_tokens=2 * args.steps + most,
                    ignore_eos=True,
                    num_speculative_tokens=rows - 1 if shape == "chain" else 0,
                )
                prompts = contexts[:1] if shape == "chain" else contexts[:rows]
                steps, _ = timed_steps(clock, llm, prompts, params, args.steps)
                found.setdefault((shape, rows), []).extend(steps)
    machine = limits.median_of(machines)
    work = limits.Work.of_checkpoint(resolve_model(args.model))
    one = medians(found["chain", args.rows[0]])["total_ms"]
    for (shape, rows), steps in found.items():
        times = medians(steps)
        settings = {"shape": shape, "rows": rows, "context": args.context, "steps": len(steps)}
        ratios = {"ratio_to_first": times["total_ms"] / one}
        sequences = rows if shape == "batch" else 1
        lengths = [args.context + args.steps // 2] * sequences
        ratios |= limit_of(machine, work, lengths, rows // sequences, args.dtype, times)
        yield {**settings, **ratios, **times}


def limit_of(
    machine: limits.Machine,
    work: limits.Work,
    contexts: Sequence[int],
    rows_each: int,
    dtype: str,
    times: dict[str, float],
) -> dict[str, float]:
    """The least time of such a step in ms, and the shares that were reached of it and of the read
    bandwidth alone. Rows of one sequence read its context once."""
    num_bytes, operations = work.step(contexts, dtype)
    least = machine.seconds(num_bytes, operations * rows_each, dtype)
    seconds = times["total_ms"] / 1e3
    return {
        "read_gb_per_second": machine.bytes_per_second / 1e9,
        "share_of_read": num_bytes / seconds / machine.bytes_per_second,
        "limit_ms": 1e3 * least,
        "share_of_limit": least / seconds,
    }


def _contexts(tokenizer: Any, length: int) -> Iterator[list[int]]:
    """Pieces of held-out code of this many tokens."""
    for text in cycle(held_out_texts()):
        token_ids = tokenizer(text)["input_ids"]
        yield from (
            token_ids[start : start + length]
            for start in range(0, len(token_ids) - length + 1, length)
        )


def measure_host(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Batches of every size, without drafts and with, drawn natively and by torch."""
    for sampling in args.sampling:
        loaded = native_sampling.load() if sampling == "native" else None
        with mock.patch.object(native_sampling, "load", lambda loaded=loaded: loaded):
            for batch, options in product(args.batches, ({"temperature": 0.0}, SAMPLED)):
                for drafts, steps, tokens in _host_steps(args, batch, options):
                    settings = {"sampling": sampling, "batch": batch, **options, "drafts": drafts}
                    counts = {"tokens_per_step": tokens, "steps": len(steps)}
                    yield {**settings, **counts, **medians(steps)}


def _host_steps(
    args: argparse.Namespace, batch: int, options: dict[str, float]
) -> Iterator[tuple[int, list[dict[str, float]], float]]:
    """Of both engines: drafts per step, the steps, and tokens per sequence and step."""
    ScriptedDrafter.futures = {}
    for drafts in (0, args.drafts):
        speculative = {"method": "scripted", "num_speculative_tokens": drafts} if drafts else None
        llm = LLM(
            args.model,
            speculative,
            dtype=args.dtype,
            max_num_seqs=batch,
            block_size=BLOCK_SIZE,
            num_blocks=batch * (-(-1024 // BLOCK_SIZE)),
            strict_drafters=True,
        )
        prompts = held_out_prompts(llm.tokenizer, batch)
        params = SamplingParams(**options, max_tokens=None, ignore_eos=True, seed=1)
        # The drafts of the second run are what the first one said: it has to say enough.
        count = args.steps if drafts else args.steps * (1 + args.drafts)
        steps, outputs = timed_steps(StepClock(llm), llm, prompts, params, count)
        yield drafts, steps, sum(map(len, outputs)) / batch / count
        ScriptedDrafter.futures = {f"r{i}-0": output for i, output in enumerate(outputs)}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    names = [name for name in rows[0] if not name.endswith("_ms") and name not in _FACTS]
    parts = [name for name in rows[0] if name.endswith("_ms")]
    columns = [*names, *(name.removesuffix("_ms") for name in parts)]
    shown = Table(*columns, title="milliseconds")
    for row in rows:
        shown.add_row(*(_cell(row.get(name)) for name in names), *(f"{row[p]:.3f}" for p in parts))
    return shown


_FACTS = ("benchmark", "model", "dtype", "provenance")


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    facts = begin(argv, __file__)
    benchmark = "host_time" if args.host else "step_cost"
    known = {"benchmark": benchmark, "model": args.model, "dtype": args.dtype}
    measured = measure_host(args) if args.host else measure_rows(args)
    rows = write_rows(({**known, **row, "provenance": facts} for row in measured), args.out)
    show(table(rows))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="folospec-demo")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--context", type=int, default=512, help="tokens of every sequence")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=3, help="of all numbers of rows")
    parser.add_argument("--steps", type=int, default=20, help="timed, of each round")
    parser.add_argument("--host", action="store_true", help="measure all but the model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--drafts", type=int, default=5, help="tokens of a chain, with --host")
    parser.add_argument(
        "--sampling", nargs="+", default=["torch", "native"], choices=("torch", "native")
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if args.host and args.steps == parser.get_default("steps"):
        args.steps = 60
    if "native" in args.sampling and args.host and native_sampling.load() is None:
        parser.error("there are no native kernels here: give --sampling torch")
    return args


if __name__ == "__main__":
    main()
