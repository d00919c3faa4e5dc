"""Where a benchmark's rows go: JSON lines to a file or to stdout, as they come, and a table to
stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TextIO

import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.lib.provenance import provenance

TABLE_WIDTH = 130


def begin(argv: Sequence[str] | None, script: str) -> dict[str, Any]:
    """Silence transformers, and return the provenance of a run of `script`, a file."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return provenance([script, *(sys.argv[1:] if argv is None else argv)])


def opened(path: Path | None) -> AbstractContextManager[TextIO]:
    """The file at `path`, empty and in a folder that is made where it is not there, or stdout."""
    if path is None:
        return nullcontext(sys.stdout)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w")


def write_rows(rows: Iterable[dict[str, Any]], path: Path | None) -> list[dict[str, Any]]:
    """Write every row when it is measured, so that an interrupted run leaves what it has."""
    written = []
    with opened(path) as out:
        for row in rows:
            written.append(row)
            out.write(json.dumps(row) + "\n")
            out.flush()
    return written


def show(table: Table) -> None:
    """Print a table, wide enough even where the terminal is not."""
    width = max(Console(stderr=True).width, TABLE_WIDTH)
    Console(stderr=True, width=width).print(table)
