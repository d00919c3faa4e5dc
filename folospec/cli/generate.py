"""`folospec generate`: checks what goes together, and connects input, engine and output."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from folospec.cli.batch import Batch, Totals
from folospec.cli.batch_ids import check_ids, refuse_repeated_ids
from folospec.cli.batch_input import Source, count_records, find_sources, read_records
from folospec.cli.batch_output import Journal
from folospec.cli.batch_request import RequestTemplate
from folospec.cli.batch_view import (
    BatchView,
    JsonLines,
    ResultWriter,
    TextList,
    TextStream,
    print_summary,
)
from folospec.cli.render import console
from folospec.cli.runner import Interrupt, bad_input, make_engine
from folospec.cli.steps import StepsView
from folospec.sampling_params import SamplingParams
from folospec.speculative_config import SpeculativeConfig

if TYPE_CHECKING:
    from folospec.engine.llm_engine import LLMEngine
    from folospec.outputs import RequestOutput

    OnStep = Callable[[list[RequestOutput]], None]

DEFAULT_SAMPLING = {"temperature": 0.0, "max_tokens": 128}
"""Of fields that neither the command line nor the model's generation config sets."""
"""What the command takes where neither a line nor an option says anything."""


_SAMPLING = ("n", "max_tokens", "temperature", "top_p", "top_k")
_ENGINE = (
    *("dtype", "kv_cache_dtype", "quantization", "device", "attention_backend", "block_size"),
    *("max_num_seqs", "max_model_len", "deterministic", "generation_config"),
    *("gpu_memory_utilization", "enforce_eager", "multi_step", "trace"),
)
_ITS_OWN = (
    *("input_format", "chat", "system", "output", "overwrite", "retry_failed", "json", "model"),
    *("seed", "compare", "rounds", "show_steps"),
)
"""Parameters of the command line by where they go, under their own names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """The options of the command. Those in `sampling` and `engine` were given, or have a default of
    their own."""

    prompts: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    input_format: str = "auto"
    chat: bool = False
    system: str | None = None
    output: str | None = None
    overwrite: bool = False
    retry_failed: bool = False
    json: bool = False
    model: str = "folospec-demo"
    speculative: SpeculativeConfig | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `SamplingParams`, the seed not among them."""
    seed: int | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `EngineConfig`."""
    compare: bool = False
    rounds: int | None = None
    show_steps: bool = False

    @classmethod
    def of(cls, given: Mapping[str, Any], prediction: str | None) -> GenerateOptions:
        """From what the command line has, by the names of its parameters.

        Args:
            prediction: the file with the expected output.

        Raises:
            ValueError: the file of a prediction cannot be read, or drafting is asked for in a way
                that there is not.
        """
        sampling = {name: given[name] for name in _SAMPLING if given[name] is not None}
        if given["stop"]:
            sampling.update(stop=list(given["stop"]))
        if prediction is not None:
            sampling.update(prediction=read_prediction(prediction))
        drafting = read_speculative(
            given["speculative"],
            num_speculative_tokens=given["num_speculative_tokens"],
            acceptance=given["acceptance"],
        )
        return cls(
            prompts=list(given["prompts"] or ()),
            files=list(given["file"] or ()),
            speculative=drafting,
            sampling=sampling,
            engine={name: given[name] for name in _ENGINE},
            **{name: given[name] for name in _ITS_OWN},
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What the tokens of a record depend on, by the names of the options: results of other
        settings do not belong in one file. A drafter or a prediction changes no token, an
        acceptance rule may."""
        rule = self.speculative.acceptance if self.speculative is not None else "coupled"
        sampling = dict(self.sampling)
        sampling.pop("prediction", None)
        names = ("dtype", "kv_cache_dtype", "quantization", "generation_config")
        return {
            "model": self.model,
            **sampling,
            "seed": self.seed or 0,
            "chat": self.chat,
            "system": self.system,
            "acceptance": rule,
            **{name: self.engine.get(name) for name in names},
        }


def read_speculative(
    text: str | None, *, num_speculative_tokens: int | None, acceptance: str | None
) -> SpeculativeConfig | None:
    """Read `--speculative`, as `SpeculativeConfig.of` does, with the two options above it.

    Raises:
        ValueError: it is no such text, or the other two are given without it.
    """
    config = SpeculativeConfig.of(text)
    if config is None:
        for option, value in (
            ("--num-speculative-tokens", num_speculative_tokens),
            ("--acceptance", acceptance),
        ):
            if value is not None:
                raise ValueError(f"{option} needs --speculative")
        return None
    if num_speculative_tokens is not None:
        drafters = (
            replace(drafter, num_speculative_tokens=num_speculative_tokens)
            for drafter in config.drafters
        )
        config = replace(config, drafters=tuple(drafters))
    return config if acceptance is None else replace(config, acceptance=acceptance)


def read_prediction(file: str) -> str:
    """Read `--prediction`: the text of a file.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prediction: cannot read {file}: {error}") from None


def run_generate(options: GenerateOptions) -> int:
    """Run the command and return its exit code."""
    with ExitStack() as stack:
        with bad_input():
            _check_options(options)
            sources = find_sources(options.prompts, options.files, options.input_format)
            check_ids(sources)
            records = refuse_repeated_ids(read_records(sources))
            first = list(islice(records, 2))
            if not first:
                raise ValueError(f"no prompt in {', '.join(source.title for source in sources)}")
            records = chain(first, records)
            journal = _journal(options, sources)
            if journal is not None:
                stack.callback(journal.close)
                records = journal.missing(records)
                first_missing = next(records, None)
                if first_missing is None:
                    return print_summary(Totals(), journal)
                records = chain([first_missing], records)
        engine = make_engine(
            options.model,
            speculative=options.speculative,
            warm_cache=not options.compare,
            **options.engine,
        )
        with bad_input():
            template = _template(options, engine)
            _check_prediction(engine, template, sources)
        if options.compare:
            from folospec.cli.compare import compare

            rounds = options.rounds or 3
            return compare(engine, template, records, rounds=rounds, as_json=options.json)
        value = first[0].value if len(first) == 1 else None
        is_single = isinstance(value, str) and template.sampling.get("n", 1) == 1
        writer, on_step = _writer(options, engine, journal, is_single=is_single)
        view = BatchView(writer, journal)
        batch = Batch(engine, template, view.take, on_step)
        with view.shown(lambda: count_records(sources)), Interrupt() as interrupt:
            totals = batch.run(records, interrupt)
            writer.finish()
        code = print_summary(totals, journal)
        return interrupt.exit_code if totals.interrupted else code


def _journal(options: GenerateOptions, sources: list[Source]) -> Journal | None:
    if options.output is None:
        return None
    for source in sources:
        if source.is_file and os.path.realpath(source.name) == os.path.realpath(options.output):
            raise ValueError(f"--output {options.output}: is an input, too")
    return Journal(
        options.output,
        options.settings,
        overwrite=options.overwrite,
        retry_failed=options.retry_failed,
    )


def _check_options(options: GenerateOptions) -> None:
    """Refuse options that do not go together.

    Raises:
        ValueError: it is so.
    """
    SamplingParams(**options.sampling)
    if options.show_steps and options.json:
        raise ValueError("--show-steps is for reading; with --json use --trace FILE")
    if options.system is not None and not options.chat:
        raise ValueError("--system needs --chat")
    for name in ("overwrite", "retry_failed"):
        if getattr(options, name) and options.output is None:
            raise ValueError(f"--{name.replace('_', '-')} needs --output")
    if not options.compare:
        if options.rounds is not None:
            raise ValueError("--rounds needs --compare")
        return
    if options.speculative is None:
        raise ValueError("--compare needs --speculative")
    if options.output is not None:
        raise ValueError("--output does not go with --compare, which prints a table")
    if options.show_steps or options.engine.get("trace") is not None:
        option = "--show-steps" if options.show_steps else "--trace"
        raise ValueError(f"{option} would slow what --compare measures; use one of them")


def _template(options: GenerateOptions, engine: LLMEngine) -> RequestTemplate:
    """What holds for every request: the options that were given, then what the model's generation
    config says, then the command's own defaults.

    Raises:
        ValueError: the sampling options do not go together.
    """
    sampling = {**DEFAULT_SAMPLING, **engine.components.sampling_defaults, **options.sampling}
    SamplingParams(**sampling)
    return RequestTemplate(
        sampling=sampling, seed=options.seed or 0, chat=options.chat, system=options.system
    )


def _check_prediction(engine: LLMEngine, template: RequestTemplate, sources: list[Source]) -> None:
    """Refuse a prediction that no drafter reads, and a sole drafter that has none to read.

    Raises:
        ValueError: it is so.
    """
    needs_prediction = engine.proposer.needs.prediction
    has_prediction = SamplingParams(**template.sampling).prediction is not None
    if has_prediction and not needs_prediction:
        raise ValueError("--prediction needs a drafter that reads it")
    lines_have_none = not any(source.format in ("json", "jsonl") for source in sources)
    drafters = engine.proposer.drafters
    if needs_prediction and not has_prediction and lines_have_none and len(drafters) == 1:
        raise ValueError(
            f"the {drafters[0].name} drafter needs --prediction FILE, the output it expects"
        )


def _writer(
    options: GenerateOptions, engine: LLMEngine, journal: Journal | None, *, is_single: bool
) -> tuple[ResultWriter, OnStep | None]:
    """Return where results go, and what takes the outputs of every step.

    Args:
        is_single: there is one text, and one completion of it.
    """
    out = console()
    if options.show_steps:
        view = StepsView(out, labelled=not is_single)
        view.show_header(engine.tracer.header)
        engine.on_step = view.show
    if journal is not None:
        return journal, None
    if options.json:
        return JsonLines(), None
    if is_single and not options.show_steps:
        stream = TextStream(out)
        return stream, stream.show
    return TextList(out, is_numbered=not is_single, at_the_end=options.show_steps), None
