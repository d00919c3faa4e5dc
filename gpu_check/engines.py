"""What it takes to make the engines of a job: the seconds of their warm-up, and the CUDA graphs
that are recorded in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from folospec.config import EngineConfig
from folospec.engine import llm_engine
from folospec.worker.cuda.graphs import StepGraphs
from folospec.worker.loading import EngineComponents

Row = dict[str, Any]


@contextmanager
def watched() -> Iterator[list[Row]]:
    """While it is open, a row for every engine with graphs that is made. A graph that cannot be
    recorded is a failed check: the engine would go on without, and show nothing of graphs."""
    rows: list[Row] = []
    errors: list[str] = []
    warm_up, recorded = llm_engine.warm_up, StepGraphs.recorded

    def timed(config: EngineConfig, components: EngineComponents, stages: Any) -> None:
        begin = time.perf_counter()
        warm_up(config, components, stages)
        if components.target.graphs is not None:
            rows.append(_row(config, components, time.perf_counter() - begin, errors))
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
        mock.patch.object(llm_engine, "warm_up", timed),
        mock.patch.object(StepGraphs, "recorded", noticed),
    ):
        yield rows


def _row(
    config: EngineConfig, components: EngineComponents, seconds: float, errors: list[str]
) -> Row:
    row = {
        "kind": "engine",
        "model": Path(config.model).name,
        "drafters": [drafter.name for drafter in components.drafters],
        "max_num_seqs": config.max_num_seqs,
        "num_graphs": sum(r.graphs.num_graphs for r in components.all_runners if r.graphs),
        "warm_up_seconds": seconds,
    }
    return {**row, "passed": False, "error": "; ".join(errors)} if errors else row
