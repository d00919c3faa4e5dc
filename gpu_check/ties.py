"""Whether two runs parted at a near tie.

Where rounding is all that differs between two runs, they can part only where two tokens were about
equally good. The referee computes the logits at that place twice, in the engine's type and in a
finer one, and takes the largest difference between the two as the size of a rounding:

    score     the logit over the temperature, and the keyed noise where tokens are sampled
    gap       between the scores of the two tokens, in the finer type
    near tie  the gap is at most twice what rounding may change a score by

With top_p a token may also be in or out by rounding; then the smallest gap under a slightly smaller
and a slightly larger top_p counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from folospec import SamplingParams
from folospec.models.forward import Rows
from folospec.models.loader import load_model
from folospec.sampling import noise
from folospec.sampling.constraints import SamplingRow
from folospec.sampling.pipeline import process
from folospec.sampling.sampler import perturb
from folospec.worker.model_runner import ModelRunner

FINER = {"bfloat16": torch.float32, "float16": torch.float32, "float32": torch.float64}
MOST_ROWS = 4096
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Parting:
    """Where a sequence of one run stopped being that of another."""

    prompt: list[int]
    expected: list[int]
    found: list[int]
    params: SamplingParams
    sample_index: int = 0

    @property
    def place(self) -> int:
        """The first output token that differs."""
        pairs = zip(count(), self.expected, self.found, strict=False)
        shorter = min(len(self.expected), len(self.found))
        return next((i for i, a, b in pairs if a != b), shorter)


class Referee:
    """Explains partings of runs of one model in one type."""

    def __init__(self, model: str, dtype: str, device: str) -> None:
        self._coarse = _runner(model, getattr(torch, dtype), device)
        self._fine = _runner(model, FINER[dtype], device)

    def verify(self, parting: Parting) -> dict[str, Any]:
        """The place, the gap of the two tokens, what rounding may change, and whether it was a
        near tie. A run that ended early is never excused."""
        place = parting.place
        if place >= min(len(parting.expected), len(parting.found)):
            return {"position": place, "gap": None, "rounding": None, "near_tie": False}
        context = [*parting.prompt, *parting.expected[:place]]
        fine, coarse = (logits_after(runner, context) for runner in (self._fine, self._coarse))
        temperature = parting.params.temperature or 1.0
        rounding = float((fine - coarse.to(fine.dtype)).abs().max()) / temperature
        gap = min(self._gaps(parting, fine, rounding))
        return {
            "position": place,
            "gap": gap if math.isfinite(gap) else None,
            "rounding": rounding,
            "near_tie": gap <= 2 * rounding,
        }

    def _gaps(self, parting: Parting, logits: Tensor, rounding: float) -> list[float]:
        """The gap between the two tokens' scores, for every top_p that rounding may make of it."""
        params, place = parting.params, parting.place
        pair = [parting.expected[place], parting.found[place]]
        if params.greedy:
            scores = logits[pair]
            return [float((scores[0] - scores[1]).abs())]
        key = noise.key(
            params.seed or 0,
            parting.sample_index,
            len(parting.prompt) + place,
            noise.Purpose.TARGET,
        )
        gaps = []
        for top_p in {params.top_p, params.top_p * (1 - 2 * rounding), params.top_p + 2 * rounding}:
            row = SamplingRow(
                params=replace(params, top_p=min(max(top_p, 1e-6), 1.0)),
                output_token_ids=parting.expected[:place],
            )
            scores = perturb(process(logits[None], [row]), [key])[0, pair]
            gaps.append(float((scores[0] - scores[1]).abs().nan_to_num(math.inf)))
        return gaps


def logits_after(runner: ModelRunner, token_ids: list[int]) -> Tensor:
    """[vocab_size], on the host."""
    table = range(-(-len(token_ids) // BLOCK_SIZE))
    return runner.forward([Rows(token_ids, 0, table)]).logits[0].cpu()


def _runner(model: str, dtype: torch.dtype, device: str) -> ModelRunner:
    loaded = load_model(model, dtype=dtype, device=device, attention="torch")
    runner = ModelRunner(loaded, max_num_batched_tokens=MOST_ROWS)
    runner.make_kv(MOST_ROWS // BLOCK_SIZE, BLOCK_SIZE, torch.device(device))
    return runner
