"""Transform and verify: from the target's logits to the tokens that every sequence emits in this
step.

Plain steps and speculative ones take the same way: the pipeline runs over all rows, each with its
node's own path as history, and a plain step is a tree without nodes.
"""

from __future__ import annotations

import collections.abc
from dataclasses import dataclass

from torch import Tensor

from folospec.core.sequence import Sequence
from folospec.core.token_tree import TokenTree
from folospec.engine.request import Request
from folospec.sampling import noise
from folospec.sampling.constraints import SamplingRow
from folospec.sampling.noise import Purpose
from folospec.sampling.pipeline import process
from folospec.sampling.sampler import NO_TOKEN, draw_target
from folospec.spec.proposal import Proposal
from folospec.spec.verify import ACCEPTANCE, KeyedCoins, Verdict, verify_coupled

_NO_DRAFT = TokenTree.chain([])


@dataclass(slots=True)
class Judgement:
    """One sequence's part of a step: its committed tokens [start, start + num_tokens), then the
    nodes of its proposal.

    `first_row` is its first row among the packed rows of the step. `rows` are its rows of logits,
    root first; none if the last token is not among the step's, and then there is nothing to judge.
    `verdicts` has one entry, or one per sibling where a request with n > 1 draws its first tokens
    from one row.
    """

    request: Request
    seq: Sequence
    start: int
    num_tokens: int
    first_row: int
    proposal: Proposal | None = None
    rows: range = range(0)
    num_draws: int = 1
    verdicts: list[Verdict] | None = None

    @property
    def judged_rows(self) -> collections.abc.Sequence[int]:
        """Those of `rows` that can decide anything: the root's and the candidates'. Of scratch rows
        nothing is asked, so none of the request's options are applied to them."""
        if self.proposal is None or self.proposal.candidate is None:
            return self.rows
        judged = [True, *self.proposal.candidate]
        return [row for row, is_judged in zip(self.rows, judged, strict=True) if is_judged]

    @property
    def tree(self) -> TokenTree:
        return self.proposal.tree if self.proposal else _NO_DRAFT


def judge(judgements: list[Judgement], logits: Tensor, acceptance: str) -> Tensor:
    """Fill in the verdict of every judgement that has rows.

    Args:
        logits: float [num_rows, vocab_size]; `Judgement.rows` are its indices, and it may have
            others.
        acceptance: the rule that judges proposals.

    Returns:
        The log-probabilities that were sampled from, [num_rows, vocab_size]; rows that nobody
        judged are as in `logits`.

    Raises:
        NoTokenError: the options of a request leave no token; its `row` counts the judged rows.
    """
    judgements = [judgement for judgement in judgements if judgement.rows]
    if not judgements:
        return logits
    indices = [row for judgement in judgements for row in judgement.judged_rows]
    sampling_rows = [row for judgement in judgements for row in _sampling_rows(judgement)]
    if len(indices) == len(logits):
        log_probs = process(logits, sampling_rows)
    else:
        log_probs = logits.clone()
        log_probs[indices] = process(logits[indices], sampling_rows)
    coupled = ACCEPTANCE[acceptance].shares_noise
    _judge_by_draw([j for j in judgements if j.proposal is None or coupled], log_probs)
    for judgement in judgements:
        if judgement.proposal is not None and not coupled:
            request, seq, rows = judgement.request, judgement.seq, judgement.rows
            coins = KeyedCoins(request.seed, seq.sample_index, seq.num_tokens - 1)
            target_probs = log_probs[rows.start : rows.stop].exp()
            verify = ACCEPTANCE[acceptance].verify
            judgement.verdicts = [verify(judgement.proposal, target_probs, coins)]
    return log_probs


def find_judgement(judgements: list[Judgement], row: int) -> Judgement:
    """Return the judgement that the given judged row belongs to."""
    for judgement in judgements:
        num_rows = len(judgement.judged_rows)
        if row < num_rows:
            return judgement
        row -= num_rows
    raise IndexError(f"there is no judged row {row}")


def _sampling_rows(judgement: Judgement) -> list[SamplingRow]:
    seq, request, tree = judgement.seq, judgement.request, judgement.tree
    return [
        SamplingRow(
            params=request.params,
            prompt_token_ids=seq.prompt_token_ids,
            output_token_ids=seq.output_token_ids,
            draft_token_ids=tree.path_token_ids(node) if node >= 0 else (),
            bad_words_token_ids=request.bad_words_token_ids,
            stop_ids=request.stop_ids,
        )
        for node in (row - judgement.rows.start - 1 for row in judgement.judged_rows)
    ]


def _judge_by_draw(judgements: list[Judgement], log_probs: Tensor) -> None:
    """Draw the target's token at every row with its keyed noise, and walk the trees."""
    rows: list[int] = []
    keys: list[int] = []
    for judgement in judgements:
        seq, seed = judgement.seq, judgement.request.seed
        depths, first = [0, *judgement.tree.depths], judgement.rows.start
        for draw in range(judgement.num_draws):
            for row in judgement.judged_rows:
                rows.append(row)
                position = seq.num_tokens + depths[row - first]
                keys.append(noise.key(seed, seq.sample_index + draw, position, Purpose.TARGET))
    if not rows:
        return
    chosen = log_probs if rows == list(range(len(log_probs))) else log_probs[rows]
    drawn = iter(draw_target(chosen, noise.key_tensor(keys, log_probs.device)).tolist())
    for judgement in judgements:
        candidate = judgement.proposal.candidate if judgement.proposal else None
        judgement.verdicts = []
        for _ in range(judgement.num_draws):
            tokens = [NO_TOKEN] * len(judgement.rows)
            for row in judgement.judged_rows:
                tokens[row - judgement.rows.start] = next(drawn)
            judgement.verdicts.append(verify_coupled(judgement.tree, tokens, candidate))
