"""How a worker speaks with the benchmark: a line of JSON in, a line of JSON out.

    {"command": "load", "checkpoint": ..., ...}      -> {"seconds": ..., "versions": {...}}
    {"command": "reset"}                             -> {"seconds": ...}
    {"command": "run", "prompts": [[1, 2], ...],     -> {"seconds": ..., "token_ids": [[3, 4], ...],
     "batch": 1, "max_tokens": 2, ...}                   "details": {...}}

What fails is answered with {"error": ...}, and the worker lives on. Engines write what they like to
their standard output: it is turned to standard error, and the answers go where it went before.
Standard library alone: every engine's own environment runs this file.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any


@dataclass(frozen=True)
class Load:
    """What an engine is told once."""

    checkpoint: str
    draft: str
    """Folder of the draft model; empty where there is none."""
    dtype: str
    """"float32" or "bfloat16": weights, activations and KV, as far as the engine can."""
    threads: int
    max_batch: int
    max_len: int
    """Most tokens of a prompt and its output."""
    kv_gib: int
    """Size of the KV pool, for those that have one."""
    mode: str
    options: dict[str, Any]
    """What the mode leaves open, such as the number of draft tokens."""


@dataclass(frozen=True)
class Batch:
    """Prompts to be completed at once, each with `max_tokens` tokens, whatever ends a text."""

    prompts: list[list[int]]
    max_tokens: int
    temperature: float
    """0 is greedy; above, the whole vocabulary is sampled from."""
    seed: int
    mode: str
    options: dict[str, Any]


@dataclass
class Result:
    """Tokens of a batch. `seconds` only where the engine knows better than a clock around it."""

    token_ids: list[list[int]]
    details: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None


class Engine(ABC):
    """One engine with one checkpoint. Made from a `Load`; modes that can share it share it."""

    packages: tuple[str, ...]
    """Whose versions are told."""

    @abstractmethod
    def generate(self, batch: Batch) -> Result:
        """Complete the prompts of a batch."""

    def reset(self) -> None:  # noqa: B027 - most engines remember nothing
        """Forget all texts so far."""


def run(engine: Engine, command: dict[str, Any]) -> dict[str, Any]:
    """Complete all prompts, `batch` at a time; seconds and details add up.

    Raises:
        RuntimeError: a prompt got another number of tokens.
    """
    prompts, size = command.pop("prompts"), command.pop("batch")
    seconds, token_ids, details = 0.0, [], {}
    for first in range(0, len(prompts), size):
        batch = Batch(prompts=prompts[first : first + size], **command)
        begin = time.perf_counter()
        result = engine.generate(batch)
        elapsed = time.perf_counter() - begin
        seconds += elapsed if result.seconds is None else result.seconds
        token_ids += result.token_ids
        for key, value in result.details.items():
            details[key] = details.get(key, 0) + value
    lengths = [len(ids) for ids in token_ids]
    if lengths != [command["max_tokens"]] * len(prompts):
        wanted = f"{len(prompts)} prompts x {command['max_tokens']} tokens"
        raise RuntimeError(f"{wanted} became {lengths}")
    return {"seconds": seconds, "token_ids": token_ids, "details": details}


def serve(make: type[Any]) -> None:
    """Answer commands until the input ends. `make` turns a `Load` into an `Engine`."""
    _end_with_parent()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine: Engine | None = None
    for line in sys.stdin:
        command = json.loads(line)
        kind = command.pop("command")
        begin = time.perf_counter()
        try:
            if kind == "load":
                engine = make(Load(**command))
                versions = {name: version(name) for name in engine.packages}
                answer = {"seconds": time.perf_counter() - begin, "versions": versions}
            elif kind == "reset":
                engine.reset()
                answer = {"seconds": time.perf_counter() - begin}
            else:
                answer = run(engine, command)
        except Exception as error:
            text = str(error).strip().splitlines()
            answer = {"error": f"{type(error).__name__}: {' '.join(text)[:500]}"}
        out.write(json.dumps(answer) + "\n")
        out.flush()


def _end_with_parent() -> None:
    """Ask Linux to end this process when the benchmark is gone: stopped, it would never notice."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
