"""Step costs are measured once per model and machine, and a file that is no good is no harm."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from harness import make_llm

from folospec.kernels.build import BuildError
from folospec.spec.planner.step_cost import CostCurve
from folospec.worker import step_timing
from folospec.worker.step_timing import in_buckets, read_points, write_points

KEY = {"model": "m", "threads": 2}
POINTS = {1: 0.001, 8: 0.002}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOLOSPEC_CACHE_DIR", str(tmp_path))
    return tmp_path / "step_costs"


def test_what_was_measured_is_used_again(
    models: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_llm(models.target, "auto")
    files = list(cache.iterdir())
    assert len(files) == 1

    def measured_again(*_: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(step_timing, "measure", measured_again)
    second = make_llm(models.target, "auto")
    curves = [
        llm.engine.proposer.step_planner.planner.estimates.cost.curve for llm in (first, second)
    ]
    assert curves[0].points == curves[1].points
    assert set(curves[0].points) <= set(step_timing.ROW_COUNTS)
    with pytest.raises(AssertionError, match="measured again"):
        make_llm(models.near, "auto", block_size=8)


def test_nothing_is_measured_without_a_planner(models: Any, cache: Path) -> None:
    make_llm(models.target, "ngram")
    assert not cache.exists()


def test_a_draft_model_is_measured_too(models: Any, cache: Path) -> None:
    llm = make_llm(models.target, {"method": "auto", "model": models.near})
    assert len(list(cache.iterdir())) == 2
    seconds = llm.stats()["planner"]["sources"]["draft_model"]["seconds"]
    assert seconds["pass"] > 0


def test_measuring_leaves_the_pool_as_it_was(models: Any, cache: Path) -> None:
    llm = make_llm(models.target, "auto", num_blocks=16, block_size=4)
    assert llm.stats()["num_free_blocks"] == 16
    assert max(llm.engine.proposer.step_planner.planner.estimates.cost.curve.points) <= 64


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        json.dumps({"seconds": {"1": 1.0}}),
        json.dumps({"key": {"model": "other"}, "seconds": {"1": 1.0}}),
        json.dumps({"key": KEY, "seconds": {}}),
        json.dumps({"key": KEY, "seconds": {"1": -1.0}}),
        json.dumps({"key": KEY, "seconds": {"x": 1.0}}),
        json.dumps({"key": KEY, "seconds": [1.0]}),
    ],
)
def test_a_file_that_cannot_be_used_is_ignored_with_a_line_in_the_log(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert read_points(path, KEY) is None
    assert "measured anew" in caplog.text


def test_what_is_written_is_read_and_leaves_no_scratch(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.json"
    assert read_points(path, KEY) is None
    write_points(path, KEY, POINTS)
    assert read_points(path, KEY) == POINTS
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    write_points(tmp_path / "file" / "x.json", KEY, POINTS)
    assert "cannot be kept" in caplog.text


def test_without_a_cache_folder_costs_are_measured_and_not_kept(
    models: Any, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def homeless() -> Path:
        raise BuildError("there is no home")

    monkeypatch.setattr(step_timing, "cache_folder", homeless)
    llm = make_llm(models.target, "auto")
    assert set(llm.engine.proposer.step_planner.planner.estimates.cost.curve.points) <= set(
        step_timing.ROW_COUNTS
    )
    assert "not kept" in caplog.text
    assert not cache.exists()


@pytest.mark.parametrize("change", [{"max_num_batched_tokens": 8}, {"kv_cache_dtype": "float32"}])
def test_what_changes_the_figures_has_figures_of_its_own(
    models: Any, cache: Path, change: dict[str, Any]
) -> None:
    make_llm(models.target, "auto", dtype="bfloat16")
    make_llm(models.target, "auto", dtype="bfloat16", max_num_seqs=8, **change)
    assert len(list(cache.iterdir())) == 2


def test_a_pass_that_runs_as_a_graph_costs_what_its_bucket_costs() -> None:
    points = in_buckets({1: 1.0, 2: 1.1, 4: 1.5, 8: 3.0})
    curve = CostCurve(points)
    assert [curve.at(rows) for rows in range(1, 9)] == [1.0, 1.1, 1.5, 1.5, 3.0, 3.0, 3.0, 3.0]
    assert CostCurve({1: 1.0, 2: 1.1, 4: 1.5, 8: 3.0}).at(5) < 3.0, "elsewhere it is in between"
