"""The tables of docs/methods are what the benchmark wrote, with all that a number has to name."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from docs import update

ROOT = Path(__file__).parents[2]
updated = partial(update.updated, path="docs/methods/*.md")
PROVENANCE = {
    "command": "python benchmarks/acceptance.py --out rows.jsonl",
    "time": "2026-01-01T00:00:00+00:00",
    "git_commit": "0123456789abcdef",
    "git_uncommitted_changes": False,
    "cpu": "Some CPU",
    "cores": 2,
    "gpu": None,
    "torch_threads": 1,
    "torch": "2.0",
}
PAGE = """# A page
<!-- measured: ngram; ngram tree -->
Not measured yet.
<!-- end of measured -->

Between.
<!-- measured: suffix -->
<!-- end of measured -->
<!-- measured: setting -->
<!-- end of measured -->
The end.
"""


def row(contestant: str, task: str = "completion", **extra: Any) -> dict[str, Any]:
    return {
        "benchmark": "acceptance",
        "model": "folospec-demo",
        "provenance": PROVENANCE,
        "task": task,
        "temperature": 0.0,
        "contestant": contestant,
        "settings": {"speculative": contestant, "batch": 8},
        "num_items": 16,
        "dtype": "float64",
        "timed_dtype": "float32",
        "budget": 5,
        "acceptance_length": 2.345,
        "target_passes_per_token": 0.512,
        "tokens_equal_to_plain": True,
        "draft_cost": 0.25,
        "verification_cost": 1.5,
        **extra,
    }


ROWS = [
    row("ngram"),
    row("ngram", "prose", acceptance_length=None, draft_cost=None),
    row("ngram", temperature=0.8, acceptance_length=1.5),
    row("ngram tree", budget=16, draft_cost=0.75),
    row("ngram tree", "prose", draft_cost=0.5, tokens_equal_to_plain=False),
]


def test_a_table_has_a_line_for_each_contestant_and_temperature() -> None:
    page = updated(PAGE, ROWS)
    assert "|  | budget | T | completion | prose | draft | verify |\n" in page
    assert "| ngram | 5 | 0 | 2.35 (0.51) | no draft | 0.25 | 1.50 |\n" in page.replace(
        "2.34", "2.35"
    )
    assert "| ngram | 5 | 0.8 | 1.50 (0.51) |  | 0.25 | 1.50 |\n" in page
    assert page.count("\n| ngram") == 3


def test_tokens_that_differ_are_said() -> None:
    page = updated(PAGE, ROWS)
    assert "(0.51), other tokens |" in page
    assert "in 5 runs: other ones in 1 of them" in page
    assert "in 3 runs: the same in all of them" in updated(PAGE, ROWS[:3])


def test_a_failed_contestant_is_said() -> None:
    failed = row("suffix")
    for name in ("budget", "acceptance_length", "tokens_equal_to_plain", "draft_cost"):
        del failed[name]
    assert "| failed: ValueError: no |" in updated(PAGE, [{**failed, "error": "ValueError: no"}])


@pytest.mark.parametrize(
    "word", ["Some CPU", "folospec-demo", "float64", "float32", "16 items", "8 requests"]
)
def test_a_page_names_what_it_was_measured_on(word: str) -> None:
    assert word in updated(PAGE, ROWS)


def test_commit_and_command_are_named() -> None:
    page = updated(PAGE, ROWS)
    assert "commit 0123456789." in page
    assert f"`{PROVENANCE['command']}`" in page


def test_what_stands_between_the_parts_stays() -> None:
    page = updated(PAGE, ROWS)
    assert page.startswith("# A page\n<!-- measured: ngram; ngram tree -->\n|")
    assert "<!-- end of measured -->\n\nBetween.\n<!-- measured: suffix -->\nNot measured" in page
    assert page.endswith("<!-- end of measured -->\nThe end.\n")


def test_filling_in_twice_is_filling_in_once() -> None:
    for path in (ROOT / "docs" / "methods").glob("*.md"):
        once = updated(path.read_text(), ROWS)
        assert updated(once, ROWS) == once
        assert once.count("## ") == path.read_text().count("## ")


def test_rows_of_several_runs_are_refused() -> None:
    other = row("ngram", provenance={**PROVENANCE, "time": "later"})
    with pytest.raises(ValueError, match="one run"):
        updated(PAGE, [*ROWS, other])
