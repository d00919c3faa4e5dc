"""The rows of a benchmark decide what is written, and the pages are what the rows say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from docs import update

RESULTS = sorted((update.ROOT / "benchmarks" / "results").glob("*.jsonl"))
ROWS = [json.loads(line) for path in RESULTS for line in path.read_text().splitlines() if line]
PATTERNS = sorted({section.page for section in update.SECTIONS if section.rows_of(ROWS)})


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_page_is_what_the_results_say(pattern: str) -> None:
    for path in update.ROOT.glob(pattern):
        text = path.read_text()
        assert update.updated(text, ROWS, pattern) == text


def test_another_result_is_another_page() -> None:
    text = (update.ROOT / "docs/kernels.md").read_text()
    rows = [{**row, "limit_ms": 1234.5} for row in ROWS if row["benchmark"] == "micro"]
    assert "| 1234.500 |" in update.updated(text, rows, "docs/kernels.md")


def test_only_pages_with_rows_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    section = "<!-- micro: written by docs/update.py -->\nold\n<!-- end of micro -->\n"
    (tmp_path / "docs" / "kernels.md").write_text(section)
    (tmp_path / "docs" / "planner.md").write_text("no section")
    monkeypatch.setattr(update, "ROOT", tmp_path)
    update.main([str(path) for path in RESULTS if path.stem in ("micro", "memory")])
    assert capsys.readouterr().err.splitlines() == [
        "docs/kernels.md",
        "no page shows rows of memory",
    ]
    assert "old" not in (tmp_path / "docs" / "kernels.md").read_text()
    assert (tmp_path / "docs" / "planner.md").read_text() == "no section"


def test_rows_without_a_page_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"benchmark": "memory"}\n')
    with pytest.raises(SystemExit, match="2"):
        update.main([str(path)])
