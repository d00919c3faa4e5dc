"""Rows are there as soon as they are measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lib.output import write_rows


def measured(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield from rows
    raise KeyboardInterrupt


def test_an_interrupted_run_leaves_its_rows_in_a_folder_that_was_not_there(tmp_path: Path) -> None:
    rows = [{"tokens": 1}, {"tokens": 2}]
    path = tmp_path / "new" / "folder" / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write_rows(measured(rows), path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
