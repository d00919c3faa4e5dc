"""Cases of sampling and verification on the device: the oracles are the torch pipeline on the CPU
with keyed noise, and the rules of `spec.verify`."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from gpu_case import Canvas, Case
from torch import Tensor

from folospec.core.token_tree import TokenTree
from folospec.kernels.gpu.sampling import (
    DeviceSampling,
    Trials,
    arrays_of,
    child_arrays,
    read_trials,
    read_walks,
    result_size,
    sizes,
)
from folospec.kernels.gpu.sampling_arrays import on_device
from folospec.kernels.native_children import NO_NOISE, pack_wanted
from folospec.kernels.native_sampling import Walks, pack_law
from folospec.sampling import noise
from folospec.sampling.noise import Purpose
from folospec.sampling.pipeline import SamplingRow, pack_filters, process
from folospec.sampling.sampler import NO_TOKEN, draw_target
from folospec.sampling_params import SamplingParams
from folospec.spec.children import Place, draw_children
from folospec.spec.proposal import Proposal
from folospec.spec.verify import ACCEPTANCE, KeyedCoins, verify_coupled

NEG_INF = -math.inf
PART = 16
"""Tokens that one program works on, here: few, so that small vocabularies have several parts."""
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
TWINS = {0: [-1, -1, 1], 2: [-1, -1, 1, 0]}
"""How some trees begin, all with the tokens that are drawn: the second twin goes on, or both do,
and the one that comes later has the earlier child."""
Sampling = Callable[..., DeviceSampling]


def cases(
    device: torch.device, seed: int = 0, sampling: Sampling = DeviceSampling
) -> Iterator[Case]:
    """Every kernel, on ragged inputs. `sampling` makes what is put to the test."""
    make = partial(sampling, part=PART, filtered_rows=3)
    rng = random.Random(seed)
    kinds: list[tuple[str, int, list[SamplingParams]]] = [
        ("flat", 40, PLAIN),
        ("wide", 61, PLAIN),
        ("holes", 33, PLAIN),
        ("ties", 45, [SamplingParams(temperature=0)] * 3),
        ("wide", 40, FILTERED),
        ("ties", 37, FILTERED),
        ("holes", 50, FILTERED[::2]),
        ("flat", 32, EVEN),
        ("one", 1, [PLAIN[0], FILTERED[2]]),
    ]
    for kind, vocab, params in kinds:
        name = f"{kind}, {vocab}, {'plain' if params[0] in PLAIN else 'filtered'}"
        logits = logits_of(kind, len(params), vocab, rng)
        yield draws(f"draws: {name}", device, make, logits, params, rng)
        yield laws(f"laws: {name}", device, make, logits, params)
        # The oracle of confidences has no numbers where float32 scales are 0.
        lukewarm = [p for p in params if p.temperature == 0 or p.temperature > 1e-30]
        yield children(f"children: {name}", device, make, logits, lukewarm, rng)
    yield draws("draws: impossible", device, make, impossible(), PLAIN[:4], rng)
    for name, sizes_of_trees in (
        ("small", [0, 1, 5]),
        ("twins", [12, 0, 4]),
        ("large", [24, 64]),
        ("bare", [0, 0]),
    ):
        yield walks(f"walks: {name}", device, make, sizes_of_trees, rng)
    for rule in ("rejection", "block"):
        for vocab in (5, 11, 37):
            yield ratio(f"{rule}: {vocab}", device, make, rule, vocab, rng)


def logits_of(kind: str, num_rows: int, vocab: int, rng: random.Random) -> Tensor:
    """Rows with what is hard: all alike, ties within and across parts, impossible tokens."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    logits = torch.randn(num_rows, vocab, generator=generator) * 3
    match kind:
        case "flat":
            return logits * 0.0  # zeros of both signs
        case "ties":
            return (logits / 2).round() * 2
        case "holes":
            logits[torch.rand(num_rows, vocab, generator=generator) < 0.6] = NEG_INF
            logits[:, vocab // 2] = 0.5
    return logits


def impossible() -> Tensor:
    logits = torch.zeros(4, 40)
    logits[0] = NEG_INF
    logits[1, 39] = math.nan
    logits[2, 17] = math.inf
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
    name: str,
    device: torch.device,
    make: Sampling,
    logits: Tensor,
    params: list[SamplingParams],
    rng: random.Random,
) -> Case:
    keys = streams(len(params), rng)
    remote, asked = on_canvas(logits, device), Walks()
    for row, (p, (seed, index, position)) in enumerate(zip(params, keys, strict=True)):
        asked.add(pack_law(seed, index, pack_filters(p)), row, position)

    def expected() -> dict[str, Tensor]:
        rows = [SamplingRow(p, draft_token_ids=[0]) for p in params]
        log_probs = process(logits, rows)
        tokens = draw_target(log_probs, [noise.key(*key, Purpose.TARGET) for key in keys])
        return {"tokens": tokens, "peaks": nan_to_num(logits.amax(-1))}

    case = Case(name=name, run=lambda: {}, expected=expected)

    def run() -> dict[str, Tensor]:
        found = walked(make(), remote, asked, case)
        return {"tokens": found["tokens"], "peaks": nan_to_num(found["peaks"])}

    case.run = run
    return case


def walked(sampling: DeviceSampling, logits: Tensor, asked: Walks, case: Case) -> dict[str, Tensor]:
    """Walk with room for more than there is; what is beyond must cost nothing and do no harm."""
    num_walks, num_nodes = len(asked) + 2, len(asked._nodes) // 2 + 5
    tensors = {}
    for name, (dtype, length) in sizes(num_walks, num_nodes).items():
        tensors[name] = torch.full((length,), -1 if name == "draws" else 0, dtype=dtype)
    for name, array in arrays_of(asked).items():
        tensors[name][: len(array)] = torch.from_numpy(array.copy())
    tensors = {name: tensor.to(logits.device) for name, tensor in tensors.items()}
    result = Canvas((result_size(num_walks, num_nodes),), torch.int64, logits.device)
    case.canvases[:] = [result]
    sampling.run_walks(logits, tensors, result.tensor)
    found = read_walks(result.tensor.cpu(), asked, num_walks)
    return {
        "tokens": torch.tensor([walk.token_id for walk in found]),
        "lengths": torch.tensor([len(walk.path) for walk in found]),
        "paths": torch.tensor([node for walk in found for node in walk.path]).long(),
        "peaks": torch.tensor([walk.peak for walk in found]).float(),
    }


def laws(
    name: str, device: torch.device, make: Sampling, logits: Tensor, params: list[SamplingParams]
) -> Case:
    packed = [pack_law(0, 0, pack_filters(p)) for p in params]
    remote = on_canvas(logits, device)

    def run() -> dict[str, Tensor]:
        log_probs, peaks = make().start_log_probs(remote, packed, range(len(packed)))
        return {"log_probs": log_probs, "possible": log_probs > NEG_INF, "peaks": peaks}

    def expected() -> dict[str, Tensor]:
        log_probs = process(logits, [SamplingRow(p) for p in params])
        return {
            "log_probs": log_probs,
            "possible": log_probs > NEG_INF,
            "peaks": logits.amax(-1),
        }

    return Case(name=name, run=run, expected=expected, tolerance=1e-6)


def children(
    name: str,
    device: torch.device,
    make: Sampling,
    logits: Tensor,
    params: list[SamplingParams],
    rng: random.Random,
) -> Case:
    """Noise where the request is sampled, as the drafters ask for it; a chain's second token."""
    keys, sharpness, remote = streams(len(params), rng), 1.3, on_canvas(logits, device)
    wanted, advance = [], 1
    for row, (p, (_, _, position)) in enumerate(zip(params, keys, strict=True)):
        scale = sharpness * (p.temperature or 1.0)
        place = NO_NOISE if p.greedy else position - advance
        wanted.append(pack_wanted(row, place, 1, scale))
    packed = [
        pack_law(seed, index, pack_filters(p))
        for p, (seed, index, _) in zip(params, keys, strict=True)
    ]
    remote = remote[: len(params)]
    result = Canvas((3, len(params)), torch.int64, device)

    def run() -> dict[str, Tensor]:
        tensors = on_device(child_arrays(packed, wanted), device)
        make().draw_next(remote, tensors, result.tensor, advance=advance)
        tokens, found, bits = result.tensor.cpu()
        return {"tokens": tokens, "found": found, "chances": bits.int().view(torch.float32)}

    def expected() -> dict[str, Tensor]:
        rows = [SamplingRow(p) for p in params]
        log_probs = process(logits[: len(rows)], rows, soften_greedy=True)
        places = [
            Place(1, [noise.key(*key, Purpose.TARGET)], p.temperature)
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


def walks(
    name: str,
    device: torch.device,
    make: Sampling,
    tree_sizes: list[int],
    rng: random.Random,
) -> Case:
    """Trees of likely tokens, twins among them, and nodes that are not to be accepted."""
    first, vocab, asked = 2, 21, Walks()  # rows before the first are nobody's
    logits = logits_of("wide", first + sum(tree_sizes) + len(tree_sizes), vocab, rng)
    verdicts, peaks, row = [], [], first
    for number, stream in enumerate(streams(len(tree_sizes), rng)):
        size = tree_sizes[number]
        if number in TWINS:  # which have the same rows, as in truth; elsewhere their order shows
            logits[row : row + size + 1] = logits[row]
        parents = [rng.randrange(-1, min(node, 4 + node // 2)) for node in range(size)]
        top = TWINS.get(number, []) if size > 3 else []
        parents[: len(top)] = top
        parents[len(top) :] = [max(len(top) - 1, p) for p in parents[len(top) :]]
        depths = TokenTree([0] * size, parents).depths
        keys = [noise.key(*stream[:2], stream[2] + depth, Purpose.TARGET) for depth in (0, *depths)]
        rows = logits[row : row + size + 1]
        drawn = draw_target(process(rows, [SamplingRow(SamplingParams())] * len(rows)), keys)
        likely = [int(drawn[parent + 1]) for parent in parents]
        token_ids = [t if rng.random() < 0.7 else rng.randrange(vocab) for t in likely]
        judged = [rng.random() < 0.8 for _ in range(size)]
        token_ids[: len(top)], judged[: len(top)] = likely[: len(top)], [True] * len(top)
        verdict = verify_coupled(TokenTree(token_ids, parents), drawn.tolist(), judged)
        verdicts.append(verdict)
        peaks.append(rows[verdict.path[-1] + 1 if verdict.path else 0].amax())
        marked = [t if j else NO_TOKEN for t, j in zip(token_ids, judged, strict=True)]
        law = pack_law(*stream[:2], pack_filters(SamplingParams()))
        asked.add(law, row, stream[2], marked, parents)
        row += size + 1
    remote = on_canvas(logits, device)

    def expected() -> dict[str, Tensor]:
        return {
            "tokens": torch.tensor([v.next_token_id for v in verdicts]),
            "lengths": torch.tensor([len(v.path) for v in verdicts]),
            "paths": torch.tensor([node for v in verdicts for node in v.path]).long(),
            "peaks": torch.stack(peaks),
        }

    case = Case(name=name, run=lambda: {}, expected=expected)
    case.run = lambda: walked(make(), remote, asked, case)
    return case


def ratio(
    name: str, device: torch.device, make: Sampling, rule: str, vocab: int, rng: random.Random
) -> Case:
    """Proposals with laws and without, siblings, scratch nodes, drafts that cover the target."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    tree_sizes = [0, 1, 3, 5, 9, 2, 4, 6, 3, 8, 4, 9, 1, 6]
    num_rows = 1 + sum(tree_sizes) + len(tree_sizes)
    probs = (torch.randn(num_rows, vocab, generator=generator) * 1.5).softmax(-1)
    trials, verdicts, row = Trials(), [], 1
    for number, (size, stream) in enumerate(
        zip(tree_sizes, streams(len(tree_sizes), rng), strict=True)
    ):
        parents = list(range(-1, size - 1))
        if rule == "rejection":
            parents = [rng.randrange(-1, min(node, 3)) for node in range(size)]
        above = probs[row + 1 :][torch.tensor(parents).long()] if size else probs[:0]
        drafts: Any = None
        token_ids = [rng.randrange(vocab) for _ in range(size)]
        if number % 2 and size:
            spread = (0.0, 0.4, 2.0, 0.7)[number // 2 % 4]
            wild = torch.randn(size, vocab, generator=generator) * spread
            drafts = (above.log() + wild).softmax(-1)
            token_ids = torch.multinomial(drafts, 1, generator=generator)[:, 0].tolist()
        judged = [rng.random() < 0.8 for _ in range(size)]
        proposal = Proposal(TokenTree(token_ids, parents), drafts, None, judged)
        laws_of_tree = probs[row : row + size + 1]
        verdicts.append(ACCEPTANCE[rule].verify(proposal, laws_of_tree, KeyedCoins(*stream)))
        marked = [t if j else NO_TOKEN for t, j in zip(token_ids, judged, strict=True)]
        trials.add(stream, row, marked, parents, drafts)
        row += size + 1
    remote = on_canvas(probs, device)
    result = Canvas((result_size(len(trials), trials.num_nodes),), torch.int64, device)

    def run() -> dict[str, Tensor]:
        tensors = on_device(trials.arrays(), device)
        drafts = trials.draft_probs(remote)
        make().run_ratio(rule, remote, drafts, tensors, result.tensor, max_nodes=trials.max_nodes)
        found = read_trials(result.tensor.cpu(), trials)
        return {
            "tokens": torch.tensor([judged.token_id for judged in found]),
            "lengths": torch.tensor([len(judged.path) for judged in found]),
            "paths": torch.tensor([node for judged in found for node in judged.path]).long(),
        }

    def expected() -> dict[str, Tensor]:
        return {
            "tokens": torch.tensor([v.next_token_id for v in verdicts]),
            "lengths": torch.tensor([len(v.path) for v in verdicts]),
            "paths": torch.tensor([node for v in verdicts for node in v.path]).long(),
        }

    case = Case(name=name, run=run, expected=expected)
    case.canvases.append(result)
    return case
