"""The table of throughput is what the benchmark wrote, with all that a number has to name."""

import json
from pathlib import Path
from typing import Any

import pytest

from docs import update
from docs.tables import throughput

PAGE = "docs/peers.md"
ROOT = Path(__file__).parents[2]
PROVENANCE = {
    "command": "python benchmarks/throughput.py --out rows.jsonl",
    "time": "2026-01-01",
    "git_commit": "0123456789abcdef",
    "git_uncommitted_changes": False,
    "cpu": "Some CPU",
    "cores": 2,
    "gpu": None,
    "torch_threads": 2,
    "torch": "2.0",
    "transformers": "5.0",
}


def row(contestant: str, seconds: list[float], **extra: Any) -> dict[str, Any]:
    return {
        "benchmark": "throughput",
        "model": "folospec-demo",
        "dtype": "float32",
        "rounds": len(seconds),
        "max_tokens": 64,
        "batch": 8,
        "contestant": contestant,
        "num_prompts": 8,
        "settings": {},
        "provenance": PROVENANCE,
        "seconds": seconds,
        **extra,
    }


ROWS = [
    row("folospec plain", [1.0, 3.0], acceptance_length=None, tokens_equal_to_plain=True),
    row(
        "folospec draft_model",
        [0.5, 2.7],
        acceptance_length=2.34,
        settings={"speculative": {"num_speculative_tokens": 5}},
        tokens_equal_to_plain=False,
        num_differing_prompts=1,
    ),
    row("transformers generate", [2.0, 6.0]),
    {**row("transformers generate_batch", []), "error": "RuntimeError: no"},
]


def test_table_has_a_line_for_each_row() -> None:
    section = throughput.text(ROWS)
    assert "| 8 | folospec plain | 256 | 2.00 (2.00 to 2.00) | 1.00 |  | equal |" in section
    line = "| 8 | folospec draft_model | 320 | 2.50 (2.22 to 4.00) | 1.25 (1.11 to 2.00) | 2.34 |"
    assert f"{line} 1 of 8 prompts differ |" in section
    assert "| 8 | transformers generate_batch | failed: RuntimeError: no |" in section


@pytest.mark.parametrize(
    "word",
    ["Some CPU", "folospec-demo", "float32", "5 draft tokens", "0123456789", "throughput.py"],
)
def test_table_names_what_it_was_measured_on(word: str) -> None:
    assert word in throughput.text(ROWS)


def test_the_page_is_what_the_committed_rows_say() -> None:
    page = (ROOT / "docs" / "peers.md").read_text()
    lines = (ROOT / "benchmarks" / "results" / "throughput.jsonl").read_text().splitlines()
    assert update.updated(page, [json.loads(line) for line in lines], PAGE) == page
    assert update.updated(page, ROWS, PAGE) != page


def test_rows_of_several_runs_are_refused() -> None:
    other = row("folospec plain", [1.0], provenance={**PROVENANCE, "time": "2026-01-02"})
    page = (ROOT / "docs" / "peers.md").read_text()
    with pytest.raises(ValueError, match="one run"):
        update.updated(page, [*ROWS, other], PAGE)
