"""Defines the records of a trace, one `StepTrace` per step, and the file that holds them.

The file has one JSON object per line: a `TraceHeader`, then a `StepTrace` for every step, in order.
docs/trace.md explains every field. `tracer.py` records them; nothing here needs torch.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

SCHEMA, VERSION = "folospec.trace", 2

NodeVerdict = Literal["accepted", "rejected", "not_reached", "scratch"]
NextKind = Literal["plain", "recovered", "bonus"]


@dataclass(frozen=True, slots=True)
class DrafterInfo:
    """A drafter of the engine."""

    name: str
    method: str
    model: str | None
    num_speculative_tokens: int
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class TraceHeader:
    """The first line: what ran."""

    schema: str
    version: int
    model: str
    vocab_size: int
    block_size: int
    num_blocks: int
    drafters: list[DrafterInfo]
    acceptance: str | None
    merge: bool
    adaptive: bool


@dataclass(frozen=True, slots=True)
class TokenTrace:
    """A token and, where there is a tokenizer, its text."""

    token_id: int
    text: str | None


@dataclass(frozen=True, slots=True)
class NodeTrace(TokenTrace):
    """A node of a proposal and what became of it."""

    parent: int
    confidence: float | None
    draft_prob: float | None
    verdict: NodeVerdict


@dataclass(frozen=True, slots=True)
class ProposalTrace:
    """A draft: its nodes in row order, parents first."""

    drafter: str
    nodes: list[NodeTrace]

    @property
    def num_draft_tokens(self) -> int:
        """Nodes that are verified."""
        return sum(node.verdict != "scratch" for node in self.nodes)


@dataclass(frozen=True, slots=True)
class SequenceTrace:
    """One sequence's part of a step: the committed tokens that ran, the draft behind them, the
    verdict, and what the sequence got."""

    request_id: str
    seq_id: str
    forked_from: str | None
    start: int
    num_tokens: int
    num_prompt_tokens: int
    root: TokenTrace | None
    root_position: int | None
    proposal: ProposalTrace | None
    undrafted_reason: str | None
    path: list[int]
    next_token: TokenTrace | None
    next_kind: NextKind | None
    new_tokens: list[TokenTrace]
    num_blocks: int
    num_blocks_kept: int
    draft_progress: dict[str, int]
    finish_reason: str | None
    stop_reason: str | int | None


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds; the parts add up to `total`."""

    schedule: float
    draft: float
    target: float
    sampling: float
    commit: float
    observe: float
    total: float


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """The pool while the target ran."""

    total: int
    held: int
    free: int


@dataclass(frozen=True, slots=True)
class StepTrace:
    """One step of the engine."""

    step: int
    unix_time: float
    times: StepTimes
    num_rows: int
    blocks: BlockCounts
    preempted: list[str]
    copies: list[list[int]]
    num_moved_rows: int
    sequences: list[SequenceTrace]


def to_line(record: TraceHeader | StepTrace) -> str:
    """A record as one line of JSON, without the newline. An option of a drafter that JSON cannot
    hold is written as its `str`."""
    return json.dumps(asdict(record), default=str)


def check_path(path: str | os.PathLike[str] | None) -> None:
    """Refuse a trace file that cannot be written, before a model is loaded for it.

    Raises:
        ValueError: it cannot be opened for writing. What it holds is left as it is.
    """
    if path is not None:
        _open(path, "a").close()


def _open(path: str | os.PathLike[str], mode: str) -> Any:
    try:
        return open(path, mode, encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"trace must be a file that can be written, got {os.fspath(path)!r}: {error.strerror}"
        ) from None


class TraceFile:
    """One JSON line per record, each written out before the next step begins. It is closed when the
    engine is gone, or at exit.

    Raises:
        ValueError: the file cannot be written. One that exists is replaced.
    """

    def __init__(self, path: str | os.PathLike[str], header: TraceHeader) -> None:
        self._file = _open(path, "w")
        self.close = weakref.finalize(self, self._file.close)
        self.write(header)

    def write(self, record: TraceHeader | StepTrace) -> None:
        self._file.write(to_line(record) + "\n")
        self._file.flush()


def read_trace(path: str | os.PathLike[str]) -> tuple[TraceHeader, Iterator[StepTrace]]:
    """Read a trace back; the steps are read as they are asked for.

    Raises:
        OSError: the file cannot be opened.
        ValueError: a line is not what the schema says, or the file was written by another version
            of it. For a step it is raised when the iterator comes to it.
    """
    lines = _numbered_lines(path)
    _, first = next(lines, (1, None))
    if not isinstance(first, dict) or first.get("schema") != SCHEMA:
        raise ValueError(f"{os.fspath(path)} is not a trace: its first line has no {SCHEMA!r}")
    if first.get("version") != VERSION:
        raise ValueError(
            f"{os.fspath(path)} has version {first.get('version')!r} of the trace schema, "
            f"and only {VERSION} can be read"
        )
    header = from_dict(TraceHeader, first, f"{os.fspath(path)}, line 1")
    return header, (
        from_dict(StepTrace, value, f"{os.fspath(path)}, line {number}") for number, value in lines
    )


def _numbered_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, Any]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                place = f"{os.fspath(path)}, line {number}"
                raise ValueError(f"{place}: not JSON: {error}") from None


T = TypeVar("T")


def from_dict(cls: type[T], value: Any, place: str = "") -> T:
    """Build one of the classes above from what JSON says of it, checking every field's type.

    Args:
        place: where the value is from, for the message.

    Raises:
        ValueError: a field is missing, unknown, or of the wrong type.
    """
    return _read(cls, value, place or cls.__name__)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _read(kind: Any, value: Any, place: str) -> Any:
    """Return `value` as a `kind`: a class of this module, or what their fields are made of."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if is_dataclass(kind):
        return _read_object(kind, value, place)
    if origin in (Union, UnionType):
        return _read_union(arguments, value, place)
    if origin is Literal:
        _check(value in arguments, f"one of {', '.join(map(repr, arguments))}", value, place)
        return value
    if origin is list:
        _check(isinstance(value, list), "a list", value, place)
        return [_read(arguments[0], item, f"{place}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        _check(isinstance(value, dict), "an object", value, place)
        return {key: _read(arguments[1], item, f"{place}.{key}") for key, item in value.items()}
    _check(_is_a(kind, value), f"of type {kind.__name__}", value, place)
    return value


def _read_object(cls: Any, value: Any, place: str) -> Any:
    _check(isinstance(value, Mapping), "an object", value, place)
    names = {field.name for field in fields(cls)}
    _check(set(value) == names, f"an object with {sorted(names)}", sorted(value), place)
    hints = _hints(cls)
    return cls(**{name: _read(hints[name], value[name], f"{place}.{name}") for name in value})


def _read_union(kinds: tuple[Any, ...], value: Any, place: str) -> Any:
    if value is None and NoneType in kinds:
        return None
    others = [kind for kind in kinds if kind is not NoneType]
    if len(others) == 1:
        return _read(others[0], value, place)
    names = " or ".join(kind.__name__ for kind in others)
    _check(any(_is_a(kind, value) for kind in others), f"of type {names}", value, place)
    return value


def _is_a(kind: type, value: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _check(ok: bool, allowed: str, value: Any, place: str) -> None:
    if not ok:
        raise ValueError(f"{place} must be {allowed}, got {value!r}")
