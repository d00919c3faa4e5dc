"""Packs the rows at which tokens are drawn, with their options, for the verifying kernels.

Such a kernel draws and verifies in one call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, takewhile

import torch
from torch import Tensor

from folospec.core.sequence_step import SequenceStep
from folospec.core.token_tree import Verdict
from folospec.kernels.sampling_records import PackedTrees, VerifiedPath, pack_sampling
from folospec.sampling.constraints import NoTokenError, SamplingRow, constrain, is_constrained
from folospec.sampling.pipeline import no_token_error
from folospec.sampling.sampler import NO_TOKEN
from folospec.spec.acceptance import AcceptanceRule
from folospec.spec.verify import verify_coupled


def candidates_of(step: SequenceStep) -> Sequence[bool] | None:
    """Which nodes of the step's tree are verified; None: all are."""
    return None if step.proposal is None else step.proposal.candidate


def sampled_rows(step: SequenceStep) -> Sequence[int]:
    """Those of `logits_indices` that can decide anything: the root's and the candidates'. Of
    scratch rows nothing is asked, so none of the request's options are applied to them."""
    candidate = candidates_of(step)
    if candidate is None:
        return step.logits_indices
    rows = zip(step.logits_indices, (True, *candidate), strict=True)
    return [row for row, is_sampled in rows if is_sampled]


def sampled_positions(step: SequenceStep) -> Sequence[int]:
    """The position of the token that is drawn at each of `sampled_rows`."""
    begin, tree, candidate = step.seq.num_tokens, step.tree, candidates_of(step)
    if tree.is_chain:
        positions: Sequence[int] = range(begin, begin + len(step.logits_indices))
    else:
        positions = [begin, *(begin + depth for depth in tree.depths)]
    if candidate is None:
        return positions
    return [positions[row - step.logits_indices.start] for row in sampled_rows(step)]


def candidate_token_ids(step: SequenceStep) -> Sequence[int]:
    """The tokens of the nodes, `NO_TOKEN` for those that are not verified."""
    token_ids, candidate = step.tree.token_ids, candidates_of(step)
    if candidate is None:
        return token_ids
    nodes = zip(token_ids, candidate, strict=True)
    return [token_id if is_candidate else NO_TOKEN for token_id, is_candidate in nodes]


def sampling_rows(step: SequenceStep) -> list[SamplingRow]:
    """What is asked of each of `sampled_rows`."""
    first, tree, sampling = step.logits_indices.start + 1, step.tree, step.group.sampling
    nodes = [row - first for row in sampled_rows(step)]
    paths = [tree.path_token_ids(node) if node >= 0 else () for node in nodes]
    return [sampling.row(step.seq, path) for path in paths]


def step_of_row(steps: list[SequenceStep], row: int) -> SequenceStep:
    """The step that the given one of all sampled rows belongs to."""
    for step in steps:
        num_rows = len(sampled_rows(step))
        if row < num_rows:
            return step
        row -= num_rows
    raise IndexError(f"there is no sampled row {row}")


def verify_drawn(step: SequenceStep, drawn: Iterator[int], rule: AcceptanceRule) -> None:
    """Take the target's tokens, those of the sampled rows for each draw, and verify a proposal by
    the rule."""
    registered = step.proposal is not None and not rule.has_kernels
    verify = rule.verify if registered else verify_coupled
    candidate = candidates_of(step)
    step.verdicts = []
    for _ in range(step.num_draws):
        if candidate is None:
            tokens = list(islice(drawn, len(step.logits_indices)))
        else:
            tokens = [next(drawn) if sampled else NO_TOKEN for sampled in (True, *candidate)]
        step.verdicts.append(verify(step.tree, tokens, candidate))


def pack_trees(steps: Sequence[SequenceStep]) -> PackedTrees:
    """What the steps ask for, as one call draws and verifies it."""
    packed_trees = PackedTrees()
    for step in steps:
        seq, group, parents = step.seq, step.group, step.tree.parents
        token_ids = candidate_token_ids(step)
        for draw in range(step.num_draws):
            params = pack_sampling(group.seed, seq.sample_index + draw, group.sampling.filters)
            packed_trees.add(params, step.logits_indices.start, seq.num_tokens, token_ids, parents)
    return packed_trees


def take_paths(steps: list[SequenceStep], found: Iterable[VerifiedPath]) -> None:
    """Fill in the verdicts from what came of `pack_trees`.

    Raises:
        NoTokenError: see `verify_batch`.
    """
    verified = iter(found)
    for step in steps:
        step.verdicts = []
        for path in islice(verified, step.num_draws):
            # Below drafts, where plain decoding might not come, there need be no token.
            if path.token_id == NO_TOKEN and not path.path:
                before = takewhile(lambda other: other is not step, steps)  # noqa: B023
                place = sum(len(sampled_rows(other)) for other in before)
                root = step.group.sampling.row(step.seq)
                raise no_token_error(place, root, path.peak)
            step.verdicts.append(Verdict(path.path, path.token_id))


def constrained(steps: list[SequenceStep], logits: Tensor) -> Tensor:
    """The logits with the stages before temperature applied where a request asks for them."""
    indices: list[int] = []
    asked: list[SamplingRow] = []
    places: list[int] = []  # among the sampled rows of the step
    place = 0
    for step in steps:
        rows = sampled_rows(step)
        if step.group.sampling.is_constrained:
            indices.extend(rows)
            asked.extend(sampling_rows(step))
            places.extend(range(place, place + len(rows)))
        place += len(rows)
    if not any(is_constrained(row) for row in asked):
        return logits
    try:
        changed = constrain(logits[indices], asked)
    except NoTokenError as error:
        raise NoTokenError(places[error.row], str(error)) from error.__cause__
    return logits.index_copy(0, torch.tensor(indices, device=logits.device), changed)
