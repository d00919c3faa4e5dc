"""A file of results, one line of JSON each, that a later run continues.

A line is written in one piece as soon as its request has finished, and is on its way to the disk
once a second. A process that is killed leaves whole lines and at most one torn one at the end; the
next run cuts that off and computes what has no line yet. So nothing is lost and nothing is there
twice.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from folospec.cli.batch_input import InputRecord
from folospec.cli.batch_result import Result, json_line
from folospec.sampling_params import shown

SYNC_SECONDS = 1.0
_FIRST_BYTES = b'{"key": "'
"""How every line of a journal begins: a torn tail that begins otherwise is another file's."""


class Journal:
    """A file of results, to which a later run of the same command adds those that are missing.

    Every line has a key: a hash of the settings that tokens depend on, and one of the record. A
    file of other settings or records is refused; one line has the settings themselves, so that
    those that differ can be named. A pipe or a device is written to without any of this.

    Args:
        settings: what the tokens depend on besides the record, by the names of the options.
        overwrite: begin anew.
        retry_failed: drop the lines that have an error, so that their records run again.

    Raises:
        ValueError: the file cannot be written, is in use by another run, or holds anything else
            than results of this command with these settings. It is as it was then.
    """

    def __init__(
        self,
        path: str,
        settings: Mapping[str, Any],
        *,
        overwrite: bool = False,
        retry_failed: bool = False,
    ) -> None:
        self.path = path
        self._settings, self._settings_key = settings, _settings_key(settings)
        self._done: dict[int, str] = {}
        """By index: the record's digest."""
        self._failed: set[int] = set()
        self._settings_index: int | None = None
        """Of the result whose line has the settings."""
        self.num_skipped = 0
        """Records that had a result already when they were read."""
        self._size, self._last_sync = 0, time.monotonic()
        self._fd = self._open()
        self.can_resume = stat.S_ISREG(os.fstat(self._fd).st_mode)
        try:
            if self.can_resume:
                self._lock()
                self._prepare(overwrite, retry_failed)
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def num_done(self) -> int:
        """Results in the file."""
        return len(self._done)

    @property
    def num_failed(self) -> int:
        """Results in the file that are errors."""
        return len(self._failed)

    def missing(self, records: Iterable[InputRecord]) -> Iterator[InputRecord]:
        """The records that have no result in the file.

        Raises:
            ValueError: a record's result belongs to another record of that index.
        """
        for record in records:
            if self._has(record):
                self.num_skipped += 1
            else:
                yield record

    def _has(self, record: InputRecord) -> bool:
        digest = self._done.get(record.index)
        if digest is not None and digest != record.digest:
            raise ValueError(
                f"{record.place} is not what result {record.index} of {self.path} was computed "
                "from; restore the input, or use --overwrite or another --output"
            )
        return digest is not None

    def write(self, result: Result) -> None:
        """Append a result; one that was cut short is left for the next run.

        Raises:
            OSError: the file cannot be written; it ends with a whole line if that can be done.
        """
        if result.is_cut:
            return
        fields = {"key": f"{self._settings_key}-{result.record.digest}", **result.as_dict()}
        tells_settings = self.can_resume and self._settings_index is None
        if tells_settings:
            fields["settings"] = self._settings
        self._append(json_line(fields))
        if tells_settings:
            self._settings_index = result.record.index
        self._done[result.record.index] = result.record.digest
        if result.error is not None:
            self._failed.add(result.record.index)
        if time.monotonic() - self._last_sync >= SYNC_SECONDS:
            self._sync()

    def finish(self) -> None:
        """Bring the file to the disk.

        Raises:
            OSError: it cannot be brought there.
        """
        self._sync()

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._fd)

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
        is_special = os.path.exists(self.path) and not os.path.isfile(self.path)
        try:
            return os.open(self.path, os.O_WRONLY if is_special else flags, 0o666)
        except (OSError, ValueError) as error:
            raise ValueError(f"--output {self.path}: {getattr(error, 'strerror', error)}") from None

    def _lock(self) -> None:
        """Keep other runs out. The lock ends with the process, however that ends."""
        try:
            import fcntl
        except ImportError:
            return
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--output {self.path}: another run is writing to it") from None
        except OSError:
            return  # a file system without locks

    def _prepare(self, overwrite: bool, retry_failed: bool) -> None:
        """Read what is there, and leave whole lines that count."""
        if overwrite:
            os.ftruncate(self._fd, 0)
            return
        self._read()
        os.ftruncate(self._fd, self._size)
        if retry_failed and self._failed:
            self._drop_failed()

    def _read(self) -> None:
        """Take in every whole line."""
        with open(self.path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.endswith(b"\n") and line.startswith(_FIRST_BYTES[: len(line)]):
                    break
                fields, digest = self._read_line(number, line)
                index = fields["index"]
                if index in self._done:
                    raise self._refusal(number, f"result {index} is there twice")
                self._done[index] = digest
                self._size += len(line)
                if "error" in fields:
                    self._failed.add(index)
                if "settings" in fields:
                    self._settings_index = index

    def _read_line(self, number: int, line: bytes) -> tuple[dict[str, Any], str]:
        """Return the fields of a result, and the digest of its record."""
        try:
            fields = json.loads(line)
            settings_key, _, digest = fields["key"].partition("-")
            is_result = isinstance(fields["index"], int) and digest != ""
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            is_result = False
        if not is_result:
            raise self._refusal(number, "is no result of this command")
        if settings_key != self._settings_key:
            why = "was computed with another model or other options"
            raise self._refusal(number, why + self._differences(settings_key))
        return fields, digest

    def _differences(self, settings_key: str) -> str:
        """How the settings of that key differ from these, if a line of the file has them."""
        with open(self.path, "rb") as stream:
            for line in stream:
                with suppress(ValueError, RecursionError):
                    fields = json.loads(line)
                    old = fields.get("settings") if isinstance(fields, dict) else None
                    if isinstance(old, dict) and _settings_key(old) == settings_key:
                        found = ", ".join(_differences(old, self._settings))
                        return f" ({found})" if found else ""
        return ""

    def _refusal(self, number: int, why: str) -> ValueError:
        return ValueError(
            f"--output {self.path}, line {number}: {why}; use --overwrite or another --output"
        )

    def _drop_failed(self) -> None:
        """Replace the file by one without the failed results, in one move."""
        path = os.path.realpath(self.path)
        scratch = f"{path}.tmp"
        with open(path, "rb") as old, open(scratch, "wb") as new:
            new.writelines(line for line in old if json.loads(line)["index"] not in self._failed)
            self._size = new.tell()
            new.flush()
            os.fsync(new.fileno())
        os.replace(scratch, path)
        os.close(self._fd)
        self._fd = self._open()
        self._lock()
        for index in self._failed:
            del self._done[index]
        if self._settings_index in self._failed:
            self._settings_index = None
        self._failed.clear()

    def _append(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            if self.can_resume:
                with suppress(OSError):
                    os.ftruncate(self._fd, self._size)
            raise OSError(error.errno, os.strerror(error.errno or errno.EIO), self.path) from None
        self._size += len(data)

    def _sync(self) -> None:
        self._last_sync = time.monotonic()
        if self.can_resume:
            os.fsync(self._fd)


def _settings_key(settings: Mapping[str, Any]) -> str:
    raw = json.dumps(settings, sort_keys=True).encode()
    return hashlib.blake2b(raw, digest_size=4).hexdigest()


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Each option that differs, with both values."""
    for name in dict.fromkeys((*new, *old)):
        if old.get(name) != new.get(name):
            option = f"--{name.replace('_', '-')}"
            yield f"{option} was {_given(old.get(name))} and is {_given(new.get(name))}"


def _given(value: Any) -> str:
    return "not given" if value is None or value is False else shown(value)
