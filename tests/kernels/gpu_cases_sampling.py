"""Cases of drawing on the device: the oracle is the torch pipeline on the CPU with keyed noise."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from gpu_case import Canvas, Case
from torch import Tensor

from folospec.kernels.gpu.sampling import DeviceSampling
from folospec.kernels.gpu.sampling_arrays import (
    arrays_of,
    child_arrays,
    on_device,
    read_paths,
    result_size,
    sizes,
)
from folospec.kernels.native_children import NO_NOISE, pack_wanted
from folospec.kernels.sampling_records import PackedTrees, pack_sampling
from folospec.sampling import noise
from folospec.sampling.noise import Purpose
from folospec.sampling.pipeline import SamplingRow, pack_filters, process
from folospec.sampling.sampler import draw_target
from folospec.sampling_params import SamplingParams
from folospec.spec.trees.children import ChildRequest, draw_children

NEG_INF = -math.inf
PART = 16
"""Tokens that one program works on, where vocabularies are small: so they have several parts."""


class Rows(NamedTuple):
    """Rows of logits and how they are drawn from."""

    kind: str
    vocab: int
    params: list[SamplingParams]
    filters: bool = True
    """Whether kernels are told that there may be filters."""
    part: int | None = PART

    def sampling(self, sampling: Sampling) -> DeviceSampling:
        return sampling_of(sampling, self.part)


Sampling = Callable[..., DeviceSampling]
Build = Callable[[str, torch.device, Sampling, random.Random], Case]
PLAIN = [SamplingParams(temperature=t) for t in (1.0, 0.7, 0.0, 1e-4, 50.0, 1e-300, 1.0, 1.0)]
FILTERED = [
    SamplingParams(**options)
    for options in (
        {"top_k": 1},
        {"top_k": 7, "temperature": 1.5},
        {"top_p": 0.4},
        {"top_p": 0.9, "top_k": 12, "min_p": 0.3},
        {"min_p": 0.2},
        {"min_p": 1.0, "top_p": 0.999},
        {"top_k": 5000, "top_p": 0.7, "min_p": 0.01},
        {"temperature": 0.0, "top_k": 3},
    )
]
EVEN = [SamplingParams(top_p=0.5), SamplingParams(top_k=7)]
"""In a row of 32 equal logits the first of them is met by 16 tokens to the last bit."""
MIXED = [PLAIN[1], FILTERED[1], PLAIN[2], FILTERED[6], FILTERED[2]]
ROWS = {
    # As they are drawn from in earnest; the first of a kernel is built for every card.
    "128256, mixed": Rows("wide", 128256, [*PLAIN[1:3], *FILTERED[2:4]], part=None),
    "128256, plain": Rows("wide", 128256, PLAIN[1:3], filters=False, part=None),
    "32000, mixed": Rows("wide", 32000, MIXED[2:4], part=None),
    "few, 13, plain": Rows("flat", 13, PLAIN[:2]),
    "flat, 40, plain": Rows("flat", 40, PLAIN),
    "wide, 61, plain": Rows("wide", 61, PLAIN),
    "holes, 33, plain": Rows("holes", 33, PLAIN, filters=False),
    "ties, 45, plain": Rows("ties", 45, [SamplingParams(temperature=0)] * 3),
    "wide, 40, filtered": Rows("wide", 40, FILTERED),
    "ties, 37, filtered": Rows("ties", 37, FILTERED),
    "holes, 50, filtered": Rows("holes", 50, FILTERED[::2]),
    "flat, 32, filtered": Rows("flat", 32, EVEN),
    "wide, 23, mixed": Rows("wide", 23, MIXED),
    "one, 1, mixed": Rows("one", 1, [PLAIN[0], FILTERED[2]]),
}


def sampling_of(sampling: Sampling, part: int | None) -> DeviceSampling:
    """As it is made for a vocabulary of any size, or for a small one."""
    return sampling() if part is None else sampling(part=part, filtered_rows=3)


def cases(
    device: torch.device, seed: int = 0, sampling: Sampling = DeviceSampling
) -> Iterator[Case]:
    """Every kernel, on ragged inputs. `sampling` makes what is put to the test."""
    for name in BUILDS:
        yield case(name, device, seed, sampling)


def case(
    name: str, device: torch.device, seed: int = 0, sampling: Sampling = DeviceSampling
) -> Case:
    return BUILDS[name](name, device, sampling, random.Random(f"{seed} {name}"))


def logits_of(rows: Rows, rng: random.Random) -> Tensor:
    """Rows with what is hard: all alike, ties within and across parts, impossible tokens."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    shape = (len(rows.params), rows.vocab)
    logits = torch.randn(*shape, generator=generator) * 3
    match rows.kind:
        case "flat":
            return logits * 0.0  # zeros of both signs
        case "ties":
            return (logits / 2).round() * 2
        case "holes":
            logits[torch.rand(*shape, generator=generator) < 0.6] = NEG_INF
            logits[:, rows.vocab // 2] = 0.5
        case "impossible":
            logits *= 0.0
            logits[0], logits[1, 39], logits[2, 17] = NEG_INF, math.nan, math.inf
    return logits


def nan_to_num(values: Tensor) -> Tensor:
    """NaN as a number like any other, which equals itself."""
    return torch.nan_to_num(values, nan=-7.0)


def on_canvas(logits: Tensor, device: torch.device) -> Tensor:
    """The rows as a view of wider ones, whose other columns are not to be read."""
    whole = torch.full((len(logits), logits.shape[1] + 3), 99.0, device=device)
    whole[:, :-3] = logits
    return whole[:, :-3]


def streams(count: int, rng: random.Random) -> list[tuple[int, int, int]]:
    """Seeds of 64 bits, sample indices and positions."""
    return [(rng.randrange(2**64), rng.randrange(9), rng.randrange(5000)) for _ in range(count)]


def draws(
    rows: Rows, name: str, device: torch.device, sampling: Sampling, rng: random.Random
) -> Case:
    params = rows.params
    logits, keys, asked = logits_of(rows, rng), streams(len(params), rng), PackedTrees()
    remote = on_canvas(logits, device)
    for row, (p, (seed, index, position)) in enumerate(zip(params, keys, strict=True)):
        asked.add(pack_sampling(seed, index, pack_filters(p)), row, position)

    def expected() -> dict[str, Tensor]:
        log_probs = process(logits, [SamplingRow(p, draft_token_ids=[0]) for p in params])
        tokens = draw_target(log_probs, [noise.key(*key, Purpose.TARGET) for key in keys])
        return {"tokens": tokens, "peaks": nan_to_num(logits.amax(-1))}

    case = Case(name=name, run=lambda: {}, expected=expected)

    def run() -> dict[str, Tensor]:
        found = verified(rows.sampling(sampling), remote, asked, case, rows.filters)
        return {"tokens": found["tokens"], "peaks": nan_to_num(found["peaks"])}

    case.run = run
    return case


def verified(
    sampling: DeviceSampling, logits: Tensor, asked: PackedTrees, case: Case, filters: bool = True
) -> dict[str, Tensor]:
    """Walk with room for more than there is; what is beyond must do no harm."""
    num_trees, num_nodes = len(asked) + 2, len(asked.nodes) // 2 + 5
    tensors = {}
    for name, (dtype, length) in sizes(num_trees, num_nodes).items():
        tensors[name] = torch.full((length,), -1 if name == "draws" else 0, dtype=dtype)
    for name, array in arrays_of(asked).items():
        tensors[name][: len(array)] = torch.from_numpy(array.copy())
    tensors = {name: tensor.to(logits.device) for name, tensor in tensors.items()}
    result = Canvas((result_size(num_trees, num_nodes),), torch.int64, logits.device)
    case.canvases[:] = [result]
    sampling.run_verify(logits, tensors, result.tensor, filters=filters)
    return outcome(result.tensor, asked, num_trees)


def outcome(result: Tensor, asked: PackedTrees, num_trees: int) -> dict[str, Tensor]:
    found = read_paths(result.cpu(), asked, num_trees)
    return {
        "tokens": torch.tensor([one.token_id for one in found]),
        "lengths": torch.tensor([len(one.path) for one in found]),
        "paths": torch.tensor([node for one in found for node in one.path]).long(),
        "peaks": torch.tensor([one.peak for one in found]).float(),
    }


def log_probs(
    rows: Rows, name: str, device: torch.device, sampling: Sampling, rng: random.Random
) -> Case:
    packed = [pack_sampling(0, 0, pack_filters(p)) for p in rows.params]
    logits = logits_of(rows, rng)
    remote = on_canvas(logits, device)

    def run() -> dict[str, Tensor]:
        params_of = range(len(packed))
        log_probs, peaks = rows.sampling(sampling).start_log_probs(remote, packed, params_of)
        return {"log_probs": log_probs, "possible": log_probs > NEG_INF, "peaks": peaks}

    def expected() -> dict[str, Tensor]:
        log_probs = process(logits, [SamplingRow(p) for p in rows.params])
        return {
            "log_probs": log_probs,
            "possible": log_probs > NEG_INF,
            "peaks": logits.amax(-1),
        }

    return Case(name=name, run=run, expected=expected, tolerance=1e-6)


def children(
    rows: Rows, name: str, device: torch.device, sampling: Sampling, rng: random.Random
) -> Case:
    """Noise where the request is sampled, as the drafters ask for it; a chain's second token."""
    # The oracle of confidences has no numbers where float32 scales are 0.
    params = [p for p in rows.params if p.temperature == 0 or p.temperature > 1e-30]
    logits, keys, sharpness = logits_of(rows, rng)[: len(params)], streams(len(params), rng), 1.3
    remote, wanted, advance = on_canvas(logits, device), [], 1
    for row, (p, (_, _, position)) in enumerate(zip(params, keys, strict=True)):
        scale = sharpness * (p.temperature or 1.0)
        place = NO_NOISE if p.greedy else position - advance
        wanted.append(pack_wanted(row, place, 1, scale))
    packed = [
        pack_sampling(seed, index, pack_filters(p))
        for p, (seed, index, _) in zip(params, keys, strict=True)
    ]
    result = Canvas((3, len(params)), torch.int64, device)

    def run() -> dict[str, Tensor]:
        tensors = on_device(child_arrays(packed, wanted), device)
        made = rows.sampling(sampling)
        made.draw_next(remote, tensors, result.tensor, filters=rows.filters, advance=advance)
        tokens, found, bits = result.tensor.cpu()
        return {"tokens": tokens, "found": found, "chances": bits.int().view(torch.float32)}

    def expected() -> dict[str, Tensor]:
        log_probs = process(logits, [SamplingRow(p) for p in params], soften_greedy=True)
        places = [
            ChildRequest(1, [noise.key(*key, Purpose.TARGET)], p.temperature)
            for p, key in zip(params, keys, strict=True)
        ]
        drawn = draw_children("coupled", log_probs, places, sharpness)
        return {
            "tokens": torch.tensor([child.token_ids[0] for child in drawn]),
            "found": torch.ones(len(drawn)),
            "chances": torch.tensor([child.confidence[0] for child in drawn]),
        }

    case = Case(name=name, run=run, expected=expected, tolerance=2e-3)
    case.canvases.append(result)
    return case


IMPOSSIBLE = Rows("impossible", 40, PLAIN[:4])
BUILDS: dict[str, Build] = {
    f"{build.__name__}: {name}": partial(build, rows)
    for name, rows in ROWS.items()
    for build in (draws, log_probs, children)
} | {"draws: impossible": partial(draws, IMPOSSIBLE)}
