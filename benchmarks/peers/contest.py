"""The contest itself: one group of contestants, all loaded, one cell after another, in turns.

A cell is a task at a temperature and a batch size. In every round each contestant completes the
same prompts; a round has prompts of its own, so that nobody answers from memory; and it starts with
another contestant each time, so that a drift of the machine meets all:

    round -1 (untimed)   A B C       the first prompts, a few tokens
    round 0              A B C       the next ones
    round 1              B C A
    round 2              C A B

Who raises or takes too long is out of the cell, with an error; the others go on. A worker that is
gone is started again for the next cell.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from benchmarks.peers.contestants import Contestant
from benchmarks.peers.process import WorkerError

MIN_PROMPTS = 4
"""At small batch sizes several batches run one after the other: one prompt's luck is not a rate."""
WARM_UP_TOKENS = 8


class Worker(Protocol):
    @property
    def is_running(self) -> bool: ...

    def start(self, load: Mapping[str, Any]) -> dict[str, Any]: ...

    def ask(self, command: Mapping[str, Any]) -> dict[str, Any]: ...

    def memory_bytes(self) -> int | None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Cell:
    task: str
    temperature: float
    batch: int

    @property
    def num_prompts(self) -> int:
        """Of a round."""
        return self.batch * -(-MIN_PROMPTS // self.batch)


@dataclass(slots=True)
class Entry:
    """What a contestant did in a cell, round by round."""

    contestant: Contestant
    group: int
    seconds: list[float] = field(default_factory=list)
    token_ids: list[list[list[int]]] = field(default_factory=list)
    details: dict[str, float] = field(default_factory=dict)
    memory_bytes: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    error: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Group:
    """Contestants whose workers are loaded together.

    Args:
        index: its number, for the rows.
        contestants: who takes part.
        make_worker: makes a contestant's process; it need not be started.
        make_load: makes the message that a contestant's process is started with.
        note: told what happens next.
    """

    def __init__(
        self,
        index: int,
        contestants: Sequence[Contestant],
        make_worker: Callable[[Contestant], Worker],
        make_load: Callable[[Contestant], Mapping[str, Any]],
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.index, self.contestants = index, list(contestants)
        self.make_worker, self.make_load, self.note = make_worker, make_load, note
        self.workers: dict[str, Worker] = {}
        self.versions: dict[str, dict[str, str]] = {}
        self.failed_loads: dict[str, str] = {}

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.close()

    def measure(
        self, cell: Cell, rounds: Sequence[list[list[int]]], max_tokens: int
    ) -> list[Entry]:
        """Run a cell.

        Args:
            rounds: the prompts of every round, those of the warm-up first.
        """
        entries = [Entry(c, self.index) for c in self.contestants if c.takes(cell.batch)]
        for entry in entries:
            self._try(entry, self._prepare)
        for turn in range(-1, len(rounds) - 1):
            first = max(turn, 0) % len(entries)
            for entry in [*entries[first:], *entries[:first]]:
                if entry.error is None:
                    self.note(
                        f"{cell.task} T={cell.temperature:g} batch {cell.batch}, "
                        f"round {turn}: {entry.contestant.name}"
                    )
                    self._try(entry, partial(self._run, cell, turn, rounds[turn + 1], max_tokens))
        return entries

    def _try(self, entry: Entry, action: Callable[[Entry], None]) -> None:
        try:
            action(entry)
        except (WorkerError, RuntimeError, OSError, ValueError) as error:
            entry.error = f"{type(error).__name__}: {error}"

    def _prepare(self, entry: Entry) -> None:
        """Have the contestant's worker running, and remembering nothing."""
        worker = self.workers.get(entry.contestant.worker)
        if worker is not None and worker.is_running:
            worker.ask({"command": "reset"})
        else:
            self._start(entry.contestant)
        entry.versions = self.versions[entry.contestant.worker]

    def _start(self, contestant: Contestant) -> None:
        name = contestant.worker
        if name in self.failed_loads:
            raise WorkerError(self.failed_loads[name])
        if name not in self.workers:
            self.workers[name] = self.make_worker(contestant)
        self.note(f"loading {name}")
        try:
            answer = self.workers[name].start(self.make_load(contestant))
        except (WorkerError, RuntimeError, OSError) as error:
            self.failed_loads[name] = str(error)
            raise
        self.versions[name] = answer["versions"]

    def _run(
        self, cell: Cell, turn: int, prompts: list[list[int]], max_tokens: int, entry: Entry
    ) -> None:
        contestant = entry.contestant
        worker = self.workers[contestant.worker]
        if not worker.is_running:  # another contestant in the same process has brought it down
            self._start(contestant)
        answer = worker.ask(
            {
                "command": "run",
                "prompts": prompts[: cell.batch] if turn < 0 else prompts,
                "batch": cell.batch,
                "max_tokens": min(WARM_UP_TOKENS, max_tokens) if turn < 0 else max_tokens,
                "temperature": cell.temperature,
                "seed": 1000 * (turn + 1),
                "mode": contestant.mode,
                "options": contestant.options,
            }
        )
        if turn < 0:
            return
        entry.seconds.append(answer["seconds"])
        entry.token_ids.append(answer["token_ids"])
        for key, value in answer["details"].items():
            entry.details[key] = entry.details.get(key, 0) + value
        entry.memory_bytes = worker.memory_bytes()
