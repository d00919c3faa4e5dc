"""The loop that serves many records: a window of requests in the engine, results as they finish."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from folospec.cli.batch_input import InputRecord
from folospec.cli.batch_request import BatchRequest, RequestTemplate, chat_prompt
from folospec.cli.batch_result import Result
from folospec.cli.runner import Counts, Interrupt, bad_input

if TYPE_CHECKING:
    from folospec.engine.llm_engine import LLMEngine
    from folospec.outputs import RequestOutput

WINDOW_PER_SEQUENCE = 2
"""Requests in the engine for each sequence that it runs at once: the next are always there."""


@dataclass(slots=True)
class Totals:
    """What a run did."""

    num_prompts: int = 0
    """Prompts that finished or failed."""
    num_failed: int = 0
    num_cut: int = 0
    """Prompts in the engine when the run was interrupted."""
    num_tokens: int = 0
    """Output tokens, those of prompts that were cut included."""
    seconds: float = 0.0
    """From the first prompt read to the end of the last request: prompts are computed in it."""
    interrupted: bool = False
    counts: Counts = field(default_factory=Counts)


class Batch:
    """Serves records in order with at most `window` requests in the engine.

    Args:
        on_result: takes every result as it finishes; at the end of an interrupted run also those
            that were cut.
        on_step: takes a snapshot of the requests that a step touched.
    """

    def __init__(
        self,
        engine: LLMEngine,
        template: RequestTemplate,
        on_result: Callable[[Result], None],
        on_step: Callable[[list[RequestOutput]], None] | None = None,
    ) -> None:
        self.engine, self.template = engine, template
        self.on_result, self.on_step = on_result, on_step
        self.window = WINDOW_PER_SEQUENCE * engine.config.max_num_seqs
        self.totals = Totals()
        self._in_flight: dict[str, BatchRequest] = {}

    def run(self, records: Iterable[InputRecord], interrupt: Interrupt) -> Totals:
        """Serve all records, or those that finish before the interrupt.

        Raises:
            typer.Exit: with 2 and a line on stderr, if a source cannot be read, or a record that is
                alone in its source cannot be served.
            OSError: a result cannot be written.
        """
        before, begin = self.engine.stats(), time.perf_counter()
        records = iter(records)
        while not interrupt.requested:
            self._fill(records, interrupt)
            if not self._in_flight:
                break
            if not interrupt.requested:
                self._step()
        self._cut()
        totals, after = self.totals, self.engine.stats()
        totals.seconds = time.perf_counter() - begin
        totals.interrupted = interrupt.requested
        totals.counts = Counts(*(after[f.name] - before[f.name] for f in fields(Counts)))
        return totals

    def _fill(self, records: Iterator[InputRecord], interrupt: Interrupt) -> None:
        while len(self._in_flight) < self.window and not interrupt.requested:
            with bad_input():
                record = interrupt.wait_for(lambda: next(records, None))
                error = None if record is None else self._submit(record)
            if record is None:
                return
            if error is not None:
                self._take(Result(record, error=error))

    def _submit(self, record: InputRecord) -> str | None:
        """Queue a record; return what is wrong with it, where others go on."""
        try:
            request = self.template.read(record)
            self._in_flight[add_request(self.engine, request)] = request
        except ValueError as error:
            if not record.is_one_of_many:
                raise ValueError(f"{record.place}: {error}") from None
            return str(error)
        return None

    def _step(self) -> None:
        touched = self.engine.step(finished_only=self.on_step is None)
        if self.on_step is not None:
            self.on_step(touched)
        for output in touched:
            if output.finished:
                record = self._in_flight.pop(output.request_id).record
                self._take(Result(record, output, error=failure(output)))

    def _take(self, result: Result) -> None:
        self.on_result(result)
        totals = self.totals
        totals.num_prompts += not result.is_cut
        totals.num_failed += result.error is not None
        totals.num_cut += result.is_cut
        if result.output is not None:
            totals.num_tokens += sum(len(c.token_ids) for c in result.output.outputs)

    def _cut(self) -> None:
        """End what an interrupt left in the engine."""
        for request_id, request in self._in_flight.items():
            output = self.engine.abort(request_id)
            if output is not None:
                self._take(Result(request.record, output, is_cut=True))
        self._in_flight.clear()


def add_request(engine: LLMEngine, request: BatchRequest) -> str:
    """Queue a request and return the engine's id for it.

    Raises:
        ValueError: it cannot be served.
    """
    prompt = chat_prompt(engine, request.prompt) if request.is_chat else request.prompt
    return engine.add_request(prompt, request.params)


def failure(output: RequestOutput) -> str | None:
    """Why the engine gave a request up; None if it did not."""
    if output.error is not None:
        return output.error
    is_aborted = any(completion.finish_reason == "abort" for completion in output.outputs)
    return "the engine ended the request" if is_aborted else None
