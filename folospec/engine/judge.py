"""Transform and verify: from the target's logits to the tokens that every sequence emits in this
step.

Plain steps and speculative ones take the same way: the pipeline runs over all rows, each with its
node's own path as history, and a plain step is a tree without nodes.

    rule          law wanted?   from logits to tokens
    coupled       no            constrain, then one call of kernels that draws and verifies
    coupled       yes           process, then draw_target
    ratio rules                 process, then draw_target for rows without drafts; the rule for the
                                others

Where there are no kernels for the logits, the second line stands for the first too. On a GPU every
line is a few launches, and the host reads once.
"""

from __future__ import annotations

import collections.abc
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from folospec.core.sequence import Sequence
from folospec.core.token_tree import TokenTree
from folospec.engine.request import Request
from folospec.kernels.gpu.sampling_arrays import Trials, read_trials, read_walks
from folospec.kernels.native_sampling import NativeSampling, Walk, Walks, pack_law
from folospec.kernels.sampling import kernels_for, on_device
from folospec.sampling import noise
from folospec.sampling.constraints import NoTokenError, SamplingRow, constrain, is_constrained
from folospec.sampling.noise import Purpose
from folospec.sampling.pipeline import no_token_error, process
from folospec.sampling.sampler import NO_TOKEN, draw_target
from folospec.spec.proposal import Proposal
from folospec.spec.verify import (
    ACCEPTANCE,
    KeyedCoins,
    Verdict,
    require_chain,
    verify_coupled,
)

if TYPE_CHECKING:
    from folospec.kernels.gpu.sampling import DeviceSampling

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
    run_ahead: TokenTree | None = None
    """Tokens that the target drew before the host looked: the chain that the verdict walks, where
    nobody proposed one."""

    @property
    def judged_rows(self) -> collections.abc.Sequence[int]:
        """Those of `rows` that can decide anything: the root's and the candidates'. Of scratch rows
        nothing is asked, so none of the request's options are applied to them."""
        if self.proposal is None or self.proposal.candidate is None:
            return self.rows
        judged = [True, *self.proposal.candidate]
        return [row for row, is_judged in zip(self.rows, judged, strict=True) if is_judged]

    @property
    def judged_positions(self) -> collections.abc.Sequence[int]:
        """The position of the token that each of `judged_rows` is about."""
        begin, tree = self.seq.num_tokens, self.tree
        if tree.is_chain:
            positions: collections.abc.Sequence[int] = range(begin, begin + len(self.rows))
        else:
            positions = [begin, *(begin + depth for depth in tree.depths)]
        if self.proposal is None or self.proposal.candidate is None:
            return positions
        return [positions[row - self.rows.start] for row in self.judged_rows]

    @property
    def judged_token_ids(self) -> collections.abc.Sequence[int]:
        """The tokens of the nodes, `NO_TOKEN` for those that are not judged."""
        token_ids = self.tree.token_ids
        if self.proposal is None or self.proposal.candidate is None:
            return token_ids
        judged = zip(token_ids, self.proposal.candidate, strict=True)
        return [token_id if candidate else NO_TOKEN for token_id, candidate in judged]

    @property
    def tree(self) -> TokenTree:
        return self.proposal.tree if self.proposal else self.run_ahead or _NO_DRAFT

    def walk(self, drawn: Iterator[int]) -> None:
        """Take the target's tokens, those of the judged rows for each draw, and verify."""
        tree, candidate = self.tree, self.proposal.candidate if self.proposal else None
        self.verdicts = []
        for _ in range(self.num_draws):
            if candidate is None:
                tokens = list(islice(drawn, len(self.rows)))
            else:
                tokens = [next(drawn) if judged else NO_TOKEN for judged in (True, *candidate)]
            self.verdicts.append(verify_coupled(tree, tokens, candidate))


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
    coupled = ACCEPTANCE[acceptance].shares_noise
    kernels = kernels_for(logits) if coupled and not wants_law else on_device(logits)
    if kernels is None:
        return _judge_by_law(judgements, logits, acceptance)
    if isinstance(kernels, NativeSampling) or (coupled and not wants_law):
        # Draw the target's tokens and walk the trees in one call.
        logits = _constrained(judgements, logits)
        take_walks(judgements, kernels.walk(logits, pack_walks(judgements)))
        return None
    return _judge_on_device(kernels, judgements, logits, acceptance)


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
    nodes = [row - judgement.rows.start - 1 for row in judgement.judged_rows]
    paths = [tree.path_token_ids(node) if node >= 0 else None for node in nodes]
    return [request.sampling_row(seq, path) for path in paths]


def pack_walks(judgements: list[Judgement]) -> Walks:
    """What the judgements ask for, as one call draws and verifies it."""
    walks = Walks()
    for judgement in judgements:
        seq, request, parents = judgement.seq, judgement.request, judgement.tree.parents
        token_ids = judgement.judged_token_ids
        for draw in range(judgement.num_draws):
            law = pack_law(request.seed, seq.sample_index + draw, request.filters)
            walks.add(law, judgement.rows.start, seq.num_tokens, token_ids, parents)
    return walks


def take_walks(judgements: list[Judgement], found: Iterable[Walk]) -> None:
    """Fill in the verdicts from what came of `pack_walks`.

    Raises:
        NoTokenError: see `judge`.
    """
    walked = iter(found)
    for judgement in judgements:
        judgement.verdicts = []
        for walk in islice(walked, judgement.num_draws):
            # Below drafts, where plain decoding might not come, there need be no token.
            if walk.token_id == NO_TOKEN and not walk.path:
                before = takewhile(lambda other: other is not judgement, judgements)  # noqa: B023
                place = sum(len(other.judged_rows) for other in before)
                root = judgement.request.sampling_row(judgement.seq)
                raise no_token_error(place, root, walk.peak)
            judgement.verdicts.append(Verdict(walk.path, walk.token_id))


def _constrained(judgements: list[Judgement], logits: Tensor) -> Tensor:
    """The logits with the stages before temperature applied where a request asks for them."""
    indices: list[int] = []
    asked: list[SamplingRow] = []
    places: list[int] = []  # among the judged rows of the step
    place = 0
    for judgement in judgements:
        judged = judgement.judged_rows
        if judgement.request.is_constrained:
            indices.extend(judged)
            asked.extend(_sampling_rows(judgement))
            places.extend(range(place, place + len(judged)))
        place += len(judged)
    if not any(is_constrained(row) for row in asked):
        return logits
    try:
        constrained = constrain(logits[indices], asked)
    except NoTokenError as error:
        raise NoTokenError(places[error.row], str(error)) from error.__cause__
    return logits.index_copy(0, torch.tensor(indices, device=logits.device), constrained)


def _judge_on_device(
    kernels: DeviceSampling, judgements: list[Judgement], logits: Tensor, acceptance: str
) -> Tensor:
    """`_judge_by_law` by Triton's kernels: all is launched, and then one copy tells the outcome."""
    constrained = _constrained(judgements, logits)
    indices = [row for judgement in judgements for row in judgement.judged_rows]
    laws = [pack_law(0, 0, judgement.request.filters) for judgement in judgements]
    law_of = [law for law, j in enumerate(judgements) for _ in j.judged_rows]
    is_whole = indices == list(range(len(logits)))
    chosen = constrained if is_whole else constrained[indices]
    log_probs, peaks = kernels.start_log_probs(chosen, laws, law_of)
    if not is_whole:
        log_probs = logits.index_copy(0, torch.tensor(indices, device=logits.device), log_probs)

    coupled = ACCEPTANCE[acceptance].shares_noise
    drawn = [j for j in judgements if j.proposal is None or coupled]
    tested = [j for j in judgements if j.proposal is not None and not coupled]
    walks = pack_walks(drawn)
    results = [peaks.view(torch.int32).long(), kernels.start_walks(constrained, walks)]
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


def _judge_by_draw(judgements: list[Judgement], log_probs: Tensor) -> None:
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
        judgement.walk(drawn)
