"""Transform and verify: from the target's logits to the tokens that every sequence emits in this
step.

Plain steps and speculative ones take the same way: the pipeline runs over all rows, each with its
node's own path as history, and a plain step is a tree without nodes.

    rule          law wanted?   from logits to tokens
    coupled       no            constrain, then one call of kernels that draws and verifies
    coupled       yes           process, then draw_target
    ratio rules                 process, then draw_target for rows without drafts; the rule for the
                                others

Where there are no kernels for the logits, and for rules that are registered, the second line stands
for the first too. On a GPU every line is a few launches, and the host reads once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from folospec.engine.judgement import (
    Judgement,
    constrained,
    pack_walks,
    sampling_rows,
    take_walks,
)
from folospec.kernels.gpu.sampling_arrays import Trials, read_trials, read_walks
from folospec.kernels.native_sampling import NativeSampling, pack_law
from folospec.kernels.sampling import kernels_for, on_device
from folospec.sampling import noise
from folospec.sampling.noise import Purpose
from folospec.sampling.pipeline import no_token_error, process
from folospec.sampling.sampler import draw_target
from folospec.spec.verify import (
    ACCEPTANCE,
    AcceptanceRule,
    KeyedCoins,
    Verdict,
    check_verdict,
    require_chain,
)

if TYPE_CHECKING:
    from folospec.kernels.gpu.sampling import DeviceSampling


def judge(
    judgements: list[Judgement], logits: Tensor, acceptance: str, *, wants_law: bool = True
) -> Tensor | None:
    """Fill in the verdict of every judgement that has rows.

    Args:
        judgements: the sequences of the step.
        logits: float [num_rows, vocab_size]; `Judgement.rows` are its indices, and it may have
            others.
        acceptance: the rule that judges proposals.
        wants_law: whether the caller has a use for what is returned.

    Returns:
        The log-probabilities that were sampled from, [num_rows, vocab_size]; rows that nobody
        judged are as in `logits`. None if tokens were drawn without them.

    Raises:
        NoTokenError: the options of a request leave no token; its `row` counts the judged rows.
    """
    judgements = [judgement for judgement in judgements if judgement.rows]
    if not judgements:
        return logits
    rule = ACCEPTANCE[acceptance]
    coupled = rule.shares_noise
    kernels = kernels_for(logits) if coupled and not wants_law else on_device(logits)
    if kernels is None or not rule.has_kernels:
        return _judge_by_law(judgements, logits, acceptance)
    if isinstance(kernels, NativeSampling) or (coupled and not wants_law):
        # Draw the target's tokens and walk the trees in one call.
        logits = constrained(judgements, logits)
        take_walks(judgements, kernels.walk(logits, pack_walks(judgements)))
        return None
    return _judge_on_device(kernels, judgements, logits, acceptance)


def _judge_on_device(
    kernels: DeviceSampling, judgements: list[Judgement], logits: Tensor, acceptance: str
) -> Tensor:
    """`_judge_by_law` by Triton's kernels: all is launched, and then one copy tells the outcome."""
    allowed = constrained(judgements, logits)
    indices = [row for judgement in judgements for row in judgement.judged_rows]
    laws = [pack_law(0, 0, judgement.request.filters) for judgement in judgements]
    law_of = [law for law, j in enumerate(judgements) for _ in j.judged_rows]
    is_whole = indices == list(range(len(logits)))
    chosen = allowed if is_whole else allowed[indices]
    log_probs, peaks = kernels.start_log_probs(chosen, laws, law_of)
    if not is_whole:
        log_probs = logits.index_copy(0, torch.tensor(indices, device=logits.device), log_probs)

    coupled = ACCEPTANCE[acceptance].shares_noise
    drawn = [j for j in judgements if j.proposal is None or coupled]
    tested = [j for j in judgements if j.proposal is not None and not coupled]
    walks = pack_walks(drawn)
    results = [peaks.view(torch.int32).long(), kernels.start_walks(allowed, walks)]
    trials = _pack_trials(tested, acceptance)
    if tested:
        results.append(kernels.start_ratio(acceptance, log_probs.exp(), trials))
    lengths = [len(result) for result in results]
    peaks, walked, *outcome = torch.cat(results).cpu().split(lengths)

    _require_roots(judgements, peaks.int().view(torch.float32).tolist())
    take_walks(drawn, read_walks(walked, walks))
    if tested:
        for judgement, judged in zip(tested, read_trials(outcome[0], trials), strict=True):
            judgement.verdicts = [Verdict(judged.path, judged.token_id)]
    return log_probs


def _pack_trials(judgements: list[Judgement], acceptance: str) -> Trials:
    """What a ratio rule judges, as one call does it."""
    trials = Trials()
    for judgement in judgements:
        assert judgement.proposal is not None
        if not ACCEPTANCE[acceptance].takes_trees:
            require_chain(judgement.tree)
        seq = judgement.seq
        trials.add(
            (judgement.request.seed, seq.sample_index, seq.num_tokens - 1),
            judgement.rows.start,
            judgement.judged_token_ids,
            judgement.tree.parents,
            judgement.proposal.draft_probs,
        )
    return trials


def _require_roots(judgements: list[Judgement], peaks: list[float]) -> None:
    """Raise NoTokenError if nothing can follow a root; `peaks` are those of the judged rows."""
    place = 0
    for judgement in judgements:
        if not math.isfinite(peaks[place]):
            root = judgement.request.sampling_row(judgement.seq)
            raise no_token_error(place, root, peaks[place])
        place += len(judgement.judged_rows)


def _judge_by_law(judgements: list[Judgement], logits: Tensor, acceptance: str) -> Tensor:
    indices = [row for judgement in judgements for row in judgement.judged_rows]
    asked = [row for judgement in judgements for row in sampling_rows(judgement)]
    if len(indices) == len(logits):
        log_probs = process(logits, asked)
    else:
        log_probs = logits.clone()
        log_probs[indices] = process(logits[indices], asked)
    rule = ACCEPTANCE[acceptance]
    coupled = rule.shares_noise
    _judge_by_draw([j for j in judgements if j.proposal is None or coupled], log_probs, rule)
    for judgement in judgements:
        if judgement.proposal is not None and not coupled:
            request, seq, rows = judgement.request, judgement.seq, judgement.rows
            coins = KeyedCoins(request.seed, seq.sample_index, seq.num_tokens - 1)
            target_probs = log_probs[rows.start : rows.stop].exp()
            judgement.verdicts = [rule.verify(judgement.proposal, target_probs, coins)]
    if not rule.has_kernels:
        for judgement in judgements:
            for verdict in judgement.verdicts or ():
                check_verdict(acceptance, verdict, judgement.tree, log_probs.shape[1])
    return log_probs


def _judge_by_draw(judgements: list[Judgement], log_probs: Tensor, rule: AcceptanceRule) -> None:
    """Draw the target's token at every row with its keyed noise, and walk the trees."""
    rows: list[int] = []
    keys: list[int] = []
    for judgement in judgements:
        seq, seed = judgement.seq, judgement.request.seed
        for draw in range(judgement.num_draws):
            rows.extend(judgement.judged_rows)
            keys.extend(
                noise.key(seed, seq.sample_index + draw, position, Purpose.TARGET)
                for position in judgement.judged_positions
            )
    if not rows:
        return
    chosen = log_probs if rows == list(range(len(log_probs))) else log_probs[rows]
    drawn = iter(draw_target(chosen, noise.key_tensor(keys, log_probs.device)).tolist())
    for judgement in judgements:
        judgement.walk(drawn, rule)
