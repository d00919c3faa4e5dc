"""Measures how long passes of the target with 1 to 64 rows take, once per model and machine.

It runs when the engine starts.

The rows run at the slots of a pool that nobody uses yet. The figures are kept in a file of the
user's cache folder, named by everything that they depend on; a file that cannot be read, or says
something else, is measured anew. The planner corrects them while the engine runs, so they need not
be exact.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from folospec.attention.native_cpu import NativeAttention
from folospec.config import EngineConfig
from folospec.kernels import native
from folospec.kernels.build import BuildError, cache_folder
from folospec.kernels.native_children import NO_NOISE
from folospec.kernels.sampling_records import pack_filters, pack_sampling
from folospec.models.base import Model
from folospec.models.forward import Rows
from folospec.models.loader import resolve_model
from folospec.spec.draft_runner import ChainSampling
from folospec.spec.planner.step_cost import ASKING_SECONDS, UNKNOWN_COSTS, CostCurve, Costs
from folospec.worker.loading import EngineComponents
from folospec.worker.model_runner import ModelRunner

logger = logging.getLogger(__name__)

ROW_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_ORDER = (1, 64, 8, 24, 4, 2, 16, 32, 12, 48, 6, 3)
"""The counts that tell most come first, in case the time runs out."""
_LEAST_COUNTS = 2
_DRAFT_COUNTS = (1, 64, 16)
_CONTEXT, _CHAIN = 128, 5
_REPEATS = 5
_SECONDS = 1.5
"""Time for the target; a third of it for each draft model."""

Points = dict[int, float]


def measured_costs(config: EngineConfig, components: EngineComponents) -> Costs:
    """What passes cost here, from the cache or measured now; unknown without a planner."""
    if config.speculative is None or not config.speculative.is_adaptive:
        return UNKNOWN_COSTS
    for one in components.all_runners:
        one.warm_up(max_rows_each=max(ROW_COUNTS))
    target = Subject(components.target, [model_facts(config.model)], _ORDER, _SECONDS)
    points = target.points(config, components.num_blocks)
    if not points:
        return UNKNOWN_COSTS
    guesses = {}
    for drafter in components.handles:
        runner = next(iter(drafter.access.runners), None)
        if not isinstance(runner, ModelRunner):
            continue
        facts = [
            drafter.config.method,
            str(dict(drafter.config.options)),
            model_facts(config.model),
        ]
        facts += [model_facts(drafter.config.model)] if drafter.config.model else []
        subject = Subject(runner, facts, _DRAFT_COUNTS, _SECONDS / 3, in_chains=True)
        own = subject.points(config, components.num_blocks)
        if 1 in own:
            most = max(own)
            slope = max(0.0, own[most] - own[1]) / max(1, most - 1)
            guesses[drafter.name] = (*ASKING_SECONDS, own[1], slope, slope)
    return Costs(
        CostCurve(points if components.target.graphs is None else in_buckets(points)), guesses
    )


def in_buckets(points: Points) -> Points:
    """What passes cost that run as CUDA graphs: as much as the next larger pass that was measured,
    in whose bucket they run."""
    counts = sorted(points)
    return points | {low + 1: points[high] for low, high in pairwise(counts)}


@dataclass(frozen=True, slots=True)
class Subject:
    """A runner to be measured, what its model is, at which counts, and in what time; with
    `in_chains`, of one row as a chain of drafts makes it."""

    runner: ModelRunner
    facts: list[str]
    counts: Sequence[int]
    seconds: float
    in_chains: bool = False

    def points(self, config: EngineConfig, num_blocks: int) -> Points:
        key = self.key(config, num_blocks)
        path = path_of(key)
        points = None if path is None else read_points(path, key)
        if points is None:
            block_size = config.block_size
            points = measure(self.runner, block_size, num_blocks, self.counts, self.seconds)
            if self.in_chains and 1 in points and num_blocks * block_size > _CHAIN:
                in_a_chain = _time_chain(self.runner, range(-(-_CHAIN // block_size)))
                points[1] = points[1] if in_a_chain is None else min(points[1], in_a_chain)
            if points and path is not None:
                write_points(path, key, points)
        return points

    def key(self, config: EngineConfig, num_blocks: int) -> dict[str, Any]:
        """Everything that the figures depend on, as JSON has it. A pool that holds the context and
        the largest count measures the same as a larger one."""
        model = self.runner.model
        is_cuda = model.device.type == "cuda"
        has_affinity = hasattr(os, "sched_getaffinity")
        return {
            "folospec": _own_version(),
            "torch": torch.__version__,
            "facts": self.facts,
            "model": [type(model).__name__, str(model.config)],
            "attention": model.attention.name,
            "kernels": _kernels(model),
            "graphs": self.runner.graphs is not None,
            "batch_invariant_reference": self.runner.batch_invariant_reference,
            "deterministic": config.deterministic,
            "block_size": config.block_size,
            "num_slots": min(num_blocks * config.block_size, _CONTEXT + max(self.counts)),
            "max_num_batched_tokens": min(self.runner.max_num_batched_tokens, max(self.counts)),
            "kv_cache_dtype": config.kv_cache_dtype,
            "quantization": config.quantization,
            "counts": list(self.counts),
            "in_chains": self.in_chains,
            "device": torch.cuda.get_device_name(model.device) if is_cuda else str(model.device),
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count(),
            "threads": torch.get_num_threads(),
        }


def measure(
    runner: ModelRunner,
    block_size: int,
    num_blocks: int,
    counts: Sequence[int] = _ORDER,
    seconds: float = _SECONDS,
) -> Points:
    """Time passes of a chain of rows behind some context: number of rows -> seconds.

    Args:
        num_blocks: of the pool; counts that do not fit are left out.
        seconds: begin no other count when they are over, but for the first two.
    """
    longest = min(num_blocks * block_size, runner.model.config.max_model_len)
    table = list(range(-(-longest // block_size)))[:num_blocks]
    points: Points = {}
    batches = {}
    for count in counts:
        start = min(_CONTEXT, longest - count)
        if start >= 0 and count <= runner.max_num_batched_tokens:
            batches[count] = [Rows([0] * count, start, table, num_logits=count)]
    if runner.model.device.type != "cpu":  # where kernels are compiled for every kind of shape
        for batch in batches.values():
            runner.forward(batch)
    started = time.perf_counter()
    for count, batch in batches.items():
        if time.perf_counter() - started > seconds and len(points) >= _LEAST_COUNTS:
            break
        points[count] = _time(runner, batch, started + seconds)
    return points


def _time(runner: ModelRunner, batch: list[Rows], deadline: float) -> float:
    """The quickest of a few passes: what else the machine does only ever adds."""
    taken: list[float] = []
    while len(taken) <= _REPEATS:
        begin = time.perf_counter()
        runner.forward(batch).logits[-1, :1].tolist()  # reading a number waits for a GPU
        taken.append(time.perf_counter() - begin)
        if time.perf_counter() > deadline:
            break
    return min(taken)


def _time_chain(runner: ModelRunner, table: Sequence[int]) -> float | None:
    """Seconds of a pass within a chain; None where a runner draws no chains by itself."""
    logits = torch.zeros(1, runner.vocab_size, device=runner.model.device)
    chain = ChainSampling(
        pack_sampling(0, 0, pack_filters(0.0, 0, 1.0, 0.0)), NO_NOISE, 1.0, _CHAIN
    )
    taken = {}
    for length in (_CHAIN, 1):
        times = []
        for _ in range(_REPEATS):
            begin = time.perf_counter()
            if runner.draw_chains(logits, [0], [table], [chain._replace(length=length)]) is None:
                return None
            times.append(time.perf_counter() - begin)
        taken[length] = min(times)
    return max(0.0, taken[_CHAIN] - taken[1]) / (_CHAIN - 1)


def model_facts(model: str) -> str:
    """What a checkpoint is: its config, whatever folder it lies in."""
    config = (resolve_model(model) / "config.json").read_bytes()
    return hashlib.sha256(config).hexdigest()[:16]


def _kernels(model: Model) -> str:
    """Which build of the native kernels runs the model."""
    if not isinstance(model.attention, NativeAttention):
        return "torch"
    library = native.load()
    return library.path.name if library is not None else "torch"


def _own_version() -> str | None:
    """None where folospec is run from its sources."""
    try:
        return version("folospec")
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def path_of(key: dict[str, Any]) -> Path | None:
    """Where the figures are kept; None where nothing can be."""
    try:
        folder = cache_folder() / "step_costs"
    except BuildError as error:
        logger.warning("step costs are not kept: %s", error)
        return None
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"{digest}.json"


def read_points(path: Path, key: dict[str, Any]) -> Points | None:
    """The figures of a file; None if there is none, or it is not what was written for this key."""
    try:
        found = json.loads(path.read_text())
        if found["key"] != key:
            raise ValueError("it was written for something else")
        points = {int(count): float(seconds) for count, seconds in found["seconds"].items()}
        if not points or any(n < 1 or not 0 < s < math.inf for n, s in points.items()):
            raise ValueError(f"it has impossible figures: {points}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("step costs are measured anew, %s cannot be used: %s", path, error)
        return None
    return points


def write_points(path: Path, key: dict[str, Any], points: Points) -> None:
    """Keep figures; a reader sees all of them or none. Where nothing can be written, nothing is
    kept."""
    text = json.dumps({"key": key, "seconds": points}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=path.parent, prefix="part-")
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(scratch, path)
    except OSError as error:
        logger.warning("step costs cannot be kept in %s: %s", path.parent, error)
