"""Runs requests and keeps the trace of every step: what the acceptance benchmarks count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.lib.tasks import Task
from folospec import LLM, RequestOutput
from folospec.trace.records import StepTrace


@dataclass(slots=True)
class Run:
    """The outputs of a task's items, in order, and the steps that made them."""

    outputs: list[RequestOutput]
    steps: list[StepTrace] = field(default_factory=list)

    @property
    def token_ids(self) -> list[list[int]]:
        return [output.outputs[0].token_ids for output in self.outputs]

    def total(self, name: str) -> int:
        """The sum of a count of `SpeculationCounts` over the requests."""
        return sum(getattr(output.metrics, name) for output in self.outputs)

    def total_by_place(self, name: str) -> list[int]:
        """The sum of a list of counts, entry by entry."""
        lists = [getattr(output.metrics, name) for output in self.outputs]
        longest = max(map(len, lists))
        return [sum(row[i] for row in lists if i < len(row)) for i in range(longest)]


def make_llm(model: str, speculative: Any, dtype: str, batch: int) -> LLM:
    """An engine for token ids; a drafter that fails is an error."""
    return LLM(
        model,
        speculative=speculative,
        dtype=dtype,
        max_num_seqs=batch,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        strict_drafters=True,
    )


def run_task(
    llm: LLM,
    task: Task,
    temperature: float,
    *,
    repetition: int = 0,
    indices: Sequence[int] | None = None,
    keep_steps: bool = True,
) -> Run:
    """Run a task's items, as many at a time as the engine takes."""
    chosen = range(len(task.items)) if indices is None else indices
    run = Run([])
    llm.engine.on_step = run.steps.append if keep_steps else None
    reads_prediction = llm.engine.proposer.needs.prediction
    run.outputs = llm.generate(
        [{"prompt_token_ids": task.items[index].prompt_token_ids} for index in chosen],
        [
            task.params(index, temperature, repetition=repetition, with_prediction=reads_prediction)
            for index in chosen
        ],
        use_tqdm=False,
    )
    llm.engine.on_step = None
    return run
