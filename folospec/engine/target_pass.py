"""One pass of the target: the rows of a step go in, and verdicts on them come out."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from folospec.config import EngineConfig
from folospec.core.sequence import SequenceGroup
from folospec.core.sequence_step import SequenceStep
from folospec.core.stats import EngineStats
from folospec.engine.logprobs import LogprobsTaker
from folospec.engine.run_ahead import RunAhead
from folospec.engine.speculation import Speculation
from folospec.sampling.constraints import NoTokenError
from folospec.spec.draft_runner import ForwardResult, Rows
from folospec.spec.verify_batch import verify_batch
from folospec.spec.verify_rows import pack_walks, step_of_row, take_walks
from folospec.worker.model_runner import ModelRunner


class TargetPass:
    """Runs the target, draws and verifies.

    Args:
        fail: ends a request with the error that it caused.
    """

    def __init__(
        self,
        config: EngineConfig,
        target: ModelRunner,
        speculation: Speculation,
        run_ahead: RunAhead,
        logprobs: LogprobsTaker,
        fail: Callable[[SequenceGroup, Exception], None],
    ) -> None:
        self.target, self.logprobs, self.stats = target, logprobs, speculation.stats
        self.run_ahead = run_ahead
        self.num_passes = 1
        """Of the last step."""
        self.rule, self.taps = speculation.rule, speculation.needs.aux_hidden_state_layers
        self.acceptance = config.speculative.acceptance if config.speculative else "coupled"
        self.shows_law = config.logprobs_mode == "processed_logprobs"
        self._fail = fail

    @property
    def walks(self) -> bool:
        """Whether a pass that runs as a CUDA graph draws and verifies by itself."""
        has_kernels = self.rule.shares_noise and self.rule.has_kernels
        return self.target.graphs is not None and has_kernels and not self.shows_law

    def run(self, steps: list[SequenceStep], goes_ahead: bool = False) -> ForwardResult:
        """Run the target over all rows, and say in the steps which rows are whose. A step whose
        request fails leaves the list.

        Args:
            goes_ahead: nothing was drafted, and the slots behind the last tokens are for running
                ahead, where that is possible.
        """
        begin = time.perf_counter()
        batch = [self._rows(step) for step in steps]
        _place(steps, batch)
        goes_ahead = goes_ahead and self.run_ahead.applies(steps)
        walks, self.num_passes = None, 1
        if self.walks and not goes_ahead and all(map(_draws_once, steps)):
            walks = pack_walks(steps)
        result = self.target.forward(batch, self.taps, walks)
        if goes_ahead:
            self.num_passes += self.run_ahead.go(steps, result)
        add_time(self.stats, "target_time", begin, steps)
        self.stats.num_target_passes += self.num_passes
        last = 0
        for step, rows in zip(steps, batch, strict=True):
            group, last = step.group, last + rows.num_logits
            if self.logprobs.wants_prompt(group):
                logits = result.logits[last - rows.num_logits : last]
                try:
                    self.logprobs.take_prompt(group, step.start, logits)
                except Exception as error:
                    self._fail(group, error)
            group.metrics.num_target_passes += self.num_passes
            self.stats.num_scheduled_tokens += step.num_tokens + len(step.tree)
        steps[:] = [step for step in steps if step.group.error is None]
        return result

    def verify(self, steps: list[SequenceStep], result: ForwardResult) -> Tensor:
        """Fill in the verdicts that are not there yet; return the rows that logprobs are taken
        from. A request that cannot be verified is ended, and the others go on."""
        begin, every = time.perf_counter(), list(steps)
        logits, walked, log_probs = result.logits, result.walked, None
        while True:
            open_ones = [s for s in steps if s.verdicts is None and s.logits_indices]
            try:
                if walked is not None:
                    take_walks(open_ones, walked())
                elif open_ones:
                    log_probs = self._verify(open_ones, logits)
                break
            except NoTokenError as error:
                failed = step_of_row(open_ones, error.row)
                self._fail(failed.group, error)
                steps[:] = [step for step in steps if step.group is not failed.group]
                for step in open_ones:
                    step.verdicts = None
                walked = None  # it is of all of them
            except Exception as error:
                log_probs = self._verify_one_by_one(open_ones, logits, error)
                steps[:] = [step for step in steps if step.group.error is None]
                break
        add_time(self.stats, "sampling_time", begin, every)
        return log_probs if self.shows_law and log_probs is not None else logits

    def _verify(self, steps: list[SequenceStep], logits: Tensor) -> Tensor | None:
        return verify_batch(steps, logits, self.acceptance, wants_law=self.shows_law)

    def _verify_one_by_one(
        self, steps: list[SequenceStep], logits: Tensor, error: Exception
    ) -> Tensor:
        """Verify each by itself and end the requests that fail. The verdicts are the same: a row's
        does not depend on the others.

        Raises:
            Exception: `error`, if every one fails, since then none is the cause.
        """
        shown = logits.clone()
        failed: dict[int, tuple[SequenceGroup, Exception]] = {}
        for step in steps:
            try:
                found = self._verify([step], logits)
                if found is not None:
                    rows = slice(step.logits_indices.start, step.logits_indices.stop)
                    shown[rows] = found[rows]
            except Exception as one:
                failed[id(step.group)] = step.group, one
        if len(failed) == len({id(step.group) for step in steps}) > 1:
            raise error
        for group, its_own in failed.values():
            self._fail(group, its_own)
        return shown

    def _rows(self, step: SequenceStep) -> Rows:
        seq, tree = step.seq, step.tree
        token_ids = seq.token_ids[step.start : step.start + step.num_tokens]
        num_logits = int(step.samples) + len(tree)
        if self.logprobs.wants_prompt(step.group):
            num_logits = step.num_tokens
        if tree.is_chain:
            token_ids += tree.token_ids
            return Rows(token_ids, step.start, seq.block_table, num_logits)
        parents = [-1, *(parent + 1 for parent in tree.parents)]
        rows = [*token_ids, *tree.token_ids]
        return Rows(rows, step.start, seq.block_table, num_logits, parents)


def _place(steps: list[SequenceStep], batch: list[Rows]) -> None:
    """Say in the steps where their rows are, and which rows of logits they have."""
    row = last = 0
    for step, rows in zip(steps, batch, strict=True):
        step.first_row = row
        row += len(rows.token_ids)
        last += rows.num_logits
        if step.samples:
            step.logits_indices = range(last - 1 - len(step.tree), last)
            pending = step.seq is step.group.sequences[0]
            step.num_draws += step.group.num_pending_siblings if pending else 0


def add_time(stats: EngineStats, part: str, begin: float, steps: list[SequenceStep]) -> None:
    """Add the time since `begin` to a part of the step, for the engine and for each request that
    took part."""
    spent = time.perf_counter() - begin
    groups = {id(step.group): step.group for step in steps}
    for counts in (stats, *(group.metrics for group in groups.values())):
        setattr(counts, part, getattr(counts, part) + spent)


def _draws_once(step: SequenceStep) -> bool:
    """Whether nothing but logits and noise decides, for one sequence."""
    is_constrained = step.group.sampling.is_constrained
    return len(step.logits_indices) > 0 and step.num_draws == 1 and not is_constrained
