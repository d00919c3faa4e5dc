"""What is said of a GPU is what the check measured on one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from docs import update

ROOT = Path(__file__).parents[2]
PROVENANCE = {
    "command": "python benchmarks/gpu_check.py",
    "time": "2026-01-01T00:00:00+00:00",
    "git_commit": "0123456789abcdef",
    "git_uncommitted_changes": False,
    "cpu": "Some CPU",
    "cores": 16,
    "python": "3.12.0",
    "torch": "2.0",
    "transformers": "5.0",
    "triton": "3.0",
    "cuda": "13.0",
    "driver": "600.1",
    "gpu": "Some GPU",
    "compute_capability": "9.0",
    "device": "cuda",
}


def row(kind: str, **entries: Any) -> dict[str, Any]:
    known = {"benchmark": "gpu_check", "section": "steps", "part": "grown", "kind": kind}
    return {**known, "provenance": PROVENANCE, **entries}


def step(**entries: Any) -> dict[str, Any]:
    shape = {"model": "grown 1.2b", "shape": "plain", "rows": 1, "context": 512}
    shape["multi_step"] = 8
    times = {"ms": 1.234, "limit_ms": 1.0, "share_of_limit": 0.81, "share_of_read": 0.81}
    return row("step", **shape, **times, ratio_to_first=1.0, deterministic=None, **entries)


@pytest.fixture(scope="module")
def updated() -> Any:
    return partial(update.updated, path="docs/gpu.md")


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs/gpu.md").read_text()


def test_times_verdicts_and_their_source_are_on_the_page(updated: Any, page: str) -> None:
    end = row("end", end="short of time", seconds=50.0)
    found = updated(page, [step(), end])
    assert "| grown 1.2b | plain | 1 | 512 | 8 | 1.23 | 1 | 1 | 0.81 | - |" in found
    assert "share of the bandwidth limit | at least 0.8 | 0.81 | met |" in found
    assert "| kernels: failed checks | at most 0 | - | not measured |" in found
    assert "Some GPU, compute capability 9.0, driver 600.1, CUDA 13.0" in found
    assert "commit 0123456789. " not in found
    assert "Not complete: steps grown." in found
    assert "No run of the check on a GPU" not in found
    assert updated(found, [step()]).count("### Steps") == 1


def test_whether_the_commit_was_changed_is_said_or_not_known(updated: Any, page: str) -> None:
    told = {True: "with uncommitted changes, 2026", None: "changes not known, 2026"}
    for changes, words in told.items():
        source = {**PROVENANCE, "git_uncommitted_changes": changes}
        assert f"commit 0123456789 {words}" in updated(page, [{**step(), "provenance": source}])


def test_rows_of_a_cpu_are_refused(updated: Any, page: str) -> None:
    other = {**PROVENANCE, "device": "cpu"}
    with pytest.raises(ValueError, match="must be of a GPU, got device='cpu'"):
        updated(page, [{**step(), "provenance": other}])


def test_rows_of_several_runs_are_refused(updated: Any, page: str) -> None:
    other = {**PROVENANCE, "time": "later"}
    with pytest.raises(ValueError, match="must come from one run"):
        updated(page, [step(), {**step(), "provenance": other}])
