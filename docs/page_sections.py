"""Fills the sections of a page that are written from benchmark rows, each between two markers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Sections = Mapping[str, Callable[[Sequence[Row]], str]]
"""By benchmark: its rows to the section's text."""


def run_of(row: Row) -> tuple[str, str]:
    """What tells one run of a benchmark from another."""
    return row["provenance"]["command"], row["provenance"]["time"]


def model_name(model: str) -> str:
    """The name of a checkpoint's folder, with its parent's where it only says a type."""
    path = Path(model)
    return f"{path.parent.name} {path.name}" if path.name in ("bf16", "fp32") else path.name


def fill(
    page: str,
    rows: Sequence[Row],
    sections: Sections,
    script: str,
    table_of: Callable[[Row], Any] = lambda row: None,
) -> str:
    """Return the page with the sections filled in that there are rows for.

    Args:
        script: the name of the file that writes the page; it stands in the markers.
        table_of: what the rows of a table have in common: they must come from one run.

    Raises:
        ValueError: there are no rows, those of a table come from several runs, or the page lacks a
            marker.
    """
    known = [row for row in rows if row.get("benchmark") in sections]
    if not known:
        raise ValueError(f"there must be rows of {', '.join(sections)}, got none")
    for name, section in sections.items():
        own = [row for row in known if row["benchmark"] == name]
        if not own:
            continue
        for table in dict.fromkeys(map(table_of, own)):
            runs = {run_of(row) for row in own if table_of(row) == table}
            if len(runs) != 1:
                what = name if table is None else f"{name}, {table}"
                raise ValueError(f"the rows of {what} must come from one run, got {sorted(runs)}")
        begin = f"<!-- {name}: written by docs/{script} -->\n"
        end = f"<!-- end of {name} -->\n"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"the page must have the lines {begin!r} and {end!r}")
        page = before + begin + section(own) + end + after
    return page


def read_rows(arguments: Sequence[str]) -> list[Row]:
    """The rows of the files that a script was given; without any it ends with its usage."""
    script, *names = arguments
    if not names:
        sys.exit(f"usage: python docs/{Path(script).name} RESULTS.jsonl ...")
    lines = [line for name in names for line in Path(name).read_text().splitlines()]
    return [json.loads(line) for line in lines if line]
