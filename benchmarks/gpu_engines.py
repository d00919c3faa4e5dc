"""What it takes to make the engines of a job: the seconds of their warm-up, and the CUDA graphs
that are recorded in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from folospec.engine.llm_engine import LLMEngine
from folospec.worker.cuda.graphs import StepGraphs

Row = dict[str, Any]


@contextmanager
def watched() -> Iterator[list[Row]]:
    """While it is open, a row for every engine with graphs that is made. A graph that cannot be
    recorded is a failed check: the engine would go on without, and show nothing of graphs."""
    rows: list[Row] = []
    errors: list[str] = []
    warm_up, recorded = LLMEngine._warm_up, StepGraphs.recorded

    def timed(self: LLMEngine, *args: Any) -> None:
        begin = time.perf_counter()
        warm_up(self, *args)
        if self.parts.target.graphs is not None:
            rows.append(_row(self, time.perf_counter() - begin, errors))
        errors.clear()

    def noticed(self: StepGraphs, make: Callable[[], Any]) -> Any:
        def made() -> Any:
            try:
                return make()
            except RuntimeError as error:
                errors.append(str(error))
                raise

        return recorded(self, made)

    with (
        mock.patch.object(LLMEngine, "_warm_up", timed),
        mock.patch.object(StepGraphs, "recorded", noticed),
    ):
        yield rows


def _row(engine: LLMEngine, seconds: float, errors: list[str]) -> Row:
    config = engine.config
    row = {
        "kind": "engine",
        "model": Path(config.model).name,
        "drafters": [drafter.name for drafter in engine.parts.drafters],
        "max_num_seqs": config.max_num_seqs,
        "num_graphs": engine.stats()["num_cuda_graphs"],
        "warm_up_seconds": seconds,
    }
    return {**row, "passed": False, "error": "; ".join(errors)} if errors else row
