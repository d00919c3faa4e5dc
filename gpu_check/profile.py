"""Where the time of a few steps goes: how long they take, how long of that the device is busy, and
with which kernels. Where there is no GPU they are torch's calls on the host."""

from __future__ import annotations

import time
from typing import Any

import torch

from folospec import LLM, SamplingParams
from gpu_check.device import synchronize

STEPS = 8
SHOWN_KERNELS = 8
NAME_CHARACTERS = 80


def profiled(llm: LLM, prompt: list[int], drafts: int | None, device: str) -> dict[str, Any]:
    """A row about steps of one sequence, with so many drafts or as far ahead as the engine goes.

    Profiling is of use, but no check: where it fails the row says why.
    """
    engine, row = llm.engine, {"kind": "profile", "steps": STEPS, "kernels": []}
    row["multi_step"] = engine.multi_step.length
    params = SamplingParams(
        temperature=0.0,
        max_tokens=2 * STEPS * engine.multi_step.length + (drafts or 0),
        ignore_eos=True,
        num_speculative_tokens=drafts,
    )
    activity, spent = torch.profiler.ProfilerActivity.CPU, "self_cpu_time_total"
    if device.startswith("cuda"):
        activity, spent = torch.profiler.ProfilerActivity.CUDA, "self_device_time_total"
    request = engine.add_request({"prompt_token_ids": prompt}, params)
    for _ in range(3):
        engine.step()
    synchronize(device)
    try:
        with torch.profiler.profile(activities=[activity]) as profiler:
            begin = time.perf_counter()
            for _ in range(STEPS):
                engine.step()
            synchronize(device)
            seconds = time.perf_counter() - begin
        events = [(getattr(e, spent) / 1e3, e) for e in profiler.key_averages()]
    except (RuntimeError, AttributeError) as error:
        return {**row, "skipped": str(error)}
    finally:
        engine.abort(request)
    events.sort(key=lambda pair: -pair[0])
    kernels = [{"kernel": e.key[:NAME_CHARACTERS], "calls": e.count, "ms": ms} for ms, e in events]
    return {
        **row,
        "wall_ms": 1e3 * seconds,
        "busy_ms": sum(ms for ms, _ in events),
        "kernels": kernels[:SHOWN_KERNELS],
    }
