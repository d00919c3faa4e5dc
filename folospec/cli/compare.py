"""`folospec generate --compare`: the same prompts and seeds, plain and speculative, in turns."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console

from folospec.cli.batch import add_request
from folospec.cli.batch_input import InputRecord
from folospec.cli.batch_request import BatchRequest, RequestTemplate, chat_prompt
from folospec.cli.batch_result import output_record
from folospec.cli.render import (
    ACCEPTANCE_LENGTH,
    Measurement,
    console,
    print_run,
    progress_bar,
    rate_table,
    write,
)
from folospec.cli.runner import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    Interrupt,
    Run,
    bad_input,
    drive,
    first_difference,
    submit,
)

if TYPE_CHECKING:
    from folospec.engine.llm_engine import LLMEngine
    from folospec.sampling_params import SamplingParams

WARM_UP_TOKENS = 8


@dataclass(slots=True)
class Comparison:
    """The finished runs of both methods, round by round; `cut` is the one that Ctrl-C cut short."""

    method: str
    plain: list[Run] = field(default_factory=list)
    speculative: list[Run] = field(default_factory=list)
    interrupted: bool = False
    cut: Run | None = None

    @property
    def num_rounds(self) -> int:
        """Rounds that both have finished."""
        return min(len(self.plain), len(self.speculative))

    @property
    def difference(self) -> tuple[Run, tuple[int, int, int]] | None:
        """The first run that differs from the first plain one, and where: prompt, completion,
        token."""
        for run in [*self.plain[1:], *self.speculative]:
            where = first_difference(self.plain[0].token_ids, run.token_ids)
            if where is not None:
                return run, where
        return None

    @property
    def rows(self) -> list[Measurement]:
        equal = self.difference is None
        return [_measure("plain", self.plain, None), _measure(self.method, self.speculative, equal)]


def _measure(method: str, runs: Sequence[Run], equal: bool | None) -> Measurement:
    seconds = statistics.median(run.seconds for run in runs)
    return Measurement(method, runs[0].num_tokens, seconds, runs[0].counts, equal)


def compare(
    engine: LLMEngine,
    template: RequestTemplate,
    records: Iterable[InputRecord],
    *,
    rounds: int,
    as_json: bool,
) -> int:
    """Run all records with both methods `rounds` times in turns, print the comparison, and return
    the exit code: 1 if tokens differ although the acceptance rule promises that they do not.

    One engine serves both: a request with `num_speculative_tokens=0` is a plain one. Every request
    has a seed of its own; without one the engine would derive another for each run.
    """
    assert engine.config.speculative is not None
    with bad_input():  # whatever is wrong is said before anything runs
        requests = [_checked(engine, template, record) for record in records]
    prompts, keyed = [r.prompt for r in requests], [r.params for r in requests]
    comparison = Comparison(engine.config.speculative.label)
    with Interrupt() as interrupt:
        _run(comparison, engine, prompts, keyed, rounds, interrupt)
    if not comparison.num_rounds:
        done = comparison.plain[0] if comparison.plain else comparison.cut
        if done is not None:
            print_run(console(), done)
        console(stderr=True).print("interrupted before both methods had finished a round")
        return EXIT_INTERRUPTED
    distribution_only = engine.stats()["lossless"] == "distribution"
    if as_json:
        write(console(), json.dumps(_record(engine, comparison, distribution_only)) + "\n")
    else:
        _print(engine, comparison, distribution_only)
    if comparison.interrupted:
        return EXIT_INTERRUPTED
    return EXIT_FAILED if comparison.difference and not distribution_only else 0


def _checked(engine: LLMEngine, template: RequestTemplate, record: InputRecord) -> BatchRequest:
    """Read a record and see that the engine takes it.

    Raises:
        ValueError: it cannot be served.
    """
    try:
        request = template.read(record)
        if request.is_chat:
            request = replace(request, prompt=chat_prompt(engine, request.prompt), is_chat=False)
        engine.abort(add_request(engine, request))
    except ValueError as error:
        raise ValueError(f"{record.place}: {error}") from None
    return request


def _run(
    comparison: Comparison,
    engine: LLMEngine,
    prompts: list[Any],
    params: list[SamplingParams],
    rounds: int,
    interrupt: Interrupt,
) -> None:
    plain = [replace(one, num_speculative_tokens=0) for one in params]
    for one in (plain[0], params[0]):
        short = replace(one, max_tokens=WARM_UP_TOKENS, min_tokens=0)
        drive(engine, submit(engine, prompts[:1], [short]), interrupt)
    turns = [(comparison.plain, plain), (comparison.speculative, params)]
    with progress_bar() as bar:
        task = bar.add_task("runs", total=2 * rounds, note="")
        for round_index in range(rounds):
            for runs, ones in turns if round_index % 2 == 0 else reversed(turns):
                run = drive(engine, submit(engine, prompts, ones), interrupt)
                if interrupt.requested:
                    comparison.interrupted = True
                    comparison.cut = run
                    return
                runs.append(run)
                bar.advance(task)


def _print(engine: LLMEngine, comparison: Comparison, distribution_only: bool) -> None:
    out = console()
    runs, config = comparison.speculative, engine.config.speculative
    if len(runs[0].outputs) == 1:
        print_run(out, runs[0])
    out.print(rate_table(comparison.rows, out.width))
    stats = engine.stats()
    assert config is not None
    most = stats["num_speculative_tokens"]
    drafting = f"up to {most} draft tokens, acceptance {config.acceptance}"
    out.print(f"{engine.config.model}, {stats['dtype']}, {stats['device']}, {drafting}")
    num_prompts, cut = len(runs[0].outputs), ", interrupted" if comparison.interrupted else ""
    batch = f"{num_prompts} prompts in one batch" if num_prompts > 1 else "1 prompt"
    out.print(f"{batch}, median of {comparison.num_rounds} rounds in turns{cut}")
    out.print("tokens/s: output tokens / time, the prompts' computation included", style="dim")
    out.print(ACCEPTANCE_LENGTH, style="dim", soft_wrap=not out.is_terminal)
    _print_verdict(out, engine, comparison, distribution_only)


def _print_verdict(
    out: Console, engine: LLMEngine, comparison: Comparison, distribution_only: bool
) -> None:
    found = comparison.difference
    if found is None:
        out.print("tokens equal: yes", style="bold green")
        return
    out.print("tokens equal: no", style="bold yellow" if distribution_only else "bold red")
    run, (prompt, completion, place) = found
    plain, other = (
        _token(engine, r.token_ids[prompt][completion], place) for r in (comparison.plain[0], run)
    )
    which = f"prompt {prompt + 1}, completion {completion + 1}, token {place + 1}"
    out.print(f"first difference: {which}: plain {plain}, the other run {other}", soft_wrap=True)
    if distribution_only:
        out.print("this acceptance rule promises the same distribution, not the same tokens")


def _token(engine: LLMEngine, token_ids: list[int], place: int) -> str:
    if place >= len(token_ids):
        return "has ended"
    token_id = token_ids[place]
    return f"{engine.tokenizer.decode([token_id])!r} ({token_id})"


def _record(engine: LLMEngine, comparison: Comparison, distribution_only: bool) -> dict[str, Any]:
    found, stats, rows = comparison.difference, engine.stats(), comparison.rows
    return {
        "model": engine.config.model,
        "dtype": stats["dtype"],
        "device": stats["device"],
        "promise": "distribution" if distribution_only else "tokens",
        "num_prompts": len(comparison.plain[0].outputs),
        "num_rounds": comparison.num_rounds,
        "methods": [row.as_dict(rows[0]) for row in rows],
        "tokens_equal": found is None,
        "first_difference": None
        if found is None
        else dict(zip(("prompt", "completion", "token"), found[1], strict=True)),
        "outputs": [output_record(output) for output in comparison.speculative[0].outputs],
    }
