"""Lets one thread at a time into the engine, and holds Ctrl-C back during a change."""

from __future__ import annotations

# The functions of `signal` look up every handler in an enum and take 30 us a step; these take 1.
import _signal  # type: ignore[import-not-found]
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from signal import SIGINT
from types import FrameType
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_POLL = 0.1
"""Seconds between two looks at a Ctrl-C that arrived while the thread waits for its turn."""


class Exclusive:
    """A re-entrant lock. A thread that leaves it and comes back lets those that wait go first.

        thread A    [ step ]          [ step ]          [ step ]
        thread B      waits [ step ]    waits [ step ]

    A Ctrl-C that arrives inside is raised when the thread leaves; a second one is raised at once.
    """

    def __init__(self) -> None:
        # Whoever waits for the lock holds the turn, so a thread that just left has to queue.
        self._turn, self._lock = threading.Lock(), threading.Lock()
        self._thread = _ThreadState()

    @property
    def depth(self) -> int:
        """How often this thread has entered, counted before it waits and until it has left."""
        return self._thread.depth

    def __enter__(self) -> None:
        thread = self._thread
        if thread.depth > 0:
            thread.depth += 1
            return
        thread.held.hold()
        thread.depth = 1
        try:
            _acquire(self._turn, thread.held)
            try:
                _acquire(self._lock, thread.held)
            finally:
                self._turn.release()
        except BaseException:
            thread.depth = 0
            thread.held.release()
            raise

    def __exit__(self, *exception: object) -> None:
        thread = self._thread
        if thread.depth > 1:
            thread.depth -= 1
            return
        self._lock.release()
        thread.depth = 0
        thread.held.release()

    @contextmanager
    def holding_interrupts(self) -> Iterator[HeldInterrupt]:
        """Keep a Ctrl-C back although the thread leaves and comes back; the caller hands it over
        with `raise_now`."""
        held = self._thread.held
        held.hold()
        try:
            yield held
        finally:
            held.release()


class _ThreadState(threading.local):
    """What `Exclusive` knows of the thread that asks."""

    def __init__(self) -> None:
        self.depth = 0
        self.held = HeldInterrupt()


class Guarded(Protocol):
    """What has an `Exclusive` for its methods."""

    _exclusive: Exclusive


S = TypeVar("S", bound=Guarded)


def exclusive(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Run a method inside its object's `Exclusive`."""

    @wraps(method)
    def inside(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._exclusive:
            return method(self, *args, **kwargs)

    return inside


def _acquire(lock: threading.Lock, held: HeldInterrupt) -> None:
    while not lock.acquire(timeout=_POLL):
        held.raise_now()


class HeldInterrupt:
    """Keeps a Ctrl-C back between the first `hold` and the last `release`, in the main thread,
    where Python raises it. A second Ctrl-C is not kept."""

    def __init__(self) -> None:
        self._count = 0
        self._previous: Callable[[int, FrameType | None], Any] | None = None
        self._signum: int | None = None

    def hold(self) -> None:
        if self._count == 0 and threading.current_thread() is threading.main_thread():
            previous = _signal.getsignal(SIGINT)
            if callable(previous):  # neither ignored nor handled outside of Python
                self._previous = previous
                _signal.signal(SIGINT, self._note)
        self._count += 1

    def release(self) -> None:
        """Give the handler back, and let it have what was kept from it."""
        self._count -= 1
        if self._count == 0 and self._previous is not None:
            _signal.signal(SIGINT, self._previous)
            try:
                self.raise_now()
            finally:
                self._previous = None

    def raise_now(self) -> None:
        """Hand over a kept Ctrl-C, where that does no harm."""
        if self._previous is not None and self._signum is not None:
            signum, self._signum = self._signum, None
            self._previous(signum, None)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is not None:
            self._signum = None
            if self._previous is not None:
                self._previous(signum, frame)
        else:
            self._signum = signum
