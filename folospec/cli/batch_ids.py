"""An id is whose result it is, and seeds derive from it: no two records of a run have the same."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from folospec.cli.batch_input import InputRecord, Source, read_records
from folospec.cli.batch_request import record_id


def check_ids(sources: Sequence[Source]) -> None:
    """Read the files that can be read again for an id that two records have, and stop there.

    Raises:
        ValueError: there is one; the message names both places. Or a file cannot be read as a
            whole.
    """
    has_ids = [s for s in sources if s.is_file and s.format in ("json", "jsonl")]
    seen = _Seen()
    for record in read_records([s for s in has_ids if os.path.isfile(s.name)]):
        if problem := seen.take(record):
            raise ValueError(f"{record.place}: {problem}")


def refuse_repeated_ids(records: Iterable[InputRecord]) -> Iterator[InputRecord]:
    """The records, where one that has the id of an earlier one has an error: of a pipe nothing is
    known before it is read."""
    seen = _Seen()
    for record in records:
        problem = seen.take(record)
        yield record if problem is None else replace(record, error=problem)


class _Seen:
    """The ids of the records so far, and where they stand."""

    def __init__(self) -> None:
        self._places: dict[str | int, str] = {}

    def take(self, record: InputRecord) -> str | None:
        """Return what is wrong with a record's id, None if it is the first to have it."""
        own = record_id(record)
        if own is None:
            return None
        if own in self._places:
            return f"its id {own!r} is that of {self._places[own]}, too; ids must differ"
        self._places[own] = record.place
        return None
