"""Verifies all sequences of a step: from the target's logits to the tokens that each emits.

Plain steps and speculative ones take the same way: the pipeline runs over all rows, each with its
node's own path as history, and a plain step is a tree without nodes.

    rule          log-probs wanted?   from logits to tokens
    coupled       no                  constrain, then one call of kernels that draws and verifies
    coupled       yes                 process, then draw_target
    ratio rules                       process, then draw_target for sequences without a draft, and
                                      the rule (rejection, block) for the others

Without kernels for the logits, and for registered rules, `coupled` always takes the second way. On
a GPU each way is a few launches, and the host reads once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from folospec.core.sequence_step import SequenceStep
from folospec.core.token_tree import Verdict
from folospec.kernels.gpu.sampling_arrays import PackedProposals, read_paths, read_ratio_paths
from folospec.kernels.native_sampling import NativeSampling
from folospec.kernels.sampling import kernels_for, on_device
from folospec.kernels.sampling_records import pack_sampling
from folospec.sampling import noise
from folospec.sampling.noise import Purpose
from folospec.sampling.pipeline import no_token_error, process
from folospec.sampling.sampler import draw_target
from folospec.spec.acceptance import ACCEPTANCE, AcceptanceRule, check_verdict
from folospec.spec.verify import KeyedCoins, require_chain
from folospec.spec.verify_rows import (
    candidate_token_ids,
    constrained,
    pack_trees,
    sampled_positions,
    sampled_rows,
    sampling_rows,
    take_paths,
    verify_drawn,
)

if TYPE_CHECKING:
    from folospec.kernels.gpu.sampling import DeviceSampling


def verify_batch(
    steps: list[SequenceStep], logits: Tensor, acceptance: str, *, wants_log_probs: bool = True
) -> Tensor | None:
    """Fill in the verdicts of every sequence that has rows of logits.

    Args:
        logits: float [num_rows, vocab_size]; `SequenceStep.logits_indices` are its indices, and it
            may have others.
        acceptance: the rule that verifies proposals.
        wants_log_probs: whether the caller has a use for what is returned.

    Returns:
        The log-probabilities that were sampled from, [num_rows, vocab_size]; rows that nobody
        sampled are as in `logits`. None if tokens were drawn without them.

    Raises:
        NoTokenError: the options of a request leave no token; its `row` counts the sampled rows.
    """
    steps = [step for step in steps if step.logits_indices]
    if not steps:
        return logits
    rule = ACCEPTANCE[acceptance]
    coupled = rule.shares_noise
    kernels = kernels_for(logits) if coupled and not wants_log_probs else on_device(logits)
    if kernels is None or not rule.has_kernels:
        return _verify_by_log_probs(steps, logits, acceptance)
    if isinstance(kernels, NativeSampling) or (coupled and not wants_log_probs):
        # Draw the target's tokens and verify the trees in one call.
        logits = constrained(steps, logits)
        take_paths(steps, kernels.draw_and_verify(logits, pack_trees(steps)))
        return None
    return _verify_on_device(kernels, steps, logits, acceptance)


def _verify_on_device(
    kernels: DeviceSampling, steps: list[SequenceStep], logits: Tensor, acceptance: str
) -> Tensor:
    """`_verify_by_log_probs` by Triton's kernels: all is launched, then one copy tells the
    outcome."""
    allowed = constrained(steps, logits)
    indices = [row for step in steps for row in sampled_rows(step)]
    all_params = [pack_sampling(0, 0, step.group.sampling.filters) for step in steps]
    params_of = [params for params, step in enumerate(steps) for _ in sampled_rows(step)]
    all_rows = indices == list(range(len(logits)))
    chosen = allowed if all_rows else allowed[indices]
    log_probs, peaks = kernels.start_log_probs(chosen, all_params, params_of)
    if not all_rows:
        log_probs = logits.index_copy(0, torch.tensor(indices, device=logits.device), log_probs)

    coupled = ACCEPTANCE[acceptance].shares_noise
    drawn = [step for step in steps if step.proposal is None or coupled]
    tested = [step for step in steps if step.proposal is not None and not coupled]
    packed_trees = pack_trees(drawn)
    results = [peaks.view(torch.int32).long(), kernels.start_verify(allowed, packed_trees)]
    proposals = _pack_proposals(tested, acceptance)
    if tested:
        results.append(kernels.start_ratio(acceptance, log_probs.exp(), proposals))
    lengths = [len(result) for result in results]
    peaks, verified, *outcome = torch.cat(results).cpu().split(lengths)

    _require_roots(steps, peaks.int().view(torch.float32).tolist())
    take_paths(drawn, read_paths(verified, packed_trees))
    if tested:
        for step, path in zip(tested, read_ratio_paths(outcome[0], proposals), strict=True):
            step.verdicts = [Verdict(path.path, path.token_id)]
    return log_probs


def _pack_proposals(steps: list[SequenceStep], acceptance: str) -> PackedProposals:
    """What a ratio rule verifies, as one call does it."""
    proposals = PackedProposals()
    for step in steps:
        if not ACCEPTANCE[acceptance].takes_trees:
            require_chain(step.tree)
        seq = step.seq
        proposals.add(
            (step.group.seed, seq.sample_index, seq.num_tokens - 1),
            step.logits_indices.start,
            candidate_token_ids(step),
            step.tree.parents,
            step.proposal.draft_probs,
        )
    return proposals


def _require_roots(steps: list[SequenceStep], peaks: list[float]) -> None:
    """Raise NoTokenError if nothing can follow a root; `peaks` are those of the sampled rows."""
    place = 0
    for step in steps:
        if not math.isfinite(peaks[place]):
            root = step.group.sampling.row(step.seq)
            raise no_token_error(place, root, peaks[place])
        place += len(sampled_rows(step))


def _verify_by_log_probs(steps: list[SequenceStep], logits: Tensor, acceptance: str) -> Tensor:
    indices = [row for step in steps for row in sampled_rows(step)]
    asked = [row for step in steps for row in sampling_rows(step)]
    if len(indices) == len(logits):
        log_probs = process(logits, asked)
    else:
        log_probs = logits.clone()
        log_probs[indices] = process(logits[indices], asked)
    rule = ACCEPTANCE[acceptance]
    coupled = rule.shares_noise
    _verify_by_draw([s for s in steps if s.proposal is None or coupled], log_probs, rule)
    for step in steps:
        if step.proposal is not None and not coupled:
            seq, rows = step.seq, step.logits_indices
            coins = KeyedCoins(step.group.seed, seq.sample_index, seq.num_tokens - 1)
            target_probs = log_probs[rows.start : rows.stop].exp()
            step.verdicts = [rule.verify(step.proposal, target_probs, coins)]
    if not rule.has_kernels:
        for step in steps:
            for verdict in step.verdicts or ():
                check_verdict(acceptance, verdict, step.tree, log_probs.shape[1])
    return log_probs


def _verify_by_draw(steps: list[SequenceStep], log_probs: Tensor, rule: AcceptanceRule) -> None:
    """Draw the target's token at every row with its keyed noise, and verify the trees."""
    rows: list[int] = []
    keys: list[int] = []
    for step in steps:
        seq, seed = step.seq, step.group.seed
        for draw in range(step.num_draws):
            rows.extend(sampled_rows(step))
            keys.extend(
                noise.key(seed, seq.sample_index + draw, position, Purpose.TARGET)
                for position in sampled_positions(step)
            )
    if not rows:
        return
    chosen = log_probs if rows == list(range(len(log_probs))) else log_probs[rows]
    drawn = iter(draw_target(chosen, noise.key_tensor(keys, log_probs.device)).tolist())
    for step in steps:
        verify_drawn(step, drawn, rule)
