"""The page of acceptance is what the benchmarks wrote; sections without rows stay."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from docs import update
from docs.tables import acceptance

ROOT = Path(__file__).parents[2]
updated = partial(update.updated, path=acceptance.PAGE)
PROVENANCE = {
    "command": "python benchmarks/acceptance.py --out rows.jsonl",
    "time": "2026-01-01T00:00:00+00:00",
    "git_commit": "0123456789abcdef",
    "git_uncommitted_changes": False,
    "cpu": "Some CPU",
    "cores": 2,
    "gpu": None,
    "torch_threads": 2,
    "torch": "2.0",
    "python": "3.11",
}


def accepted(contestant: str, temperature: float, **extra: Any) -> dict[str, Any]:
    return {
        "benchmark": "acceptance",
        "model": "folospec-demo",
        "task": "editing",
        "temperature": temperature,
        "contestant": contestant,
        "num_items": 4,
        "dtype": "float64",
        "timed_dtype": "float32",
        "budget": 16,
        "acceptance_length": 2.5,
        "acceptance_rate_per_pos": [0.9, 0.6],
        "target_passes_per_token": 0.5,
        "ceiling_acceptance_length": 3.25,
        "ceiling_target_passes_per_token": 0.4,
        "share_of_ceiling": 0.8,
        "share_reproduced": 0.75,
        "draft_cost": 0.01,
        "verification_cost": 1.5,
        "tokens_equal_to_plain": True,
        "first_differences": [],
        "provenance": PROVENANCE,
        **extra,
    }


CALIBRATED = {
    "benchmark": "calibration",
    "model": "folospec-demo",
    "contestant": "ngram",
    "temperature": 0.8,
    "num_items": 4,
    "max_tokens": 8,
    "dtype": "float32",
    "num_nodes": 30,
    "mean_accepted": 0.4,
    "mean_confidence": 0.5,
    "calibration_error": 0.125,
    "brier_score": 0.2,
    "brier_score_of_mean": 0.24,
    "bins": [{"from": 0.5, "num_nodes": 30, "confidence": 0.5, "accepted": 0.4}],
    "provenance": PROVENANCE,
}
COUPLED = {
    "benchmark": "coupling",
    "model": "folospec-demo",
    "contestant": "top_k",
    "settings": {"speculative": {"acceptance": "coupled"}},
    "shape": [3, 3],
    "depth": 2,
    "temperature": 0.8,
    "num_prompts": 4,
    "max_tokens": 8,
    "repetitions": 1,
    "seeds": "one per prompt",
    "resamples": 100,
    "dtype": "float32",
    "num_drafts": 50,
    "acceptance_length": 2.0,
    "interval": [1.9, 2.1],
    "coupled_ratio": 1.25,
    "coupled_ratio_interval": [1.2, 1.3],
    "provenance": PROVENANCE,
}
ROWS = [
    accepted("ngram", 0.0),
    accepted("suffix", 0.8, first_differences=[{"item": 1}], tokens_equal_to_plain=False),
    {**accepted("broken", 0.0), "error": "RuntimeError: no"},
]


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs" / "acceptance.md").read_text()


def test_every_row_has_its_line(page: str) -> None:
    filled = updated(page, [*ROWS, CALIBRATED, COUPLED])
    assert (
        "| ngram | 0 | 16 | 2.50 | 0.500 | 3.25 | 0.400 | 0.80 | 0.010 | 1.50 | equal |" in filled
    )
    assert "1 of 4 items differ" in filled
    assert "failed: RuntimeError: no" in filled
    assert "75% at temperature 0, 75% at temperature 0.8" in filled
    assert "| ngram | 0.8 | 30 | 0.400 | 0.500 | 0.125 | 0.200 | 0.240 |" in filled
    assert "| 2.000 (1.900 to 2.100) | 1.250 (1.200 to 1.300) |" in filled
    assert "0123456789, " not in filled
    assert "commit 0123456789. Command" in filled


def test_lines_of_a_table_are_equally_long() -> None:
    lines = acceptance.acceptance_text(ROWS).splitlines()
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert len(widths) == 1


def test_filling_in_twice_is_once_and_other_sections_stay(page: str) -> None:
    once = updated(page, [*ROWS, CALIBRATED])
    assert updated(once, ROWS) == once
    assert updated(once, [COUPLED]).count("Some CPU") == 3


def test_a_chat_model_has_a_section_of_its_own(page: str) -> None:
    chat = accepted("suffix", 0.0, model="build/models/smollm2/bf16", task="file_editing")
    filled = updated(page, [chat])
    _, _, rest = filled.partition("<!-- acceptance of a chat model")
    section, _, _ = rest.partition("<!-- end of acceptance of a chat model")
    assert "**file_editing**" in section
    assert "`build/models/smollm2/bf16`, 4 items of each task" in section
    assert ".svg" not in section
    assert filled.partition("### A chat model")[0] == page.partition("### A chat model")[0]


def test_rows_of_two_runs_and_no_rows_are_refused(page: str) -> None:
    other = {**PROVENANCE, "time": "2026-01-02T00:00:00+00:00"}
    with pytest.raises(ValueError, match="must come from one run"):
        updated(page, [*ROWS, accepted("nasd", 0.0, provenance=other)])
    with pytest.raises(ValueError, match="got none"):
        updated(page, [])


def test_the_plots_are_drawn_alike_from_the_same_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for folder in ("first", "second"):
        update.draw([*ROWS, CALIBRATED], tmp_path / folder)
    for name in ("acceptance.svg", "positions.svg", "calibration.svg"):
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("first", "second"))
        assert first == second
        assert b"ngram" in first
