"""The parts of a step add up, and the rows that are measured are the rows that ran."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine import step_cost
from benchmarks.engine.step_parts import PARTS, StepClock
from benchmarks.lib import limits
from folospec import LLM, SamplingParams
from folospec.kernels import native_sampling

SAMPLING = ("torch", "native") if native_sampling.load() else ("torch",)


@pytest.fixture(scope="module")
def host_rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("host") / "rows.jsonl"
    options = ["--host", "--batches", "2", "--steps", "6", "--out", str(out)]
    step_cost.main([*options, "--sampling", *SAMPLING])
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_host_time_is_measured_with_and_without_drafts(host_rows: list[dict[str, Any]]) -> None:
    settings = {(r["sampling"], r["temperature"], r["drafts"]) for r in host_rows}
    assert settings == {(s, t, k) for s in SAMPLING for t in (0.0, 0.8) for k in (0, 5)}
    for row in host_rows:
        assert row["batch"] == 2
        assert row["total_ms"] > row["model_ms"] > 0
        assert row["host_ms"] > row["sample_ms"] > 0
        # The scripted drafter tells one token in seven wrong.
        low, high = (1.0, 1.2) if row["drafts"] == 0 else (2.5, 6.0)
        assert low <= row["tokens_per_step"] <= high


def test_parts_add_up_to_the_step() -> None:
    llm = LLM("folospec-demo", num_blocks=64)
    clock = StepClock(llm)
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    steps, [output] = step_cost.timed_steps(clock, llm, [[5, 6, 7]], params, 3)
    assert len(steps) == 3
    assert len(output) == 4
    for step in steps:
        assert sum(step[part] for part in PARTS) == pytest.approx(step["total"])
        assert step["model"] > 0
        assert step["rest"] > 0
    assert not llm.engine.has_unfinished_requests


def test_chains_and_batches_have_the_rows_they_say(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    options = ["--rows", "1", "4", "--rounds", "1", "--steps", "3", "--context", "40"]
    step_cost.main([*options, "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["shape"], row["rows"]) for row in rows] == [
        ("chain", 1),
        ("chain", 4),
        ("batch", 1),
        ("batch", 4),
    ]
    assert rows[0]["ratio_to_first"] == 1.0
    assert all(row["steps"] == 3 for row in rows)
    assert all(row["limit_ms"] > 0 for row in rows)


def test_the_limit_of_a_chain_reads_its_context_once() -> None:
    machine = limits.Machine(1e9, {"float32": 1e12})
    work = limits.Work(9_000, 1_000, kv_entries=10, attention_operations=20)
    times = {"total_ms": 0.1}
    chain = step_cost.limit_of(machine, work, [100], 4, "float32", times)
    batch = step_cost.limit_of(machine, work, [100] * 4, 1, "float32", times)
    assert chain["limit_ms"] == pytest.approx(1e3 * 4 * (10_000 + 1_000) / 1e9)
    assert batch["limit_ms"] == pytest.approx(1e3 * 4 * (10_000 + 4_000) / 1e9)
    assert chain["share_of_read"] == pytest.approx(0.44)
    assert chain["share_of_limit"] == pytest.approx(0.44)
