"""What is said of the kernels' speed is what was measured."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from docs import update

ROOT = Path(__file__).parents[2]
PROVENANCE = {
    "command": "python benchmarks/micro.py",
    "time": "2026-01-01T00:00:00+00:00",
    "git_commit": "0123456789abcdef",
    "git_uncommitted_changes": False,
    "cpu": "Some CPU",
    "torch_threads": 2,
    "torch": "2.0",
    "bandwidth_gb_per_s": 40.5,
    "peak_gflop_per_s": {"float32": 200.0},
}


def row(case: str, **extra: Any) -> dict[str, Any]:
    times = {"native_ms": 0.5, "torch_ms": 1.0, "limit_ms": 0.4, "speedup": 2.0, "of_limit": 0.8}
    known = {"benchmark": "micro", "op": "linear", "case": case, "format": "float32"}
    return {**known, **times, "provenance": PROVENANCE, **extra}


@pytest.fixture(scope="module")
def updated() -> Any:
    return partial(update.updated, path="docs/kernels.md")


def test_times_and_their_source_are_on_the_page(updated: Any) -> None:
    text = (ROOT / "docs/kernels.md").read_text()
    page = updated(text, [row("160m, 8 rows"), row("160m, 512 rows", native_ms=7.0)])
    assert "| linear | 160m, 8 rows | float32 | 0.500 | 1.000 | 2.00 | 0.400 | 0.80 |" in page
    assert "| linear | 160m, 512 rows | float32 | 7.000 |" in page
    assert "read bandwidth 40.5 GB/s, peak float32 200.0 GFLOP/s" in page
    assert "`python benchmarks/micro.py`" in page
    assert updated(page, [row("a"), row("b")]).count("| linear |") == 2


def test_rows_of_several_runs_are_refused(updated: Any) -> None:
    text = (ROOT / "docs/kernels.md").read_text()
    other = {**PROVENANCE, "time": "later"}
    with pytest.raises(ValueError, match="must come from one run"):
        updated(text, [row("a"), row("b", provenance=other)])


def test_every_processor_and_instruction_set_has_a_table(updated: Any) -> None:
    text = (ROOT / "docs/kernels.md").read_text()
    older = {**PROVENANCE, "time": "later", "kernels_target": "x86-64-v3"}
    page = updated(text, [row("a"), row("b", provenance=older)])
    assert "**Some CPU, all of its instructions**" in page
    assert "**Some CPU, instructions of x86-64-v3**" in page
    assert page.count("`python benchmarks/micro.py`.") >= 2
