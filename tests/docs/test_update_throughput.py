"""The README's table is what the benchmark wrote, with all that a number has to name."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROVENANCE = {
    "command": "python benchmarks/throughput.py --out rows.jsonl",
    "git_commit": "0123456789abcdef",
    "git_uncommitted_changes": False,
    "cpu": "Some CPU",
    "cores": 2,
    "gpu": None,
    "torch_threads": 2,
    "torch": "2.0",
    "transformers": "5.0",
}


def row(contestant: str, **extra: Any) -> dict[str, Any]:
    return {
        "benchmark": "throughput",
        "model": "folospec-demo",
        "dtype": "float32",
        "rounds": 3,
        "max_tokens": 64,
        "batch": 8,
        "contestant": contestant,
        "num_prompts": 8,
        "settings": {},
        "provenance": PROVENANCE,
        "tokens_per_second": 123.4,
        "ratio_to_transformers_generate": 1.5,
        "ratio_to_folospec_plain": None,
        **extra,
    }


ROWS = [
    row("folospec plain", acceptance_length=None, tokens_equal_to_plain=True),
    row(
        "folospec draft_model",
        acceptance_length=2.345,
        settings={"speculative": {"num_speculative_tokens": 5}},
        tokens_equal_to_plain=False,
        num_differing_prompts=1,
    ),
    {**row("transformers generate_batch"), "error": "RuntimeError: no"},
]


@pytest.fixture(scope="module")
def script() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "update_readme.py")))


def test_table_has_a_line_for_each_row(script: SimpleNamespace) -> None:
    section = script.section(ROWS)
    assert "| 8 | folospec plain | 123 | 1.50 |  |  | equal |" in section
    assert "| 2.35 | 1 of 8 prompts differ |" in section or "| 2.34 |" in section
    assert "| 8 | transformers generate_batch | failed: RuntimeError: no |" in section


@pytest.mark.parametrize(
    "word",
    ["Some CPU", "folospec-demo", "float32", "5 draft tokens", "0123456789", "throughput.py"],
)
def test_table_names_what_it_was_measured_on(script: SimpleNamespace, word: str) -> None:
    assert word in script.section(ROWS)


def test_filling_in_twice_is_filling_in_once(script: SimpleNamespace) -> None:
    readme = (ROOT / "README.md").read_text()
    once = script.updated(readme, ROWS)
    assert script.updated(once, ROWS) == once
    assert "folospec draft_model" in once
    assert once.count("## ") == readme.count("## ")


def test_rows_of_several_runs_are_refused(script: SimpleNamespace) -> None:
    other = row("folospec plain", provenance={**PROVENANCE, "git_commit": "fedcba"})
    with pytest.raises(ValueError, match="one run"):
        script.section([*ROWS, other])


def test_a_readme_without_its_markers_is_refused(script: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="must have the lines"):
        script.updated("# folospec\n", ROWS)
