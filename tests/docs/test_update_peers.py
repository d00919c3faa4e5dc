"""The page of the peers is what the benchmark wrote, and every table is of one run."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from docs import update
from docs.tables import peers

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "peers.md").read_text()
updated = partial(update.updated, path=peers.PAGE)
PROVENANCE = {
    "command": "python benchmarks/peers.py --out rows.jsonl",
    "time": "2026-01-01T00:00:00+00:00",
    "git_commit": "0123456789abcdef",
    "git_uncommitted_changes": False,
    "cpu": "Some CPU",
}
MACHINE = {"read_bytes_per_second": 3e10, "operations_per_second": {"float32": 1e11}}


def row(contestant: str, batch: int = 1, **extra: Any) -> dict[str, Any]:
    return {
        "benchmark": "peers",
        "checkpoint": "160m",
        "dtype": "float32",
        "task": "completion",
        "temperature": 0.0,
        "batch": batch,
        "threads": 2,
        "target": "native",
        "rounds": 5,
        "max_tokens": 64,
        "contestant": contestant,
        "peer": contestant.split()[0],
        "speculative": False,
        "versions": {"engine": "1.2"},
        "step_bytes": 3.2e8,
        "step_operations": 3.2e8,
        "step_limit_seconds": 0.0105,
        "limit_tokens_per_second": 95.0,
        "tokens_per_second": 81.25,
        "ratio_to_folospec_plain": 1.25,
        "ratio_to_fastest_peer": 1.0,
        "ratio_to_fastest_plain_peer": None,
        "share_of_limit": 0.86,
        "precision": {"weights": "float32", "activations": "float32", "kv": "float32"},
        "same_completions": 1.0,
        "machine": MACHINE,
        "provenance": PROVENANCE,
        **extra,
    }


def test_figures_ratios_and_their_source_are_on_the_page():
    sampled = row("vllm plain", batch=8, excess_surprise=0.25, excess_surprise_error=0.125)
    page = updated(PAGE, [row("folospec plain"), sampled])
    assert "**160m, float32, completion, temperature 0, batch 8**" in page
    assert "| folospec plain | float32 | 81.2 | 1.25 | 1.00 |  | 0.86 | 100% |  |" in page
    assert "| 0.25 ± 0.12 |" in page
    assert "vllm: engine 1.2" in page
    assert PROVENANCE["command"] in page
    assert page.startswith(PAGE.partition("<!-- peers")[0])


def bound_row(**extra):
    return {
        "benchmark": "bound",
        "model": "build/models/smollm2/bf16",
        "dtype": "bfloat16",
        "task": "chat",
        "temperature": 0.0,
        "rounds": 5,
        "threads": 2,
        "plain_tokens_per_second": 50.0,
        "auto_tokens_per_second": 60.0,
        "bound_tokens_per_second": 62.5,
        "auto_ratio": 1.2,
        "bound_ratio": 1.25,
        "foresight_ratio": 1.5,
        "share_of_bound": 0.96,
        "best_limit": 12,
        "best_floor": 0.05,
        "acceptance_length": 2.5,
        "prompt_share": 0.04,
        "row_curve": {"1": 1.0, "8": 1.5},
        "provenance": {**PROVENANCE, "torch": "2"},
        **extra,
    }


def test_the_bound_stands_next_to_auto():
    page = updated(PAGE, [bound_row(), bound_row(task="code", best_limit=0)])
    assert "**smollm2 bf16, bfloat16, batch 1**" in page
    assert "| chat | 0 | 50.0 | 60.0 | 62.5 | 1.20 | 1.25 | 1.50 | 0.96 |" in page
    assert "| at most 12, chance at least 0.05 | 2.50 | 4% |" in page
    assert "| no drafts |" in page
    assert "Row curve of the first: 1: 1.00, 8: 1.50." in page
    assert page.startswith(PAGE.partition("<!-- bound")[0])


def test_a_failure_is_on_the_page():
    failed = {"error": "RuntimeError: a | b"}
    page = updated(PAGE, [row("vllm plain", **failed)])
    assert "| vllm plain | float32 | failed: RuntimeError: a / b |  |" in page


def test_what_is_calculated_in_and_what_goes_on_behind_its_end_is_on_the_page():
    precision = {"weights": "bfloat16", "activations": "float32", "kv": "float16"}
    page = updated(PAGE, [row("llama_cpp plain", precision=precision, share_past_end=0.25)])
    assert "| llama_cpp plain | bfloat16 / float32 / float16 | 81.2 |" in page
    page_of_older = updated(PAGE, [row("a"), row("a", target="x86-64-v3")])
    assert "batch 1, instructions of x86-64-v3**" in page_of_older
    assert "64 new tokens of each, 25% of the outputs go on behind their end)" in page


def test_writing_twice_changes_nothing():
    once = updated(PAGE, [row("folospec plain")])
    assert updated(once, [row("folospec plain")]) == once


def test_each_run_says_what_it_was():
    other = {**PROVENANCE, "command": "python benchmarks/peers.py --batches 8", "time": "later"}
    page = updated(PAGE, [row("a"), row("b", batch=8, provenance=other)])
    places = [page.index(text) for text in ("batch 1**", "--out rows", "batch 8**", "--batches 8")]
    assert places == sorted(places)


def test_tables_of_two_runs_none_and_pages_without_markers_are_refused():
    other = {**PROVENANCE, "time": "2026-01-02T00:00:00+00:00"}
    with pytest.raises(ValueError, match="from one run"):
        updated(PAGE, [row("a"), row("b", provenance=other)])
    with pytest.raises(ValueError, match="got none"):
        updated(PAGE, [])
    with pytest.raises(ValueError, match="must have the lines"):
        updated("# Nothing", [row("a")])


def test_the_plot_is_drawn_whoever_failed(tmp_path):
    rows = [row("folospec plain"), row("vllm plain", error="gone"), row("openvino plain", batch=8)]
    update.draw(rows, tmp_path)
    assert "160m, float32, batch 8" in (tmp_path / "peers.svg").read_text()
