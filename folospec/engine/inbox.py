"""Where outputs wait for whoever added the request, whichever thread runs the steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Generic, TypeVar

from folospec.engine.output_processor import Increment, Stream, make_output
from folospec.engine.request import Request
from folospec.outputs import RequestOutput

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
    def receive(self, request: Request) -> None:
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

    def receive(self, request: Request) -> None:
        self.put(make_output(request))

    def put(self, output: RequestOutput) -> None:
        self._outputs[output.request_id] = output

    def take(self) -> list[RequestOutput]:
        taken, self._outputs = list(self._outputs.values()), {}
        return taken


class Increments(Inbox[Increment]):
    """What one request has produced since the last look, step by step."""

    def __init__(self) -> None:
        super().__init__(every_step=True)
        self._stream = Stream()

    @property
    def outputs(self) -> Collection[object]:
        return self._stream.arrived

    def receive(self, request: Request) -> None:
        self._stream.take(request)

    def put(self, output: RequestOutput) -> None:
        self._stream.take_last(output)

    def take(self) -> list[Increment]:
        taken = list(self._stream.arrived)
        self._stream.arrived.clear()
        return taken
