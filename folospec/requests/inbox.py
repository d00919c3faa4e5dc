"""Holds outputs for whoever added the request, whichever thread runs the steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from folospec.core.sequence import Sequence, SequenceGroup
from folospec.outputs import RequestOutput
from folospec.requests.output_processor import OutputProcessor, SequenceOutput

T = TypeVar("T")


class Inbox(ABC, Generic[T]):
    """What the requests of one caller have produced and the caller has not taken yet.

    Args:
        every_step: outputs of running requests are wanted too, not only of those that ended.
    """

    def __init__(self, *, every_step: bool = False) -> None:
        self.every_step = every_step
        self.unfinished: dict[str, None] = {}
        """Ids of the requests that still run, in the order they were added."""

    @property
    @abstractmethod
    def outputs(self) -> Collection[object]:
        """What waits."""

    @abstractmethod
    def receive(self, group: SequenceGroup, outputs: OutputProcessor) -> None:
        """Add what a request has produced."""

    @abstractmethod
    def put(self, output: RequestOutput) -> None:
        """Add the last output of a request that was ended."""

    @abstractmethod
    def take(self) -> list[T]:
        """Return what waits, and keep none of it."""


class Snapshots(Inbox[RequestOutput]):
    """The newest output of each request; outputs are cumulative."""

    def __init__(self, *, every_step: bool = False) -> None:
        super().__init__(every_step=every_step)
        self._outputs: dict[str, RequestOutput] = {}

    @property
    def outputs(self) -> Collection[object]:
        return self._outputs

    def receive(self, group: SequenceGroup, outputs: OutputProcessor) -> None:
        self.put(outputs.make_output(group))

    def put(self, output: RequestOutput) -> None:
        self._outputs[output.request_id] = output

    def take(self) -> list[RequestOutput]:
        taken, self._outputs = list(self._outputs.values()), {}
        return taken


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """What `stream` yields: new text and tokens of completion `index`; the last one has a finish
    reason, and the error where that is "error"."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    error: str | None = None


@dataclass(slots=True)
class StreamState:
    """How much of a completion has been streamed."""

    num_chars: int = 0
    num_tokens: int = 0
    finished: bool = False


class Stream:
    """The increments of one request. Each costs as much as it has, not as the output so far."""

    def __init__(self) -> None:
        self.arrived: deque[OutputDelta] = deque()
        self._streamed: dict[int, StreamState] = {}

    def take(self, completions: Iterable[tuple[Sequence, SequenceOutput]]) -> None:
        """Add what a request has beyond what was taken, by completion; an end is taken once."""
        for index, (seq, output) in enumerate(completions):
            sent = self._streamed.setdefault(index, StreamState())
            text = output.new_text(sent.num_chars)
            token_ids = seq.output_token_ids[sent.num_tokens :]
            self._add(OutputDelta(index, text, token_ids, output.finish_reason, output.error))

    def take_last(self, output: RequestOutput) -> None:
        """Add what the last output of a request has beyond what was taken."""
        for c in output.outputs:
            sent = self._streamed.setdefault(c.index, StreamState())
            text, token_ids = c.text[sent.num_chars :], c.token_ids[sent.num_tokens :]
            self._add(OutputDelta(c.index, text, token_ids, c.finish_reason, c.error))

    def _add(self, delta: OutputDelta) -> None:
        sent, is_last = self._streamed[delta.index], delta.finish_reason is not None
        if sent.finished or not (delta.text or delta.token_ids or is_last):
            return
        sent.num_chars += len(delta.text)
        sent.num_tokens += len(delta.token_ids)
        sent.finished = is_last
        self.arrived.append(delta)


class DeltaInbox(Inbox[OutputDelta]):
    """What one request has produced since the last look, step by step."""

    def __init__(self) -> None:
        super().__init__(every_step=True)
        self._stream = Stream()

    @property
    def outputs(self) -> Collection[object]:
        return self._stream.arrived

    def receive(self, group: SequenceGroup, outputs: OutputProcessor) -> None:
        self._stream.take(outputs.completions(group))

    def put(self, output: RequestOutput) -> None:
        self._stream.take_last(output)

    def take(self) -> list[OutputDelta]:
        taken = list(self._stream.arrived)
        self._stream.arrived.clear()
        return taken
