"""`folospec demo`: the main claim on this machine, in under a minute.

The prompts are functions of the installed Python whose modules the demo models never saw in
training: signature and docstring, as they stand in the source file.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.panel import Panel
from rich.rule import Rule
from rich.syntax import Syntax

from folospec.cli.info import cpu_name
from folospec.cli.render import (
    ACCEPTANCE_LENGTH,
    Measurement,
    console,
    progress_bar,
    rate_table,
)
from folospec.cli.runner import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    Counts,
    Interrupt,
    Run,
    bad_input,
    drive,
    make_engine,
    submit,
)
from folospec.sampling_params import SamplingParams
from folospec.speculative_config import AUTO

if TYPE_CHECKING:
    from folospec.engine.llm_engine import LLMEngine

TARGET, DRAFT = "folospec-demo", "folospec-demo-draft"
PLAIN = "plain"
FUNCTIONS = (
    ("bisect", "bisect_left"),
    ("textwrap", "indent"),
    ("copy", "copy"),
    ("shlex", "quote"),
    ("heapq", "heappushpop"),
    ("calendar", "monthrange"),
    ("glob", "escape"),
    ("statistics", "covariance"),
)
"""All of modules that training/corpus.py holds out."""
STOPS = ("\ndef ", "\nclass ", "\n@")
"""Where a function at module level has ended."""
WARM_UP_TOKENS = 8
MAX_ROUNDS = 3
TIME_LIMIT = 35.0
"""Seconds of measuring after which no further prompt is begun; the table says how far it came."""


def held_out_prompts() -> list[tuple[str, str]]:
    """Return (name, signature and docstring) of each function that this Python has.

    Raises:
        ValueError: it has none: its library is installed without sources.
    """
    found = []
    for module_name, function in FUNCTIONS:
        try:
            source = inspect.getsource(importlib.import_module(module_name))
        except (ImportError, OSError):
            continue
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and node.name == function:
                lines = source.splitlines()[node.lineno - 1 : node.body[0].end_lineno]
                found.append((f"{module_name}.{function}", "\n".join(lines)))
                break
    if not found:
        raise ValueError("this Python's standard library is installed without its sources")
    return found


@dataclass(slots=True)
class Trial:
    """The runs of every prompt by every method, as far as they came."""

    prompts: list[tuple[str, str]]
    engines: dict[str, LLMEngine]
    runs: dict[tuple[str, int], list[Run]] = field(default_factory=dict)
    """By method and index of the prompt."""
    interrupted: bool = False

    @property
    def finished(self) -> list[int]:
        """Prompts that every method has completed at least once."""
        every = range(len(self.prompts))
        return [i for i in every if all((method, i) in self.runs for method in self.engines)]

    def equal(self, method: str) -> bool:
        """Whether every run of the method has the tokens of plain decoding."""
        return all(
            run.token_ids == self.runs[PLAIN, i][0].token_ids
            for i in self.finished
            for run in self.runs[method, i]
        )

    def row(self, method: str) -> Measurement:
        """Sums over the prompts: counts of one run each, and the median of its times."""
        first = [self.runs[method, i][0] for i in self.finished]
        seconds = sum(
            statistics.median(run.seconds for run in self.runs[method, i]) for i in self.finished
        )
        counts = Counts(
            *(
                sum(getattr(run.counts, name) for run in first)
                for name in Counts.__dataclass_fields__
            )
        )
        # Plain decoding has a verdict too where it does not even repeat itself.
        equal = self.equal(method)
        shown = None if method == PLAIN and equal else equal
        return Measurement(method, sum(run.num_tokens for run in first), seconds, counts, shown)


def run_demo(*, max_tokens: int, num_speculative_tokens: int, **options: Any) -> int:
    """Run the demo and return the exit code: 1 if any token differs.

    Args:
        max_tokens: most tokens per completion. num_speculative_tokens: most draft tokens per
            step. options: dtype and device of the engines.
    """
    err = console(stderr=True)
    with bad_input():
        prompts = held_out_prompts()
    with err.status("loading the demo models"):
        engines = _engines(num_speculative_tokens, options)
    trial = Trial(prompts, engines)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, stop=STOPS)
    with Interrupt() as interrupt:
        _warm_up(trial, interrupt)
        _measure(trial, params, interrupt, deadline=time.perf_counter() + TIME_LIMIT)
    if not trial.finished:
        err.print("interrupted before the first prompt was done")
        return EXIT_INTERRUPTED
    rows = [trial.row(method) for method in trial.engines]
    _print(trial, rows, params, num_speculative_tokens)
    if trial.interrupted:
        return EXIT_INTERRUPTED
    return EXIT_FAILED if any(row.equal is False for row in rows) else 0


def fastest_named(rows: Sequence[Measurement]) -> Measurement:
    """The fastest of the drafters that were chosen by name."""
    return max((row for row in rows if row.method not in (PLAIN, AUTO)), key=lambda row: row.rate)


def shown_rows(rows: Sequence[Measurement]) -> list[Measurement]:
    """Plain decoding, the fastest drafter by name and "auto", in this order; then whatever else
    wrote other tokens than plain decoding."""
    by_method = {row.method: row for row in rows}
    shown = [by_method[PLAIN], fastest_named(rows), by_method[AUTO]]
    return shown + [row for row in rows if row.equal is False and row not in shown]


def sentence(rows: Sequence[Measurement]) -> str:
    """What the table shows."""
    named = [row.method for row in rows if row.method not in (PLAIN, AUTO)]
    return (
        f"The same prompts are completed three times: plain, with {fastest_named(rows).method} "
        f"(the fastest of the drafters {', '.join(named)}), and with auto, which decides in every "
        "step whether a draft pays."
    )


def _engines(num_speculative_tokens: int, options: dict[str, Any]) -> dict[str, LLMEngine]:
    from folospec import SpeculativeConfig

    engines = {PLAIN: make_engine(TARGET, warm_cache=False, max_num_seqs=1, **options)}
    for settings in _settings(num_speculative_tokens):
        engines[settings.get("method", AUTO)] = make_engine(
            TARGET,
            speculative=SpeculativeConfig.of(settings),
            warm_cache=False,
            max_num_seqs=1,
            **options,
        )
    return engines


def _settings(num_speculative_tokens: int) -> list[dict[str, Any]]:
    """What is compared with plain decoding. The last has the drafters that `speculative="auto"`
    would take, but keeps no finished texts, since every prompt comes in each round."""
    limit = {"num_speculative_tokens": num_speculative_tokens}
    draft_model = {"method": "draft_model", "model": DRAFT, **limit}
    suffix = {"method": "suffix", "max_cached_tokens": 0, **limit}
    return [
        {"method": "ngram", **limit},
        draft_model,
        {"drafters": [suffix, draft_model], "adaptive": True},
    ]


def _warm_up(trial: Trial, interrupt: Interrupt) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=WARM_UP_TOKENS)
    for engine in trial.engines.values():
        drive(engine, submit(engine, [trial.prompts[0][1]], [params]), interrupt)


def _measure(
    trial: Trial, params: SamplingParams, interrupt: Interrupt, *, deadline: float
) -> None:
    """Run each prompt with every method before the next prompt, so that the machine's moods hit all
    alike; the order of the methods turns."""
    num_prompts = len(trial.prompts)
    with progress_bar() as bar:
        task = bar.add_task("prompts", total=MAX_ROUNDS * num_prompts, note="")
        for turn in range(MAX_ROUNDS * num_prompts):
            index = turn % num_prompts
            if turn > 0 and time.perf_counter() > deadline:
                return
            for method in _rotated(list(trial.engines), turn + turn // num_prompts):
                if interrupt.requested:
                    trial.interrupted = True
                    return
                bar.update(task, note=f"{trial.prompts[index][0]}, {method}")
                engine = trial.engines[method]
                run = drive(engine, submit(engine, [trial.prompts[index][1]], [params]), interrupt)
                if not run.interrupted:
                    trial.runs.setdefault((method, index), []).append(run)
            bar.advance(task)


def _rotated(items: list[str], by: int) -> Iterator[str]:
    return (items[(i + by) % len(items)] for i in range(len(items)))


def _print(
    trial: Trial, rows: list[Measurement], params: SamplingParams, num_speculative_tokens: int
) -> None:
    out = console()
    shown = trial.finished[0]
    name, prompt = trial.prompts[shown]
    out.print(_panel(name, prompt, trial.runs[AUTO, shown][0].outputs[0].outputs[0].text))
    out.print(sentence(rows), soft_wrap=not out.is_terminal)
    out.print(rate_table(shown_rows(rows), out.width))
    stats = trial.engines[PLAIN].stats()
    num_runs = [len(trial.runs[PLAIN, i]) for i in trial.finished]
    runs = (
        f"{min(num_runs)}"
        if min(num_runs) == max(num_runs)
        else (f"{min(num_runs)} to {max(num_runs)}")
    )
    out.print(
        f"{TARGET}, draft {DRAFT}, {stats['dtype']}, {stats['device']} ({cpu_name()})\n"
        f"batch 1, temperature 0, at most {params.max_tokens} tokens per prompt, "
        f"{num_speculative_tokens} draft tokens per step, auto as many of them as pay\n"
        f"{len(trial.finished)} of {len(trial.prompts)} held-out functions of Python "
        f"{platform.python_version()}, methods in turns, medians of {runs} runs\n"
        "tokens/s: output tokens / time, the prompt's computation included",
        style="dim",
        soft_wrap=not out.is_terminal,
    )
    out.print(ACCEPTANCE_LENGTH, style="dim", soft_wrap=not out.is_terminal)
    if trial.interrupted:
        out.print("interrupted: the table has what was done until then")
    if any(row.equal is False for row in rows):
        out.print("tokens equal: no", style="bold red")
    else:
        out.print("tokens equal: yes", style="bold green")


def _code(text: str) -> Syntax:
    return Syntax(text, "python", theme="ansi_dark", background_color="default", word_wrap=True)


def _panel(name: str, prompt: str, completion: str) -> Panel:
    return Panel(
        Group(
            _code(prompt),
            Rule("written by the model", style="dim"),
            _code(completion.strip("\n")),
        ),
        title=name,
        title_align="left",
        border_style="dim",
    )
