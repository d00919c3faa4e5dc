"""Tracks whether an engine can run: what breaks it, what closes it, what a step forbids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from folospec.errors import EngineBrokenError, EngineClosedError
from folospec.requests.open_requests import describe


class EngineState:
    """Usable, closed or broken; inside a step or not.

    Args:
        strict_drafters: a drafter's error comes out of the step and does not break the engine.
    """

    def __init__(self, *, strict_drafters: bool) -> None:
        self.is_closed = False
        self.broken_by: BaseException | None = None
        """The error that broke the engine."""
        self.calls_drafters = False
        """Set by a step while drafters run: in strict mode it can end there, and the next one goes
        on."""
        self._strict_drafters = strict_drafters
        self._is_stepping = False

    def require_usable(self) -> None:
        """
        Raises:
            EngineBrokenError: the engine is broken.
            EngineClosedError: it was closed.
        """
        if self.is_closed:
            raise EngineClosedError("the engine is closed; make a new one")
        if self.broken_by is not None:
            raise EngineBrokenError(
                f"the engine is broken since a step failed: {describe(self.broken_by)}"
            ) from self.broken_by

    def refuse_inside_step(self, what: str) -> None:
        """
        Raises:
            RuntimeError: a step runs, and a logits processor or a drafter calls `what`.
        """
        if self._is_stepping:
            raise RuntimeError(f"{what} cannot be called from inside a step")

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Any error that leaves a step breaks the engine, except a drafter's in strict mode.

        Raises:
            RuntimeError: a step runs already, and calls this.
            EngineBrokenError, EngineClosedError: see `require_usable`; the step has failed, or one
                before.
        """
        self.refuse_inside_step("step")
        self.require_usable()
        self._is_stepping, self.calls_drafters = True, False
        try:
            yield
        except BaseException as error:
            if self._strict_drafters and self.calls_drafters and isinstance(error, Exception):
                raise
            self.broken_by = error
            if isinstance(error, Exception):
                self.require_usable()
            raise
        finally:
            self._is_stepping = False
