"""What is said of `speculative="auto"` against plain decoding is what was measured."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from docs import update

ROOT = Path(__file__).parents[2]
PAGE = "head\n<!-- never_slower: written by docs/update.py -->\nold\n"
PAGE += "<!-- end of never_slower -->\ntail\n"
PROVENANCE = {
    "command": "python benchmarks/never_slower.py",
    "time": "2026-01-01T00:00:00+00:00",
    "git_commit": "0123456789abcdef",
    "git_uncommitted_changes": False,
    "cpu": "Some CPU",
    "torch_threads": 2,
    "torch": "2.0",
}


def row(**extra: Any) -> dict[str, Any]:
    return {
        "benchmark": "never_slower",
        "model": "models/some",
        "dtype": "bfloat16",
        "workload": "code",
        "temperature": 0.0,
        "batch": 8,
        "pairs": 15,
        "prompts_per_run": 8,
        "max_tokens": 128,
        "ratio": 1.25,
        "ratio_low": 1.125,
        "ratio_high": 1.5,
        "contestant": "auto",
        "bound": 1.0625,
        "num_cells": 9,
        "verdict": "not slower",
        "clock": "cpu",
        "num_differing_pairs": 0,
        "auto_counts": {"num_drafts": 4, "num_accepted_tokens": 10},
        "provenance": PROVENANCE,
        **extra,
    }


@pytest.fixture(scope="module")
def updated() -> Any:
    return partial(update.updated, path="docs/planner.md")


def test_ratios_and_their_source_are_on_the_page(updated: Any) -> None:
    none = {"num_drafts": 0, "num_accepted_tokens": 0}
    few = row(batch=32, num_differing_pairs=2, auto_counts=none, bound=None, verdict="undecided")
    page = updated(PAGE, [row(), few])
    assert "**some, bfloat16**" in page
    ratios = "1.250 | 1.125 to 1.500"
    assert f"| auto | code, T 0 | 8 | {ratios} | 1.062 | not slower | 3.50 | equal |" in page
    assert f"| auto | code, T 0 | 32 | {ratios} | too few pairs | undecided | no drafts | 2" in page
    assert "cpu time; bounds are for 9 cells" in page
    assert "`python benchmarks/never_slower.py`" in page
    assert "old" not in page
    assert page.endswith("tail\n")


def test_two_runs_of_one_cell_are_refused(updated: Any) -> None:
    other = {**PROVENANCE, "time": "later"}
    assert updated(PAGE, [row(), row(batch=1, provenance=other)]).count("Command:") == 2
    with pytest.raises(ValueError, match="must come from one run"):
        updated(PAGE, [row(), row(provenance=other)])
    with pytest.raises(ValueError, match="got none"):
        updated(PAGE, [])


def test_the_page_has_the_section(updated: Any) -> None:
    text = (ROOT / "docs/planner.md").read_text()
    assert updated(text, [row()]) != text
