"""Tracks the requests that an engine serves: admits them, delivers outputs, ends them."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from folospec.core.scheduler import Scheduler
from folospec.core.sequence import SequenceGroup
from folospec.outputs import RequestOutput
from folospec.requests.inbox import Inbox
from folospec.requests.input_processor import InputProcessor, Prompt
from folospec.requests.output_processor import OutputProcessor
from folospec.sampling.constraints import NoTokenError
from folospec.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


class OpenRequests:
    """The unfinished requests of an engine, each with the inbox that its outputs go to."""

    def __init__(
        self,
        inputs: InputProcessor,
        scheduler: Scheduler,
        outputs: OutputProcessor,
        default_params: SamplingParams,
        is_broken: Callable[[], bool],
    ) -> None:
        self.inputs, self.scheduler, self.outputs = inputs, scheduler, outputs
        self._is_broken = is_broken
        self.default_params = default_params
        self.requests: dict[str, SequenceGroup] = {}
        self.num_admitted = 0
        self.discarded: deque[Inbox[Any]] = deque()
        """Inboxes whose owner is gone. A thread that is inside the engine already may add one: the
        garbage collector closes streams anywhere."""
        self._inboxes: dict[str, Inbox[Any]] = {}
        self._failed: list[SequenceGroup] = []

    def admit(
        self,
        requests: list[tuple[Prompt, SamplingParams | None]],
        inbox: Inbox[Any],
        request_id: str | None = None,
    ) -> list[str]:
        """Check all requests, then queue them, and return their ids.

        Raises:
            ValueError: one of them cannot be served. Nothing has changed then.
        """
        if request_id is not None:
            self.inputs.check_request_id(request_id, self.requests)
        checked = []
        for place, (prompt, params) in enumerate(requests):
            ordinal = self.num_admitted + place
            one_id = self._free_id(ordinal) if request_id is None else request_id
            params = self.default_params if params is None else params
            try:
                checked.append(self.inputs.process(one_id, prompt, params, ordinal))
            except ValueError as error:
                if len(requests) == 1:
                    raise
                raise ValueError(f"prompts[{place}]: {error}") from error
        now = time.monotonic()
        for group, output in checked:
            one_id = group.request_id
            group.metrics.arrival_time = now
            self.scheduler.add(group)
            self.outputs.add(group, output)
            self.requests[one_id], self._inboxes[one_id] = group, inbox
            inbox.unfinished[one_id] = None
        self.num_admitted += len(checked)
        return [group.request_id for group, _ in checked]

    def _free_id(self, ordinal: int) -> str:
        request_id = f"request-{ordinal}"
        while request_id in self.requests:
            request_id += "'"
        return request_id

    def _inbox_of(self, group: SequenceGroup) -> Inbox[Any]:
        return self._inboxes[group.request_id]

    def abort(self, request_id: str, caller: Inbox[Any]) -> RequestOutput | None:
        """End a request and return what it has, None if there is no such request. The owner of the
        request finds it in its inbox, unless that is the caller's."""
        group = self.requests.get(request_id)
        if group is None:
            return None
        inbox = self._inbox_of(group)
        output = self._end(group)
        if inbox is not caller:
            inbox.put(output)
        return output

    def end_discarded(self) -> list[SequenceGroup]:
        """End the requests of the discarded inboxes, whose outputs nobody wants; return them."""
        ended: list[SequenceGroup] = []
        while self.discarded:
            inbox = self.discarded.popleft()
            groups = [self.requests[request_id] for request_id in inbox.unfinished]
            for group in groups:
                self._end(group)
            ended += groups
        return ended

    def fail(self, group: SequenceGroup, error: Exception) -> None:
        """Let a request end with an error when the step's outputs are delivered."""
        if group.error is not None:
            return
        reason = describe(error)
        shown = None if isinstance(error, NoTokenError) else error
        logger.error("request %s ends with an error: %s", group.request_id, reason, exc_info=shown)
        self.outputs.fail(group, reason)
        self._failed.append(group)

    def deliver(self, touched: list[SequenceGroup]) -> list[SequenceGroup]:
        """Put outputs into the inboxes, forget what is finished, and end what failed.

        Args:
            touched: the requests that got tokens, or ended.

        Returns:
            the requests that failed.
        """
        for group in touched:
            inbox, is_finished = self._inbox_of(group), group.is_finished
            if is_finished or inbox.every_step:
                try:
                    inbox.receive(group, self.outputs)
                except Exception as error:
                    self.fail(group, error)
                    continue
            if is_finished:
                self._forget(group)
                self.outputs.forget(group)
        failed, self._failed = self._failed, []
        for group in failed:
            self._inbox_of(group).put(self._end(group))
        return failed

    def _end(self, group: SequenceGroup) -> RequestOutput:
        """Stop a request, free its blocks, and return what it has."""
        self._forget(group)
        for seq in group.sequences:
            if not seq.status.is_finished and group.error is None:
                self.outputs.of(seq).finish_reason = "abort"
        try:
            self.scheduler.abort(group.request_id)
        except Exception:
            if not self._is_broken():
                raise
            logger.exception("the broken engine cannot free the blocks of a request")
        group.metrics.finished_time = time.monotonic()
        try:
            output = self._last_output(group)
        finally:
            self.outputs.forget(group)
        output.finished = True
        return output

    def _last_output(self, group: SequenceGroup) -> RequestOutput:
        """The output of a request that has ended; with an error where its text cannot be read."""
        try:
            return self.outputs.make_output(group)
        except Exception as error:
            self.outputs.fail(group, describe(error))
            return self.outputs.make_output(group)

    def _forget(self, group: SequenceGroup) -> None:
        del self.requests[group.request_id]
        self._inboxes.pop(group.request_id).unfinished.pop(group.request_id)


def describe(error: BaseException) -> str:
    """An error in one line; the message of a `NoTokenError` says enough by itself."""
    return str(error) if isinstance(error, NoTokenError) else f"{type(error).__name__}: {error}"
