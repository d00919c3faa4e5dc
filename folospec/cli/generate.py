"""`folospec generate`: where prompts come from, and how completions are shown."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from folospec.cli.render import (
    console,
    output_record,
    print_run,
    progress_bar,
    summary_lines,
    write,
)
from folospec.cli.runner import EXIT_INTERRUPTED, Interrupt, Run, drive, submit
from folospec.cli.steps import StepsView
from folospec.config import SpeculativeConfig

if TYPE_CHECKING:
    from folospec.engine.llm_engine import LLMEngine
    from folospec.outputs import RequestOutput
    from folospec.sampling_params import SamplingParams


def read_prompts(prompts: Sequence[str], files: Sequence[str]) -> list[str]:
    """Collect the prompts: the arguments, then the files, or else stdin.

    A file is one prompt; a .jsonl file has one per line, a JSON string or an object with "prompt".
    One newline at the end of a file is the editor's, not the prompt's, and is left out.

    Raises:
        ValueError: there is no prompt, or a file cannot be read as prompts.
    """
    found = list(prompts)
    for name in files:
        found += _read_file(name)
    if not prompts and not files:
        if sys.stdin is None or sys.stdin.isatty():
            raise ValueError("no prompt: give one as an argument, with --file, or on stdin")
        found.append(_without_last_newline(sys.stdin.read()))
    for prompt in found:
        if not prompt:
            raise ValueError("the prompt is empty; it must have at least one token")
    return found


def _read_file(name: str) -> list[str]:
    if name == "-":
        return [_without_last_newline(sys.stdin.read())]
    try:
        text = Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--file {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--file {name}: not UTF-8 text: {error}") from None
    if not name.endswith(".jsonl"):
        return [_without_last_newline(text)]
    return [
        _read_line(line, f"--file {name}, line {number}")
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip()
    ]


def _read_line(line: str, place: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON: {error}") from None
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise ValueError(f'{place}: must be a string or an object with "prompt", got {line}')
    return prompt


def check_compare(config: SpeculativeConfig | None, *, show_steps: bool, trace: str | None) -> None:
    """Refuse what does not go with `--compare`.

    Raises:
        ValueError: there is nothing to compare, or something would slow it.
    """
    if config is None:
        raise ValueError("--compare needs --speculative")
    if show_steps or trace is not None:
        option = "--show-steps" if show_steps else "--trace"
        raise ValueError(f"{option} would slow what --compare measures; use one of them")


def read_prediction(file: str | None) -> str | None:
    """Read `--prediction`: the text of a file.

    Raises:
        ValueError: it cannot be read.
    """
    if file is None:
        return None
    try:
        return Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prediction: cannot read {file}: {error}") from None


def check_prediction(engine: LLMEngine, params: SamplingParams) -> None:
    """Refuse a prediction that nobody reads, and a sole drafter that has none to read.

    Raises:
        ValueError: it is so.
    """
    speculation = engine.speculation
    if params.prediction is not None and not speculation.needs.prediction:
        raise ValueError("--prediction needs a drafter that reads it")
    sole = len(speculation.drafters) == 1
    if params.prediction is None and speculation.needs.prediction and sole:
        name = speculation.drafters[0].name
        raise ValueError(f"the {name} drafter needs --prediction FILE, the output it expects")


def _without_last_newline(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")


def read_speculative(
    text: str | None, *, num_speculative_tokens: int | None, acceptance: str | None
) -> SpeculativeConfig | None:
    """Read `--speculative`: a drafter's name, NAME:MODEL, several of them with commas between, or
    JSON.

    Raises:
        ValueError: it is none of these, or the other two are given without it.
    """
    settings = {"num_speculative_tokens": num_speculative_tokens, "acceptance": acceptance}
    given = {name: value for name, value in settings.items() if value is not None}
    if text is None:
        if given:
            option = next(iter(given)).replace("_", "-")
            raise ValueError(f"--{option} needs --speculative")
        return None
    value = _read_json(text) if text.lstrip().startswith(("{", "[")) else _read_names(text)
    mapping = value if isinstance(value, dict) else {"drafters": value}
    return SpeculativeConfig.of({**mapping, **given})


def _read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--speculative is not valid JSON: {error}; got {text}") from None


def _read_names(text: str) -> dict[str, str] | list[dict[str, str]]:
    drafters = []
    for name in text.split(","):
        method, _, model = name.partition(":")
        drafters.append({"method": method, "model": model} if model else {"method": method})
    return drafters[0] if len(drafters) == 1 else drafters


def complete(
    engine: LLMEngine,
    prompts: list[str],
    params: SamplingParams,
    *,
    as_json: bool,
    show_steps: bool = False,
) -> int:
    """Complete the prompts, print what comes, and return the exit code."""
    request_ids = submit(engine, prompts, [params] * len(prompts))
    with Interrupt() as interrupt:
        if as_json:
            run = _run_with_bar(engine, request_ids, interrupt)
            _print_json(run)
        elif show_steps:
            labelled = len(prompts) > 1 or params.n > 1
            run = _run_with_steps(engine, request_ids, interrupt, labelled=labelled)
            print_run(console(), run)
        elif len(prompts) == 1 and params.n == 1:
            run = _stream(engine, request_ids, prompts[0], interrupt)
        else:
            run = _run_with_bar(engine, request_ids, interrupt)
            print_run(console(), run)
    if not as_json:
        for line in summary_lines(run):
            console(stderr=True).print(line, style="dim")
    return EXIT_INTERRUPTED if run.interrupted else 0


def _stream(engine: LLMEngine, request_ids: list[str], prompt: str, interrupt: Interrupt) -> Run:
    """Write the text as it comes. On a terminal the prompt stands before it, dimmed; a pipe gets
    the completion alone."""
    out = console()
    if out.is_terminal:
        out.print(Text(prompt, style="dim"), end="", soft_wrap=True)
    num_sent = 0

    def show(touched: list[RequestOutput]) -> None:
        nonlocal num_sent
        for output in touched:
            text = output.outputs[0].text
            write(out, text[num_sent:])
            num_sent = max(num_sent, len(text))

    run = drive(engine, request_ids, interrupt, show)
    write(out, run.outputs[0].outputs[0].text[num_sent:] + "\n")
    return run


def _run_with_bar(engine: LLMEngine, request_ids: list[str], interrupt: Interrupt) -> Run:
    num_tokens: dict[str, int] = {}
    with progress_bar() as bar:
        task = bar.add_task("prompts", total=len(request_ids), note="")

        def show(touched: list[RequestOutput]) -> None:
            for output in touched:
                num_tokens[output.request_id] = sum(len(c.token_ids) for c in output.outputs)
                bar.advance(task, int(output.finished))
            bar.update(task, note=f"{sum(num_tokens.values())} tokens")

        return drive(engine, request_ids, interrupt, show)


def _run_with_steps(
    engine: LLMEngine, request_ids: list[str], interrupt: Interrupt, *, labelled: bool
) -> Run:
    view = StepsView(console(), labelled=labelled)
    view.show_header(engine.tracer.header)
    engine.on_step = view.show
    return drive(engine, request_ids, interrupt)


def _print_json(run: Run) -> None:
    """One line per prompt."""
    for output in run.outputs:
        write(console(), json.dumps(output_record(output)) + "\n")
