"""Verifies the rows of a step, and keeps an error to the request that caused it."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from folospec.core.sequence import SequenceGroup
from folospec.core.sequence_step import SequenceStep
from folospec.core.stats import EngineStats
from folospec.models.forward import ForwardResult
from folospec.sampling.constraints import NoTokenError
from folospec.spec.verify_batch import verify_batch
from folospec.spec.verify_rows import step_of_row, take_paths


class Verifier:
    """Draws the target's tokens and verifies the proposals of a step.

    Args:
        acceptance: the rule.
        shows_processed: logprobs are those of what was drawn from, not of the raw logits.
        fail: ends a request with the error that it caused.
    """

    def __init__(
        self,
        acceptance: str,
        stats: EngineStats,
        fail: Callable[[SequenceGroup, Exception], None],
        *,
        shows_processed: bool,
    ) -> None:
        self._acceptance, self._shows_processed = acceptance, shows_processed
        self._stats, self._fail = stats, fail

    def verify(self, steps: list[SequenceStep], result: ForwardResult) -> Tensor:
        """Fill in the verdicts that are not there yet; return the rows that logprobs are taken
        from. A step whose request cannot be verified leaves the list, and the others go on."""
        begin, every = time.perf_counter(), list(steps)
        logits, verified, log_probs = result.logits, result.verified, None
        while True:
            open_ones = [s for s in steps if s.verdicts is None and s.logits_indices]
            try:
                if verified is not None:
                    take_paths(open_ones, verified())
                elif open_ones:
                    log_probs = self._verify(open_ones, logits)
                break
            except NoTokenError as error:
                failed = step_of_row(open_ones, error.row)
                self._fail(failed.group, error)
                steps[:] = [step for step in steps if step.group is not failed.group]
                for step in open_ones:
                    step.verdicts = None
                verified = None  # it is of all of them
            except Exception as error:
                log_probs = self._verify_one_by_one(open_ones, logits, error)
                steps[:] = [step for step in steps if step.group.error is None]
                break
        self._stats.add_time("sampling_time", time.perf_counter() - begin, every)
        return log_probs if self._shows_processed and log_probs is not None else logits

    def _verify(self, steps: list[SequenceStep], logits: Tensor) -> Tensor | None:
        return verify_batch(steps, logits, self._acceptance, wants_log_probs=self._shows_processed)

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
