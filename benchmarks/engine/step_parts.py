"""Where the time of a step goes: the engine's own calls, each with a clock around it.

    step        schedule | propose | target ......................... | sample | commit | output
    parts       schedule | propose | metadata | model | (logits: model) | sample | commit | output
    rest        what is left of the step: the loop itself, observing, requests looked up

The parts of a step do not overlap, and `rest` is the difference to the whole, so that they add up.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from folospec import LLM

PARTS = ("model", "schedule", "propose", "metadata", "sample", "commit", "output", "rest")
HOST_PARTS = tuple(part for part in PARTS if part != "model")


class StepClock:
    """Times every step of an engine and its parts, in seconds; `steps` has an entry for each."""

    def __init__(self, llm: LLM) -> None:
        self._engine = engine = llm.engine
        self._spent = dict.fromkeys(PARTS, 0.0)
        self.steps: list[dict[str, float]] = []
        runner = engine.components.target
        for owner, name, part in (
            (engine, "_schedule", "schedule"),
            (engine, "_propose", "propose"),
            (runner, "forward", "metadata"),
            (runner.model, "forward", "model"),
            (runner.model, "logits", "model"),
            (engine.verifier, "verify", "sample"),
            (engine.committer, "commit", "commit"),
            (engine.open, "deliver", "output"),
        ):
            setattr(owner, name, self._timed(getattr(owner, name), part))

    def _timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = call(*args, **kwargs)
            self._spent[part] += time.perf_counter() - begin
            return result

        return timed

    def step(self) -> dict[str, float]:
        """Run one step; its parts and their "total"."""
        spent = self._spent
        spent.update(dict.fromkeys(PARTS, 0.0))
        begin = time.perf_counter()
        self._engine.step(finished_only=True)
        total = time.perf_counter() - begin
        spent["metadata"] -= spent["model"]  # the runner's forward is around the model's
        spent["rest"] = total - sum(spent.values())
        self.steps.append({**spent, "total": total})
        return self.steps[-1]
