"""One pass of the target: the rows of a step go in, and verdicts on them come out."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from folospec.config import EngineConfig
from folospec.core.scheduler import ScheduledSequence
from folospec.core.sequence import Sequence
from folospec.core.stats import EngineStats
from folospec.engine.judge import judge
from folospec.engine.judgement import Judgement, find_judgement, pack_walks, take_walks
from folospec.engine.logprobs import LogprobsTaker
from folospec.engine.request import Request
from folospec.engine.run_ahead import RunAhead
from folospec.engine.speculation import Speculation
from folospec.sampling.constraints import NoTokenError
from folospec.spec.draft_runner import ForwardResult, Rows
from folospec.spec.proposal import Proposal
from folospec.worker.model_runner import ModelRunner


class TargetPass:
    """Runs the target, draws and verifies.

    Args:
        request_of: the request of a sequence.
        fail: ends a request with the error that it caused.
    """

    def __init__(
        self,
        config: EngineConfig,
        target: ModelRunner,
        speculation: Speculation,
        run_ahead: RunAhead,
        logprobs: LogprobsTaker,
        request_of: Callable[[Sequence], Request],
        fail: Callable[[Request, Exception], None],
    ) -> None:
        self.target, self.logprobs, self.stats = target, logprobs, speculation.stats
        self.run_ahead = run_ahead
        self.num_passes = 1
        """Of the last step."""
        self.rule, self.taps = speculation.rule, speculation.needs.aux_hidden_state_layers
        self.acceptance = config.speculative.acceptance if config.speculative else "coupled"
        self.shows_law = config.logprobs_mode == "processed_logprobs"
        self._request, self._fail = request_of, fail

    @property
    def walks(self) -> bool:
        """Whether a pass that runs as a CUDA graph draws and verifies by itself."""
        has_kernels = self.rule.shares_noise and self.rule.has_kernels
        return self.target.graphs is not None and has_kernels and not self.shows_law

    def run(
        self,
        scheduled: list[ScheduledSequence],
        proposals: dict[str, Proposal],
        goes_ahead: bool = False,
    ) -> tuple[list[Judgement], ForwardResult]:
        """Run the target over all rows; say which rows are whose.

        Args:
            goes_ahead: nothing was drafted, and the slots behind the last tokens are for running
                ahead, where that is possible.
        """
        begin = time.perf_counter()
        batch = [self._rows(item, proposals.get(item.seq.seq_id)) for item in scheduled]
        judgements = self._judgements(scheduled, batch, proposals)
        goes_ahead = goes_ahead and self.run_ahead.applies(scheduled, judgements)
        walks, self.num_passes = None, 1
        if self.walks and not goes_ahead and all(_draws_once(j) for j in judgements):
            walks = pack_walks(judgements)
        result = self.target.forward(batch, self.taps, walks)
        if goes_ahead:
            self.num_passes += self.run_ahead.go(scheduled, judgements, result)
        add_time(self.stats, "target_time", begin, [item.seq for item in scheduled])
        self.stats.num_target_passes += self.num_passes
        last = 0
        for judgement, rows in zip(judgements, batch, strict=True):
            request, last = judgement.request, last + rows.num_logits
            if request.wants_prompt_logprobs:
                logits = result.logits[last - rows.num_logits : last]
                try:
                    self.logprobs.take_prompt(request, judgement.start, logits)
                except Exception as error:
                    self._fail(request, error)
            request.group.metrics.num_target_passes += self.num_passes
            self.stats.num_scheduled_tokens += len(rows.token_ids) + len(judgement.run_ahead or ())
        return [j for j in judgements if j.request.error is None], result

    def judge(self, judgements: list[Judgement], result: ForwardResult) -> Tensor:
        """Fill in the verdicts that are not there yet; return the rows that logprobs are taken
        from. A request that cannot be verified is ended, and the others go on."""
        begin, sequences = time.perf_counter(), [j.seq for j in judgements]
        logits, walked, log_probs = result.logits, result.walked, None
        while True:
            open_ones = [j for j in judgements if j.verdicts is None and j.rows]
            try:
                if walked is not None:
                    take_walks(open_ones, walked())
                elif open_ones:
                    log_probs = judge(open_ones, logits, self.acceptance, wants_law=self.shows_law)
                break
            except NoTokenError as error:
                failed = find_judgement(open_ones, error.row)
                self._fail(failed.request, error)
                judgements[:] = [j for j in judgements if j.request is not failed.request]
                for judgement in open_ones:
                    judgement.verdicts = None
                walked = None  # it is of all of them
            except Exception as error:
                log_probs = self._judge_one_by_one(open_ones, logits, error)
                judgements[:] = [j for j in judgements if j.request.error is None]
                break
        add_time(self.stats, "sampling_time", begin, sequences)
        return log_probs if self.shows_law and log_probs is not None else logits

    def _judge_one_by_one(
        self, judgements: list[Judgement], logits: Tensor, error: Exception
    ) -> Tensor:
        """Judge each by itself and end the requests that fail. The verdicts are the same: a row's
        does not depend on the others.

        Raises:
            Exception: `error`, if every one fails, since then none is the cause.
        """
        shown = logits.clone()
        failed: dict[int, tuple[Request, Exception]] = {}
        for judgement in judgements:
            try:
                found = judge([judgement], logits, self.acceptance, wants_law=self.shows_law)
                if found is not None:
                    rows = slice(judgement.rows.start, judgement.rows.stop)
                    shown[rows] = found[rows]
            except Exception as one:
                failed[id(judgement.request)] = judgement.request, one
        if len(failed) == len({id(judgement.request) for judgement in judgements}) > 1:
            raise error
        for request, its_own in failed.values():
            self._fail(request, its_own)
        return shown

    def _judgements(
        self,
        scheduled: list[ScheduledSequence],
        batch: list[Rows],
        proposals: dict[str, Proposal],
    ) -> list[Judgement]:
        """What is to be judged of each sequence's rows."""
        judgements = []
        row = last = 0
        for item, rows in zip(scheduled, batch, strict=True):
            request, proposal = self._request(item.seq), proposals.get(item.seq.seq_id)
            judgement = Judgement(request, item.seq, item.start, item.num_tokens, row, proposal)
            row += len(rows.token_ids)
            last += rows.num_logits
            if item.samples:
                judgement.rows = range(last - 1 - _num_nodes(proposal), last)
                pending = item.seq is request.group.sequences[0]
                judgement.num_draws += request.group.num_pending_siblings if pending else 0
            judgements.append(judgement)
        return judgements

    def _rows(self, item: ScheduledSequence, proposal: Proposal | None) -> Rows:
        seq = item.seq
        token_ids = seq.token_ids[item.start : item.start + item.num_tokens]
        num_logits = self._num_logits(item, proposal)
        if proposal is None:
            return Rows(token_ids, item.start, seq.block_table, num_logits)
        tree = proposal.tree
        parents = None if tree.is_chain else [-1, *(parent + 1 for parent in tree.parents)]
        return Rows([*token_ids, *tree.token_ids], item.start, seq.block_table, num_logits, parents)

    def _num_logits(self, item: ScheduledSequence, proposal: Proposal | None) -> int:
        if self._request(item.seq).wants_prompt_logprobs:
            return item.num_tokens
        return int(item.samples) + _num_nodes(proposal)


def add_time(stats: EngineStats, part: str, begin: float, sequences: list[Sequence]) -> None:
    """Add the time since `begin` to a part of the step, for the engine and for each request that
    took part."""
    spent = time.perf_counter() - begin
    groups = {id(seq.group): seq.group for seq in sequences if seq.group is not None}
    for counts in (stats, *(group.metrics for group in groups.values())):
        setattr(counts, part, getattr(counts, part) + spent)


def _draws_once(judgement: Judgement) -> bool:
    """Whether nothing but logits and noise decides, for one sequence."""
    is_constrained = judgement.request.is_constrained
    return len(judgement.rows) > 0 and judgement.num_draws == 1 and not is_constrained


def _num_nodes(proposal: Proposal | None) -> int:
    return len(proposal) if proposal is not None else 0
