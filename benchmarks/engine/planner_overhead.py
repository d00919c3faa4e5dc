"""What a step under the planner costs more than a plain step, by function.

    python -m benchmarks.engine.planner_overhead --out planner_overhead.jsonl

Two engines, one plain and one with `speculative="auto"`, decode the same prompts, and their steps
alternate, so that both see the same machine. Every call of the table is timed by the CPU time of
its thread, less the calls of the table inside it: the rows of a kind of step add up to the whole.
The clocks are in both engines, and their own time, one to two microseconds a call, is in the
figures.

    plain       a step of the plain engine
    resting     the last plan, of no drafts, still holds
    planned     a new plan, and nobody is asked
    drafting    somebody is asked

A figure is the mean over the steps of its kind, without the slowest twentieth; microseconds.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.lib.output import begin, show, write_rows
from benchmarks.lib.prompts import held_out_prompts
from folospec import LLM, SamplingParams

KINDS = ("plain", "resting", "planned", "drafting")
KEPT = 0.95
REST = "the loop"

Row = dict[str, Any]


class SelfClock:
    """Times calls by the CPU time of the thread, without the timed calls inside them."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._inside = [0.0]
        """Of every open call, what the timed calls inside it took."""

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        setattr(owner, attribute, self.timed(getattr(owner, attribute), name))

    def timed(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            started = time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                whole = time.thread_time() - started
                self.spent[name] += whole - self._inside.pop()
                self._inside[-1] += whole

        return wrapped


def clocked(llm: LLM) -> SelfClock:
    """An engine's calls with clocks; those of the planner where it has one."""
    clock, engine = SelfClock(), llm.engine
    runner, proposer = engine.components.target, engine.proposer
    calls = [
        (engine.scheduler, "schedule"),
        (engine, "_propose"),
        (engine.worker, "execute"),
        (runner, "forward"),
        (runner.model, "forward"),
        (runner.model, "logits"),
        (engine.verifier, "verify"),
        (engine.committer, "commit"),
        (engine.open, "deliver"),
        (proposer, "plan"),
        (proposer, "propose"),
        (proposer, "observe"),
        (proposer, "record_step"),
    ]
    steps = proposer.step_planner
    if steps is not None:
        planner = steps.planner
        calls += [(steps, "begin"), (steps, "note_schedule"), (steps, "prune")]
        calls += [(planner, "resting"), (planner, "plan"), (planner, "record_step")]
        calls += [(planner, "drop"), (planner.estimates.cost, "observe"), (steps, "take")]
        calls += [(proposer.calls, "propose"), (proposer._updates, "send")]
        for handle in engine.components.handles:
            for hook in ("propose", "observe", "finish", "drop"):
                clock.wrap(handle.drafter, hook, f"{handle.name}.{hook}")
    for owner, attribute in calls:
        clock.wrap(owner, attribute, f"{type(owner).__name__}.{attribute.lstrip('_')}")
    engine._advance = clock.timed(engine._advance, REST)  # type: ignore[method-assign]
    return clock


def measure(args: Any, temperature: float, batch: int) -> Iterator[Row]:
    """The steps of both engines, by kind."""
    engines = {name: _engine(args, name, batch) for name in (None, "auto")}
    clocks = {name: clocked(llm) for name, llm in engines.items()}
    prompts = held_out_prompts(engines[None].tokenizer, batch * args.rounds)
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    turn = False
    for number in range(args.rounds):
        for llm in engines.values():
            for index, prompt in enumerate(prompts[number * batch : (number + 1) * batch]):
                seed = number * batch + index
                params = SamplingParams(
                    temperature=temperature, max_tokens=args.max_tokens, ignore_eos=True, seed=seed
                )
                llm.engine.add_request({"prompt_token_ids": prompt}, params)
        while all(llm.engine.requests for llm in engines.values()):
            turn = not turn
            for name in sorted(engines, key=str, reverse=turn):
                kind, spent = _step(engines[name], clocks[name])
                if number and kind:
                    found[kind].append(spent)
        for llm in engines.values():
            for request_id in list(llm.engine.requests):
                llm.engine.abort(request_id)
    for kind, steps in found.items():
        if steps:
            yield {"temperature": temperature, "batch": batch, "kind": kind, **_mean(steps)}


def _step(llm: LLM, clock: SelfClock) -> tuple[str | None, dict[str, float]]:
    """One step: its kind, None where prompts are computed, and what it spent."""
    engine = llm.engine
    has_prompts = any(s.num_tokens - s.num_computed_tokens > 1 for s in engine.scheduler.running)
    has_prompts |= bool(engine.scheduler.waiting)
    clock.spent.clear()
    engine.step(finished_only=True)
    spent = dict(clock.spent)
    planner = engine.proposer.step_planner
    if has_prompts:
        return None, spent
    if planner is None:
        return "plain", spent
    if not planner.is_idle:
        return "drafting", spent
    return ("resting" if planner.is_resting else "planned"), spent


def _mean(steps: Sequence[dict[str, float]]) -> Row:
    """Microseconds of every call, over the steps that are not among the slowest."""
    kept = sorted(steps, key=lambda step: sum(step.values()))[: max(1, int(KEPT * len(steps)))]
    names = sorted({name for step in kept for name in step})
    means = {name: 1e6 * sum(step.get(name, 0.0) for step in kept) / len(kept) for name in names}
    return {"steps": len(steps), "total_us": sum(means.values()), "calls_us": means}


def _engine(args: Any, speculative: str | None, batch: int) -> LLM:
    return LLM(
        args.model,
        speculative=speculative,
        dtype=args.dtype,
        max_num_seqs=batch,
        enable_prefix_caching=False,
        strict_drafters=True,
    )


def rows(args: Any, facts: Row) -> Iterator[Row]:
    known = {"benchmark": "planner_overhead", "model": args.model, "dtype": args.dtype}
    for temperature, batch in product(args.temperatures, args.batches):
        for row in measure(args, temperature, batch):
            yield {**known, **row, "provenance": facts}


def table(found: Sequence[Row]) -> Table:
    """One column for every kind of step in every setting."""
    shown = Table(title="microseconds of CPU time in a step, by call")
    shown.add_column("call")
    for row in found:
        where = f"T {row['temperature']:g}, {row['batch']}"
        shown.add_column(f"{where}\n{row['kind']}\n{row['steps']} steps", justify="right")
    names = sorted(
        {name for row in found for name in row["calls_us"]},
        key=lambda name: -max(row["calls_us"].get(name, 0.0) for row in found),
    )
    shown.add_row("total", *(f"{row['total_us']:.0f}" for row in found))
    for name in names:
        cells = (row["calls_us"].get(name) for row in found)
        shown.add_row(name, *("" if cell is None else f"{cell:.1f}" for cell in cells))
    return shown


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="folospec-demo", help="checkpoint or bundled name")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.8, 1.5])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=8, help="of a batch of prompts; one warms up")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--out", type=Path, help="file of JSON lines; default: stdout")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # the CPU time of one thread is then that of the step
    facts = begin(argv, __file__)
    show(table(write_rows(rows(args, facts), args.out)))


if __name__ == "__main__":
    main()
