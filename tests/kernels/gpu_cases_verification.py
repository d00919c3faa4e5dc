"""Cases of verification on the device: the oracles are the rules of `spec.verify`."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from gpu_case import Canvas, Case
from gpu_cases_sampling import Build, Sampling, on_canvas, outcome, sampling_of, streams, verified
from torch import Tensor

from folospec.core.token_tree import TokenTree
from folospec.kernels.gpu.sampling import DeviceSampling
from folospec.kernels.gpu.sampling_arrays import (
    PackedProposals,
    arrays_of,
    on_device,
    read_ratio_paths,
    result_size,
)
from folospec.kernels.sampling_records import PackedTrees, pack_sampling
from folospec.sampling import noise
from folospec.sampling.noise import Purpose
from folospec.sampling.pipeline import SamplingRow, pack_filters, process
from folospec.sampling.sampler import NO_TOKEN, draw_target
from folospec.sampling_params import SamplingParams
from folospec.spec.acceptance import ACCEPTANCE
from folospec.spec.proposal import Proposal
from folospec.spec.verify import KeyedCoins, verify_coupled

DUPLICATES = {0: [-1, -1, 1], 2: [-1, -1, 1, 0]}
"""How some trees begin, all with the tokens that are drawn: the second duplicate goes on, or both
do, and the one that comes later has the earlier child."""
VOCAB = 21


def cases(
    device: torch.device, seed: int = 0, sampling: Sampling = DeviceSampling
) -> Iterator[Case]:
    """Every rule, on ragged inputs. `sampling` makes what is put to the test."""
    for name in BUILDS:
        yield case(name, device, seed, sampling)


def case(
    name: str, device: torch.device, seed: int = 0, sampling: Sampling = DeviceSampling
) -> Case:
    return BUILDS[name](name, device, sampling, random.Random(f"{seed} {name}"))


class Tree(NamedTuple):
    stream: tuple[int, int, int]
    parents: list[int]
    depths: list[int]
    """Of the root too."""
    num_duplicates: int


def tree_of(number: int, size: int, stream: tuple[int, int, int], rng: random.Random) -> Tree:
    duplicates = DUPLICATES.get(number, []) if size > 3 else []
    parents = [rng.randrange(-1, min(node, 4 + node // 2)) for node in range(size)]
    parents[: len(duplicates)] = duplicates
    parents[len(duplicates) :] = [max(len(duplicates) - 1, p) for p in parents[len(duplicates) :]]
    return Tree(stream, parents, [0, *TokenTree([0] * size, parents).depths], len(duplicates))


def trees_of(sizes: Sequence[int], rng: random.Random) -> list[Tree]:
    found = zip(sizes, streams(len(sizes), rng), strict=True)
    return [tree_of(number, *told, rng) for number, told in enumerate(found)]


def asked_of(
    trees: list[Tree], drawn: list[list[int]], peaks: list[Tensor], first: int, rng: random.Random
) -> tuple[PackedTrees, dict[str, Tensor]]:
    """PackedTrees of trees of likely tokens, with nodes that are not to be accepted, and their
    outcome.

    Args:
        drawn: the tokens of the rows of each tree.
        peaks: the largest logits of those rows.
        first: row of logits.
    """
    asked, verdicts, ends, row = PackedTrees(), [], [], first
    for tree, tokens, peak in zip(trees, drawn, peaks, strict=True):
        size, certain = len(tree.parents), tree.num_duplicates
        likely = [tokens[parent + 1] for parent in tree.parents]
        token_ids = [t if rng.random() < 0.7 else rng.randrange(VOCAB) for t in likely]
        verified = [rng.random() < 0.8 for _ in range(size)]
        token_ids[:certain], verified[:certain] = likely[:certain], [True] * certain
        verdict = verify_coupled(TokenTree(token_ids, tree.parents), tokens, verified)
        verdicts.append(verdict)
        ends.append(peak[verdict.path[-1] + 1 if verdict.path else 0])
        marked = [t if j else NO_TOKEN for t, j in zip(token_ids, verified, strict=True)]
        params = pack_sampling(*tree.stream[:2], pack_filters(SamplingParams()))
        asked.add(params, row, tree.stream[2], marked, tree.parents)
        row += size + 1
    return asked, {**outcome_of(verdicts), "peaks": torch.stack(ends)}


def outcome_of(verdicts: Sequence[Any]) -> dict[str, Tensor]:
    return {
        "tokens": torch.tensor([v.next_token_id for v in verdicts]),
        "lengths": torch.tensor([len(v.path) for v in verdicts]),
        "paths": torch.tensor([node for v in verdicts for node in v.path]).long(),
    }


def packed_trees(
    sizes: list[int], name: str, device: torch.device, sampling: Sampling, rng: random.Random
) -> Case:
    """From rows of logits to paths."""
    first, trees, drawn = 2, trees_of(sizes, rng), []  # rows before the first are nobody's
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    logits = torch.randn(first + sum(sizes) + len(sizes), VOCAB, generator=generator) * 3
    parts = logits[first:].split([size + 1 for size in sizes])
    for tree, rows in zip(trees, parts, strict=True):
        if (
            tree.num_duplicates
        ):  # which have the same rows, as in truth; elsewhere their order shows
            rows.copy_(rows[0].clone().expand_as(rows))
        seed, index, position = tree.stream
        keys = [noise.key(seed, index, position + d, Purpose.TARGET) for d in tree.depths]
        params = process(rows, [SamplingRow(SamplingParams())] * len(rows))
        drawn.append(draw_target(params, keys).tolist())
    asked, expected = asked_of(trees, drawn, [rows.amax(-1) for rows in parts], first, rng)
    remote = on_canvas(logits, device)
    case = Case(name=name, run=lambda: {}, expected=lambda: expected)
    case.run = lambda: verified(sampling_of(sampling, 32), remote, asked, case)
    return case


def paths(
    sizes: list[int], name: str, device: torch.device, sampling: Sampling, rng: random.Random
) -> Case:
    """From tokens to paths, in trees too large to draw all of their rows where kernels are
    interpreted."""
    trees, drawn = trees_of(sizes, rng), []
    for tree in trees:
        tokens = [rng.randrange(VOCAB) for _ in tree.depths]
        drawn.append([tokens[d] for d in tree.depths] if tree.num_duplicates else tokens)
    peaks = [torch.tensor([rng.gauss(0, 3) for _ in tokens]) for tokens in drawn]
    asked, expected = asked_of(trees, drawn, peaks, 0, rng)
    tokens = torch.tensor([token for found in drawn for token in found], device=device)
    result = Canvas((result_size(len(sizes), sum(sizes)),), torch.int64, device)

    def run() -> dict[str, Tensor]:
        tensors = on_device(arrays_of(asked), device)
        row_peaks = torch.cat(peaks).to(device)
        sampling().verify_trees(tensors, tokens, row_peaks, result.tensor, max_nodes=sum(sizes))
        return outcome(result.tensor, asked, len(sizes))

    return Case(name=name, run=run, expected=lambda: expected, canvases=[result])


class Ratio(NamedTuple):
    rule: str
    vocab: int
    tree_sizes: Sequence[int]
    part: int | None = 16


def ratio(
    told: Ratio, name: str, device: torch.device, sampling: Sampling, rng: random.Random
) -> Case:
    """Proposals with parameter sets and without, siblings, scratch nodes, drafts that cover the
    target."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    rule, vocab, tree_sizes, part = told
    num_rows = 1 + sum(tree_sizes) + len(tree_sizes)
    probs = (torch.randn(num_rows, vocab, generator=generator) * 1.5).softmax(-1)
    proposals, verdicts, row = PackedProposals(), [], 1
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
        verified = [rng.random() < 0.8 for _ in range(size)]
        proposal = Proposal(TokenTree(token_ids, parents), drafts, None, verified)
        distributions_of_tree = probs[row : row + size + 1]
        verdicts.append(
            ACCEPTANCE[rule].verify(proposal, distributions_of_tree, KeyedCoins(*stream))
        )
        marked = [t if j else NO_TOKEN for t, j in zip(token_ids, verified, strict=True)]
        proposals.add(stream, row, marked, parents, drafts)
        row += size + 1
    remote = on_canvas(probs, device)
    result = Canvas((result_size(len(proposals), proposals.num_nodes),), torch.int64, device)

    def run() -> dict[str, Tensor]:
        tensors = on_device(proposals.arrays(), device)
        drafts = proposals.draft_probs(remote)
        made = sampling_of(sampling, part)
        made.run_ratio(rule, remote, drafts, tensors, result.tensor, max_nodes=proposals.max_nodes)
        found = read_ratio_paths(result.tensor.cpu(), proposals)
        return {
            "tokens": torch.tensor([verified.token_id for verified in found]),
            "lengths": torch.tensor([len(verified.path) for verified in found]),
            "paths": torch.tensor([node for verified in found for node in verified.path]).long(),
        }

    return Case(name=name, run=run, expected=lambda: outcome_of(verdicts), canvases=[result])


SOME, FEW = [0, 1, 3, 5, 9, 2, 4, 6, 3, 8, 4, 9, 1, 6], [2, 0, 3, 4]
BUILDS: dict[str, Build] = {
    f"{rule}: {vocab}": partial(ratio, Ratio(rule, vocab, sizes, part))
    for rule in ("rejection", "block")
    for vocab, sizes, part in ((128256, FEW, None), (5, SOME, 16), (11, SOME, 16), (37, SOME, 16))
}
BUILDS |= {
    f"trees: {name}": partial(packed_trees, sizes)
    for name, sizes in (("small", [0, 1, 5]), ("duplicates", [12, 0, 4]), ("bare", [0, 0]))
}
BUILDS |= {f"paths: {sum(sizes)}": partial(paths, sizes) for sizes in ([24, 64], [384, 0, 128])}
