"""The page of the peers is what the benchmark wrote, and every table is of one run."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "peers.md").read_text()
PROVENANCE = {
    "command": "python benchmarks/peers.py --out rows.jsonl",
    "time": "2026-01-01T00:00:00+00:00",
    "git_commit": "0123456789abcdef",
    "git_uncommitted_changes": False,
    "cpu": "Some CPU",
}
MACHINE = {"read_bytes_per_second": 3e10, "operations_per_second": {"float32": 1e11}}


@pytest.fixture(scope="module")
def update():
    return SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "update_peers.py")))


def row(contestant: str, batch: int = 1, **extra: Any) -> dict[str, Any]:
    return {
        "benchmark": "peers",
        "checkpoint": "160m",
        "dtype": "float32",
        "task": "completion",
        "temperature": 0.0,
        "batch": batch,
        "threads": 2,
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


def test_figures_ratios_and_their_source_are_on_the_page(update):
    sampled = row("vllm plain", batch=8, excess_surprise=0.25, excess_surprise_error=0.125)
    page = update.updated(PAGE, [row("folospec plain"), sampled])
    assert "**160m, float32, completion, temperature 0, batch 8**" in page
    assert "| folospec plain | float32 | 81.2 | 1.25 | 1.00 |  | 0.86 | 100% |  |" in page
    assert "| 0.25 ± 0.12 |" in page
    assert "vllm: engine 1.2" in page
    assert PROVENANCE["command"] in page
    assert page.startswith(PAGE.partition("<!-- peers")[0])


def test_a_failure_is_on_the_page(update):
    failed = {"error": "RuntimeError: a | b"}
    page = update.updated(PAGE, [row("vllm plain", **failed)])
    assert "| vllm plain | float32 | failed: RuntimeError: a / b |  |" in page


def test_what_is_calculated_in_and_what_goes_on_behind_its_end_is_on_the_page(update):
    precision = {"weights": "bfloat16", "activations": "float32", "kv": "float16"}
    page = update.updated(PAGE, [row("llama_cpp plain", precision=precision, share_past_end=0.25)])
    assert "| llama_cpp plain | bfloat16 / float32 / float16 | 81.2 |" in page
    assert "64 new tokens of each, 25% of the outputs go on behind their end)" in page


def test_writing_twice_changes_nothing(update):
    once = update.updated(PAGE, [row("folospec plain")])
    assert update.updated(once, [row("folospec plain")]) == once


def test_each_run_says_what_it_was(update):
    other = {**PROVENANCE, "command": "python benchmarks/peers.py --batches 8", "time": "later"}
    page = update.updated(PAGE, [row("a"), row("b", batch=8, provenance=other)])
    places = [page.index(text) for text in ("batch 1**", "--out rows", "batch 8**", "--batches 8")]
    assert places == sorted(places)


def test_tables_of_two_runs_none_and_pages_without_markers_are_refused(update):
    other = {**PROVENANCE, "time": "2026-01-02T00:00:00+00:00"}
    with pytest.raises(ValueError, match="from one run"):
        update.updated(PAGE, [row("a"), row("b", provenance=other)])
    with pytest.raises(ValueError, match="got none"):
        update.updated(PAGE, [])
    with pytest.raises(ValueError, match="must have the lines"):
        update.updated("# Nothing", [row("a")])


def test_the_plot_is_drawn_whoever_failed(update, tmp_path):
    rows = [row("folospec plain"), row("vllm plain", error="gone"), row("openvino plain", batch=8)]
    update.draw(rows, tmp_path / "peers.svg")
    assert "160m, float32, batch 8" in (tmp_path / "peers.svg").read_text()
