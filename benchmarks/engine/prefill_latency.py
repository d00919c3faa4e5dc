"""How long those who decode wait for their next token while a long prompt is computed.

    python -m benchmarks.engine.prefill_latency --out prefill_latency.jsonl
    python -m benchmarks.engine.prefill_latency --model PATH --dtype bfloat16

Eight requests decode, and after some tokens a prompt of 4,000 tokens arrives, or none does: both in
turn, in every round, for each `--slowdowns` (`max_prefill_slowdown`; "none" is no limit). The time
between two outputs of a request is that of a step. Counted are the steps from the arrival to the
first token of the long prompt, and with no prompt as many from the same place on. A ratio is a
percentile of one over that of the other, its median over the rounds.

The bundled models have 1,024 positions. A copy of the demo with more is made here: its texts make
no sense there, and take the same time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.lib.output import begin, show, write_rows
from benchmarks.lib.prompts import held_out_prompts, held_out_texts
from folospec import LLM, SamplingParams
from folospec.models.loader import resolve_model

POSITIONS = 8192
TEMPERATURE = 0.8
"""A small model that decodes greedily soon repeats itself, and drafts become as long as they never
are in use."""
TOKENS_BEFORE = 32
"""Of every decoding request, when the long prompt arrives."""
PERCENTILES = (50, 95, 99)

Row = dict[str, Any]


def with_positions(model: str, folder: Path) -> Path:
    """A copy of a checkpoint whose config allows `POSITIONS` positions."""
    copy = shutil.copytree(resolve_model(model), folder / "model")
    config = copy / "config.json"
    config.chmod(0o644)
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": POSITIONS})
    )
    return copy


def run(llm: LLM, others: list[list[int]], prompt: list[int], num_steps: int | None) -> list[float]:
    """Seconds of the steps from the arrival of `prompt` to its first token; with `num_steps` there
    is no such prompt, and so many steps."""
    engine = llm.engine
    params = SamplingParams(temperature=TEMPERATURE, max_tokens=None, ignore_eos=True)
    ids = [engine.add_request({"prompt_token_ids": own}, params) for own in others]
    firsts = [engine.requests[one].sequences[0] for one in ids]
    while min(seq.num_output_tokens for seq in firsts) < TOKENS_BEFORE:
        engine.step(finished_only=True)
    if num_steps is None:
        ids.append(engine.add_request({"prompt_token_ids": prompt}, params))
        late = engine.requests[ids[-1]].sequences[0]
    seconds: list[float] = []
    while len(seconds) < num_steps if num_steps is not None else late.num_output_tokens == 0:
        started = time.perf_counter()
        engine.step(finished_only=True)
        seconds.append(time.perf_counter() - started)
    for one in ids:
        engine.abort(one)
    return seconds


def percentile(values: Sequence[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, percent * len(ordered) // 100)]


def rows(args: Any, facts: Row, folder: Path) -> Iterator[Row]:
    model = str(with_positions(args.model, folder))
    known = {
        "benchmark": "prefill_latency",
        **{name: getattr(args, name) for name in ("model", "dtype", "requests", "prompt")},
        "speculative": args.speculative,
    }
    engines = {
        slowdown: LLM(
            model,
            args.speculative,
            dtype=args.dtype,
            max_num_seqs=args.requests + 1,
            max_prefill_slowdown=slowdown,
            enable_prefix_caching=False,
        )
        for slowdown in args.slowdowns
    }
    tokenizer = next(iter(engines.values())).tokenizer
    texts = chain.from_iterable(tokenizer(text)["input_ids"] for text in held_out_texts())
    prompt = list(islice(texts, args.prompt))
    # Each run has its own: with the same ones again, drafters would copy earlier answers.
    others = iter(held_out_prompts(tokenizer, args.requests * 2 * (args.rounds + 1)))
    found: dict[float | None, list[Row]] = {slowdown: [] for slowdown in args.slowdowns}
    for number in range(args.rounds + 1):
        first, second = (list(islice(others, args.requests)) for _ in range(2))
        for slowdown, llm in engines.items():
            beside = run(llm, first, prompt, None)
            alone = run(llm, second, prompt, max(len(beside), args.least_steps))
            if number:
                found[slowdown].append(_round(beside, alone))
    for slowdown, rounds in found.items():
        medians = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
        yield {**known, "slowdown": slowdown, "rounds": args.rounds, **medians, "provenance": facts}


def _round(beside: list[float], alone: list[float]) -> Row:
    found: Row = {"steps": len(beside), "first_token_seconds": sum(beside)}
    for percent in PERCENTILES:
        ms = 1e3 * percentile(alone, percent)
        found[f"alone_p{percent}_ms"] = ms
        found[f"ratio_p{percent}"] = 1e3 * percentile(beside, percent) / ms
    return found


def table(found: Sequence[Row]) -> Table:
    shown = Table(title="Time between outputs next to a long prompt, over that without one")
    names = ["steps", "first_token_seconds", "alone_p95_ms"]
    names += [f"ratio_p{percent}" for percent in PERCENTILES]
    for header in ("max_prefill_slowdown", *names):
        shown.add_column(header, justify="right")
    for row in found:
        shown.add_row(str(row["slowdown"]), *(f"{row[name]:.2f}" for name in names))
    return shown


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="folospec-demo", help="checkpoint or bundled name")
    parser.add_argument("--speculative", help="default: none")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--requests", type=int, default=8, help="that decode")
    parser.add_argument("--prompt", type=int, default=4000, help="tokens of the long prompt")
    parser.add_argument("--slowdowns", type=_slowdowns, default=[None, 1.75])
    parser.add_argument("--rounds", type=int, default=3, help="after one that warms up")
    parser.add_argument("--least-steps", type=int, default=100, help="without a prompt")
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own")
    parser.add_argument("--out", type=Path, help="file of JSON lines; default: stdout")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    facts = begin(argv, __file__)
    with tempfile.TemporaryDirectory() as folder:
        show(table(write_rows(rows(args, facts, Path(folder)), args.out)))


def _slowdowns(text: str) -> list[float | None]:
    return [None if part == "none" else float(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
