"""A section of a page: which rows it shows, as which text, between which markers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]

WRITER = "docs/update.py"


@dataclass(frozen=True)
class Section:
    """What stands between two markers of a page."""

    name: str
    """The benchmark whose rows it shows, unless `takes` says otherwise."""
    page: str
    """Below the root of the repository; a pattern where several pages have the section."""
    text: Callable[..., str]
    """The rows as Markdown."""
    takes: Callable[[Row], bool] | None = None
    """Whether the section shows a row."""
    table_of: Callable[[Row], Any] = lambda row: None
    """What the rows of a table have in common: they must come from one run."""
    plots: Mapping[str, str] = field(default_factory=dict)
    """The files that are drawn from the rows, each with its function, as "module:function"."""

    def shows(self, row: Row) -> bool:
        return self.takes(row) if self.takes else row.get("benchmark") == self.name

    def rows_of(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that the section shows.

        Raises:
            ValueError: those of a table come from several runs.
        """
        own = [row for row in rows if self.shows(row)]
        for table in dict.fromkeys(map(self.table_of, own)):
            runs = {run_of(row) for row in own if self.table_of(row) == table}
            if len(runs) != 1:
                what = self.name if table is None else f"{self.name}, {table}"
                raise ValueError(f"the rows of {what} must come from one run, got {sorted(runs)}")
        return own

    def filled(self, page: str, rows: Sequence[Row]) -> str:
        """The page with the section written from these rows.

        Raises:
            ValueError: the page lacks a marker.
        """
        begin = f"<!-- {self.name}: written by {WRITER} -->\n"
        end = f"<!-- end of {self.name} -->\n"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"the page must have the lines {begin!r} and {end!r}")
        return before + begin + self.text(rows) + end + after


def run_of(row: Row) -> tuple[str, str]:
    """What tells one run of a benchmark from another."""
    return row["provenance"]["command"], row["provenance"]["time"]


def by(key: Callable[[Row], Any], rows: Sequence[Row]) -> dict[Any, list[Row]]:
    """The rows by their key, in the order in which the keys come."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups
