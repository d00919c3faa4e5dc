"""Steps and bits where CUDA graphs run, with a stand-in for them, at their smallest."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "worker"))

from gpu_models import VOCAB_SIZE, save_gpu_llama
from graph_stand_in import StandIn

from benchmarks.lib import limits
from folospec.kernels.gpu import launch
from folospec.worker.cuda import capture
from folospec.worker.cuda.graphs import PassGraph
from gpu_check import bits, steps
from gpu_check.engines import watched
from gpu_check.jobs import Budget, Context

pytestmark = pytest.mark.skipif(not launch.is_interpreted(), reason="a card has graphs of its own")
CONTEXT, STEPS = 10, 2


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(capture, "recorder", lambda device: stand_in)
    return stand_in


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> steps.Bench:
    path = save_gpu_llama(tmp_path_factory.mktemp("model"))
    work = limits.Work.of_checkpoint(Path(path))
    machine = limits.Machine(1e9, {"bfloat16": 1e9})
    return steps.Bench("tiny", path, VOCAB_SIZE, machine, work, "cpu", STEPS)


def test_plain_decoding_is_timed_as_it_comes(bench: steps.Bench, recorder: StandIn) -> None:
    with watched() as made:
        engine = bench.engine(1, 60, attention_backend="triton", multi_step=None)
    ahead = engine.engine.multi_step.length
    assert ahead > 1
    row = bench.measure_plain(engine, CONTEXT)
    assert (row["shape"], row["multi_step"]) == ("plain", ahead)
    assert row["tokens"] == STEPS * ahead
    assert not engine.engine.requests
    assert [(one["num_graphs"], one["max_num_seqs"]) for one in made] == [
        (recorder.num_recorded, 1)
    ]
    json.dumps(made)


def test_single_steps_are_single_where_others_would_go_ahead(
    bench: steps.Bench, recorder: StandIn
) -> None:
    engine = bench.engine(1, 30, attention_backend="triton")
    row = bench.measure(engine, "batch", 1, CONTEXT)
    assert (row["steps"], row["multi_step"]) == (STEPS, 1)
    assert recorder.num_replayed >= STEPS


def test_a_graph_that_cannot_be_recorded_fails_the_check(
    bench: steps.Bench, recorder: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("operation not permitted while capturing")

    monkeypatch.setattr(PassGraph, "__init__", fails)
    with watched() as made:
        bench.engine(1, 30, attention_backend="triton")
    assert [(one["passed"], one["error"]) for one in made] == [
        (False, "operation not permitted while capturing")
    ]


@pytest.mark.parametrize("most_rows", [4, 0])
def test_every_way_of_the_bits_runs_as_a_graph_or_fails(
    bench: steps.Bench,
    recorder: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    most_rows: int,
) -> None:
    """With drafts of one token there are no graphs for the larger ways. Interpreted, bits are not
    promised."""
    changes = {"DEMO": bench.path, "COMPANY": 1, "NUM_TOKENS": 2, "VOCAB_SIZE": VOCAB_SIZE}
    changes |= {"CONTEXTS": (3,), "CHUNKS": (2,), "MOST_ROWS": most_rows}
    for name, value in changes.items():
        monkeypatch.setattr(bits, name, value)
    options = {"enforce_eager": False, "attention_backend": "triton"}
    context = Context("cpu", True, tmp_path, Budget(6000.0))
    rows = [*bits._mode(context, "float32", None, options, (3,))]
    assert all(row["passed"] is (row["num_replays"] > 0) for row in rows)
    assert all(row["passed"] for row in rows) is bool(most_rows)
