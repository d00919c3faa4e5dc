"""What every command needs to run requests: one-line errors, Ctrl-C between steps, and counts."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import typer

if TYPE_CHECKING:
    from folospec.engine.llm_engine import LLMEngine
    from folospec.outputs import RequestOutput
    from folospec.sampling_params import SamplingParams

T = TypeVar("T")
EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextmanager
def bad_input() -> Iterator[None]:
    """Turn the refusal of what the user gave into one line on stderr and exit code 2.

    Only admission belongs inside: a ValueError from anywhere else is a defect, and keeps its
    traceback. A Ctrl-C stays one, although a library may turn it into another error: one that
    arrives while torch looks at an argument says that the argument has no shape.
    """
    interrupts: list[int] = []
    try:
        with _noted(interrupts):
            yield
    except (ValueError, OSError) as error:
        if interrupts:
            raise KeyboardInterrupt from None
        if isinstance(error, OSError) and error.errno in (*_CANNOT_WRITE, errno.EPIPE):
            raise  # no input is wrong
        typer.echo(f"folospec: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(EXIT_BAD_INPUT) from None


@contextmanager
def _noted(interrupts: list[int]) -> Iterator[None]:
    """Add every SIGINT to the list, and hand it on to the handler from before."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return

    def note(signum: int, frame: FrameType | None) -> None:
        interrupts.append(signum)
        previous(signum, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def ends_quietly() -> Iterator[None]:
    """Turn what is no defect into one line on stderr: a Ctrl-C that nothing else took, while a
    model loads for example, is exit code 130, and a full disk is 1."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("folospec: interrupted", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise  # a pipe that nobody reads any more is typer's
        _discard_stdout()
        where = error.filename or "the output"
        typer.echo(f"folospec: cannot write {where}: {error.strerror}", err=True)
        raise typer.Exit(EXIT_FAILED) from None


def _discard_stdout() -> None:
    """What stdout could not take is tried once more when Python ends; let that succeed."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def write_any_text() -> None:
    """Escape characters that the terminal's or the locale's encoding does not have."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class Interrupt:
    """While entered, the first SIGINT or SIGTERM only sets `requested`, so that a step is never cut
    in two; a second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}
        self._is_waiting = False

    @property
    def requested(self) -> bool:
        return self.signum is not None

    @property
    def exit_code(self) -> int:
        """As a shell has it: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + (self.signum or 0)

    def wait_for(self, read: Callable[[], T]) -> T | None:
        """Return what `read` returns, or None as soon as there is a signal: a read from a pipe may
        take for ever."""
        self._is_waiting = True
        try:
            return None if self.requested else read()
        except KeyboardInterrupt:
            if not self.requested:
                raise
            return None
        finally:
            self._is_waiting = False

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        is_second = self.requested
        self.signum = signum
        if is_second or self._is_waiting:
            raise KeyboardInterrupt


@dataclass(slots=True)
class Counts:
    """What the engine counted during a run; the names are those of its `stats()`."""

    num_target_passes: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    @property
    def acceptance_length(self) -> float | None:
        """1 + accepted / drafts; None without drafts."""
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else None


@dataclass(slots=True)
class Run:
    """The requests of one batch, in the order they were given, those cut off by Ctrl-C included."""

    outputs: list[RequestOutput]
    seconds: float
    """From the first step to the end of the last request: prompts are computed in it."""
    interrupted: bool = False
    counts: Counts = field(default_factory=Counts)

    @property
    def token_ids(self) -> list[list[list[int]]]:
        """Output token ids, by prompt and completion."""
        return [[c.token_ids for c in output.outputs] for output in self.outputs]

    @property
    def num_tokens(self) -> int:
        return sum(len(token_ids) for prompt in self.token_ids for token_ids in prompt)


def make_engine(
    model: str, *, speculative: Any = None, warm_cache: bool = True, **options: Any
) -> LLMEngine:
    """Load an engine. `options` are fields of `EngineConfig`.

    Args:
        warm_cache: let later requests reuse the KV of earlier ones; off where runs are timed.
    """
    from folospec.cli.startup import show_loaded, shows_loading

    with bad_input(), shows_loading(model):
        from folospec import EngineConfig, LLMEngine  # torch takes a while, too

        config = EngineConfig(
            model=model, speculative=speculative, enable_prefix_caching=warm_cache, **options
        )
        engine = LLMEngine(config)
    show_loaded(model, engine)
    return engine


def submit(
    engine: LLMEngine, prompts: Sequence[Any], params: Sequence[SamplingParams]
) -> list[str]:
    """Queue every prompt with its parameters; exits with one line where one cannot be served."""
    with bad_input():
        return [engine.add_request(p, one) for p, one in zip(prompts, params, strict=True)]


def drive(
    engine: LLMEngine,
    request_ids: Sequence[str],
    interrupt: Interrupt,
    on_step: Callable[[list[RequestOutput]], None] | None = None,
) -> Run:
    """Step until the requests are done or Ctrl-C came; what is unfinished then is aborted and
    returned as it is.

    Args:
        on_step: is shown a snapshot of the requests that a step touched.
    """
    before = engine.stats()
    begin = time.perf_counter()
    done: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests and not interrupt.requested:
        touched = engine.step()
        done.update((output.request_id, output) for output in touched if output.finished)
        if on_step is not None:
            on_step(touched)
    seconds = time.perf_counter() - begin
    cut = {i: output for i in request_ids if (output := engine.abort(i)) is not None}
    after = engine.stats()
    counts = Counts(*(after[f.name] - before[f.name] for f in fields(Counts)))
    return Run([(done | cut)[i] for i in request_ids], seconds, bool(cut), counts)


def first_difference(
    left: list[list[list[int]]], right: list[list[list[int]]]
) -> tuple[int, int, int] | None:
    """Return (prompt, completion, token) where two runs of the same prompts first differ, counted
    from 0; None if they are equal."""
    for prompt, (one, other) in enumerate(zip(left, right, strict=True)):
        for completion, (a, b) in enumerate(zip(one, other, strict=True)):
            if a != b:
                same = (x == y for x, y in zip(a, b, strict=False))
                return (
                    prompt,
                    completion,
                    next((i for i, ok in enumerate(same) if not ok), min(len(a), len(b))),
                )
    return None
