"""Where prompts come from: arguments, files and stdin, read one record at a time.

A record is one prompt as the user gave it. Lines are split at b"\\n" alone, so a U+2028 inside a
JSON string is part of the string. A line that cannot be read is a record with an error; the lines
after it are read all the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, BinaryIO

FORMATS = ("auto", "jsonl", "json", "lines", "text")
_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json"}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_DIGEST_BYTES = 6


@dataclass(frozen=True, slots=True)
class InputRecord:
    """One prompt as it was given.

    `value` is a text, or what the JSON of a line or of an item holds; None where that cannot be
    read.
    """

    index: int
    """Position among all prompts of the command, from 0."""
    place: str
    """Where it stands, for messages: "prompts.jsonl, line 7"."""
    digest: str
    """Hash of its bytes."""
    file: str | None = None
    line: int | None = None
    """Number of its line, from 1; None if it is no line of a file."""
    value: Any = None
    error: str | None = None
    """Why it cannot be served, as far as that is seen when it is read."""
    is_one_of_many: bool = True
    """Whether others go on when it fails: it comes from a file that holds several."""


@dataclass(frozen=True, slots=True)
class Source:
    """A prompt given as an argument, or a file ("-" is stdin) in one of the formats."""

    name: str
    format: str

    @property
    def holds_many(self) -> bool:
        return self.format in ("jsonl", "json", "lines")

    @property
    def is_file(self) -> bool:
        return self.format != "argument" and self.name != "-"

    @property
    def title(self) -> str:
        return "stdin" if self.name == "-" else self.name


def find_sources(
    prompts: Sequence[str], files: Sequence[str], input_format: str = "auto"
) -> list[Source]:
    """List what is to be read: the arguments ("-" is stdin), then the files, or else stdin.

    Args:
        input_format: of files and stdin: "auto" goes by the name's end, and takes what has none of
            .jsonl, .ndjson and .json as one prompt; "lines" takes each line as one.

    Raises:
        ValueError: there is none, one cannot be read, or stdin is named twice.
    """
    if input_format not in FORMATS:
        raise ValueError(
            f"--input-format must be one of {', '.join(FORMATS)}, got {input_format!r}"
        )
    if not prompts and not files:
        if sys.stdin is None or sys.stdin.isatty():
            raise ValueError("no prompt: give one as an argument, with --file, or on stdin")
        files = ["-"]
    sources = [
        Source(prompt, "argument") if prompt != "-" else _file_source("-", input_format)
        for prompt in prompts
    ]
    sources += [_file_source(name, input_format) for name in files]
    if sum(source.name == "-" for source in sources) > 1:
        raise ValueError("stdin can be read once; '-' is given twice")
    return sources


def _file_source(name: str, input_format: str) -> Source:
    if name == "-":
        if sys.stdin is None:
            raise ValueError("there is no stdin to read")
    else:
        try:
            mode = os.stat(name).st_mode
        except (OSError, ValueError) as error:
            raise ValueError(f"--file {name}: {getattr(error, 'strerror', error)}") from None
        if stat.S_ISDIR(mode):
            raise ValueError(f"--file {name}: is a folder")
        if not os.access(name, os.R_OK):
            raise ValueError(f"--file {name}: may not be read")
    if input_format == "auto":
        input_format = _SUFFIXES.get(os.path.splitext(name)[1].lower(), "text")
    return Source(name, input_format)


def read_records(sources: Sequence[Source]) -> Iterator[InputRecord]:
    """Yield the records of all sources in order, reading no further than it is asked to.

    Raises:
        ValueError: a source cannot be read as a whole.
    """
    index = 0
    for source in sources:
        for record in _READERS[source.format](source, index):
            yield record
            index = record.index + 1


def count_records(sources: Sequence[Source]) -> int | None:
    """Return how many records there are, without parsing them; None if that needs reading a pipe or
    parsing a whole file."""
    count = 0
    for source in sources:
        if source.format == "argument":
            count += 1
        elif not source.is_file or not os.path.isfile(source.name) or source.format == "json":
            return None
        elif source.holds_many:
            count += sum(1 for _ in _lines(source))
        else:
            count += 1
    return count


def _read_argument(source: Source, index: int) -> Iterator[InputRecord]:
    _check_not_empty(source.name, f"argument {index + 1}")
    try:
        digest = _digest(source.name.encode())
    except UnicodeEncodeError:
        raise ValueError(f"argument {index + 1}: not UTF-8: {source.name!r}") from None
    yield InputRecord(
        index, f"argument {index + 1}", digest, value=source.name, is_one_of_many=False
    )


def _read_text(source: Source, index: int) -> Iterator[InputRecord]:
    """The whole file is one prompt. One newline at its end is the editor's, and is left out."""
    raw = _read_whole(source)
    text = _decode(raw, source.title).removesuffix("\n").removesuffix("\r")
    _check_not_empty(text, source.title)
    yield InputRecord(
        index, source.title, _digest(raw), source.name, value=text, is_one_of_many=False
    )


def _read_json(source: Source, index: int) -> Iterator[InputRecord]:
    """A list has one record per item; anything else is one record."""
    text = _decode(_read_whole(source), source.title)
    value, error = _parse(text)
    if error is not None:
        raise ValueError(f"{source.title}: {error}")
    for number, item in enumerate(value if isinstance(value, list) else [value], start=1):
        digest = _digest(json.dumps(item, sort_keys=True).encode())
        place = f"{source.title}, item {number}"
        yield InputRecord(index + number - 1, place, digest, source.name, value=item)


def _read_lines(source: Source, index: int) -> Iterator[InputRecord]:
    """Each line that is not blank is a record: a text, or JSON."""
    for offset, (number, raw) in enumerate(_lines(source)):
        value: Any = None
        error: str | None = None
        try:
            value = raw.decode()
        except UnicodeDecodeError as problem:
            error = f"not UTF-8: {problem}"
        if error is None and source.format == "jsonl":
            value, error = _parse(value)
        place = f"{source.title}, line {number}"
        yield InputRecord(index + offset, place, _digest(raw), source.name, number, value, error)


_READERS = {
    "argument": _read_argument,
    "text": _read_text,
    "json": _read_json,
    "jsonl": _read_lines,
    "lines": _read_lines,
}


def _lines(source: Source) -> Iterator[tuple[int, bytes]]:
    with _open(source) as stream:
        for number, raw in enumerate(stream, start=1):
            if number == 1:
                raw = raw.removeprefix(_BYTE_ORDER_MARK)
            raw = raw.removesuffix(b"\n").removesuffix(b"\r")
            if raw.strip():
                yield number, raw


def _read_whole(source: Source) -> bytes:
    with _open(source) as stream:
        return stream.read().removeprefix(_BYTE_ORDER_MARK)


def _open(source: Source) -> AbstractContextManager[BinaryIO]:
    return nullcontext(sys.stdin.buffer) if source.name == "-" else open(source.name, "rb")


def _check_not_empty(prompt: str, title: str) -> None:
    if not prompt:
        raise ValueError(f"{title}: the prompt is empty; it must have at least one token")


def _decode(raw: bytes, title: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{title}: not UTF-8: {error}") from None


def _parse(text: str) -> tuple[Any, str | None]:
    """Return the value of a JSON text, or what is wrong with it."""
    try:
        return json.loads(text, object_pairs_hook=_read_object), None
    except RecursionError:
        return None, "not JSON that can be read: nested too deeply"
    except _RepeatedKeyError as error:
        return None, f"an object has the key {error.args[0]!r} twice"
    except ValueError as error:
        return None, f"not JSON: {error}"


class _RepeatedKeyError(Exception):
    """An object has a key twice, of which JSON's readers would silently drop one."""


def _read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _RepeatedKeyError(key)
        found[key] = value
    return found


def _digest(raw: bytes) -> str:
    return hashlib.blake2b(raw, digest_size=_DIGEST_BYTES).hexdigest()
