"""Defines the errors of requests and of the engine.

Wrong input is a `ValueError`, before anything runs.
"""

from __future__ import annotations

from folospec.outputs import RequestOutput


class EngineBrokenError(RuntimeError):
    """The engine failed in a step and no single request is the cause. It runs nothing any more;
    `__cause__` is the first error. `stats` and `abort` still work."""


class EngineClosedError(RuntimeError):
    """The engine was closed."""


class RequestError(RuntimeError):
    """A request ended with an error, and the caller asked to have it raised.

    `output` is the request's `RequestOutput`, with the tokens it got before.
    """

    def __init__(self, message: str, output: RequestOutput) -> None:
        super().__init__(message)
        self.output = output
