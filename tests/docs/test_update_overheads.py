"""The page of overheads is what the benchmark wrote; sections without rows stay."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from docs import update
from docs.tables import overheads

ROOT = Path(__file__).parents[2]
updated = partial(update.updated, path=overheads.PAGE)
PROVENANCE = {
    "command": "python benchmarks/step_cost.py --host",
    "time": "2026-01-01T00:00:00+00:00",
    "git_commit": "0123456789abcdef",
    "git_uncommitted_changes": True,
    "cpu": "Some CPU",
    "cores": 2,
    "load_average": [0.5, 0.4, 0.3],
    "torch_threads": 2,
    "torch": "2.0",
    "python": "3.11",
}
PARTS = ("model", "schedule", "propose", "metadata", "sample", "commit", "output", "rest")
TIMES = {f"{part}_ms": 0.25 for part in PARTS}


def host_row(batch: int, sampling: str = "native", **extra: Any) -> dict[str, Any]:
    return {
        "benchmark": "host_time",
        "model": "folospec-demo",
        "batch": batch,
        "temperature": 0.8,
        "top_p": 0.95,
        "drafts": 5,
        "tokens_per_step": 3.5,
        "sampling": sampling,
        "steps": 60,
        "host_ms": 1.75,
        **TIMES,
        "provenance": PROVENANCE,
        **extra,
    }


def planner_row(kind: str, **calls: float) -> dict[str, Any]:
    return {
        "benchmark": "planner_overhead",
        "model": "folospec-demo",
        "temperature": 1.5,
        "batch": 8,
        "kind": kind,
        "steps": 70,
        "total_us": sum(calls.values()),
        "calls_us": calls,
        "provenance": PROVENANCE,
    }


def cost_row(shape: str, rows: int) -> dict[str, Any]:
    return {
        "benchmark": "step_cost",
        "model": "folospec-demo",
        "dtype": "bfloat16",
        "context": 512,
        "shape": shape,
        "rows": rows,
        "steps": 60,
        "ratio_to_first": 1.25,
        "read_gb_per_second": 40.0,
        "share_of_read": 0.8,
        "limit_ms": 2.0,
        "share_of_limit": 0.8,
        "total_ms": 2.5,
        "host_ms": 0.5,
        **TIMES,
        "provenance": PROVENANCE,
    }


@pytest.fixture(scope="module")
def page() -> str:
    def section(name: str) -> str:
        begin = f"<!-- {name}: written by docs/update.py -->"
        return f"{begin}\nold {name}\n<!-- end of {name} -->\n"

    return "head\n" + "".join(map(section, ("host_time", "step_cost", "planner_overhead")))


def test_a_section_is_written_from_its_rows_and_the_other_stays(page: str) -> None:
    new = updated(page, [host_row(32), host_row(32, "torch", host_ms=9.0)])
    cells = "32 | 0.8 | 0.95 | 5 | 3.50"
    assert f"| {cells} | native | **1.75** | 0.250 |" in new
    assert f"| {cells} | torch | **9.00** |" in new
    assert "old host_time" not in new
    assert "old step_cost" in new
    assert "commit 0123456789 with uncommitted changes" in new
    assert "`python benchmarks/step_cost.py --host`" in new
    again = updated(new, [cost_row("chain", 1), cost_row("batch", 8)])
    assert "| batch | 8 | 2.50 | 1.25 | 0.25 | 0.50 |" in again
    assert again.count("| native |") == 1


def test_rows_of_several_runs_and_pages_without_markers_are_refused(page: str) -> None:
    other = {**PROVENANCE, "time": "2026-01-02T00:00:00+00:00"}
    with pytest.raises(ValueError, match="must come from one run"):
        updated(page, [host_row(1), host_row(32, provenance=other)])
    with pytest.raises(ValueError, match="got none"):
        updated(page, [{"benchmark": "else"}])
    with pytest.raises(ValueError, match="the page must have the lines"):
        updated("empty", [host_row(1)])


def test_the_plots_are_drawn(tmp_path: Path) -> None:
    rows = [host_row(batch, sampling) for batch in (1, 32) for sampling in ("torch", "native")]
    rows += [cost_row(shape, count) for shape in ("chain", "batch") for count in (1, 2, 8)]
    update.draw(rows, tmp_path)
    assert "batch 32" in (tmp_path / "host_time.svg").read_text()
    assert "one sequence, a chain" in (tmp_path / "step_cost.svg").read_text()


def test_the_page_has_all_sections() -> None:
    text = (ROOT / "docs/overheads.md").read_text()
    filled = updated(text, [host_row(1), cost_row("chain", 1)])
    assert filled != text
    assert filled.count("<!-- end of ") == text.count("<!-- end of ") == 3


def test_calls_are_listed_by_what_they_cost_more_than_in_a_plain_step(page: str) -> None:
    rows = [
        planner_row("plain", forward=900.0, plan=1.0, tiny=0.1),
        planner_row("resting", forward=902.0, plan=4.5, begin=8.0, tiny=0.1),
    ]
    written = updated(page, rows)
    assert "**T 1.5, batch 8**" in written
    lines = [line for line in written.splitlines() if line.startswith("| `")]
    assert lines == [
        "| `begin` |  | 8.0 |",
        "| `plan` | 1.0 | 4.5 |",
        "| `forward` | 900.0 | 902.0 |",
    ]
