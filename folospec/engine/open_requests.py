"""The requests that an engine serves: how they come in, where their outputs go, how they end."""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import Any

from folospec.core.scheduler import Scheduler
from folospec.core.sequence import Sequence
from folospec.engine.engine_state import EngineState, describe
from folospec.engine.inbox import Inbox
from folospec.engine.input_processor import InputProcessor, Prompt
from folospec.engine.output_processor import make_output
from folospec.engine.request import Request
from folospec.engine.speculation import Speculation
from folospec.outputs import RequestOutput
from folospec.sampling.constraints import NoTokenError
from folospec.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


class OpenRequests:
    """The unfinished requests of an engine, each with the inbox that its outputs go to."""

    def __init__(
        self,
        inputs: InputProcessor,
        scheduler: Scheduler,
        speculation: Speculation,
        state: EngineState,
        default_params: SamplingParams,
    ) -> None:
        self.inputs, self.scheduler = inputs, scheduler
        self.speculation, self.state = speculation, state
        self.default_params = default_params
        self.requests: dict[str, Request] = {}
        self.num_admitted = 0
        self.discarded: deque[Inbox[Any]] = deque()
        """Inboxes whose owner is gone. A thread that is inside the engine already may add one: the
        garbage collector closes streams anywhere."""
        self._inboxes: dict[str, Inbox[Any]] = {}
        self._failed: list[Request] = []

    def admit(
        self,
        requests: list[tuple[Prompt, SamplingParams | None]],
        inbox: Inbox[Any],
        request_id: str | None = None,
    ) -> list[str]:
        """Check all requests, then queue them, and return their ids.

        Raises:
            ValueError: one of them cannot be served. Nothing has changed then.
            EngineBrokenError: the engine is broken.
        """
        self.state.require_usable()
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
        for request in checked:
            one_id = request.group.request_id
            request.group.metrics.arrival_time = now
            self.scheduler.add(request.group)
            self.requests[one_id], self._inboxes[one_id] = request, inbox
            inbox.unfinished[one_id] = None
        self.num_admitted += len(checked)
        return [request.group.request_id for request in checked]

    def _free_id(self, ordinal: int) -> str:
        request_id = f"request-{ordinal}"
        while request_id in self.requests:
            request_id += "'"
        return request_id

    def request_of(self, seq: Sequence) -> Request:
        """The request that a running sequence belongs to."""
        assert seq.group is not None
        return self.requests[seq.group.request_id]

    def _inbox_of(self, request: Request) -> Inbox[Any]:
        return self._inboxes[request.group.request_id]

    def abort(self, request_id: str, caller: Inbox[Any]) -> RequestOutput | None:
        """End a request and return what it has, None if there is no such request. The owner of the
        request finds it in its inbox, unless that is the caller's."""
        request = self.requests.get(request_id)
        if request is None:
            return None
        inbox = self._inbox_of(request)
        output = self._end(request)
        if inbox is not caller:
            inbox.put(output)
        self.forget_drafts([request])
        return output

    def end_discarded(self) -> None:
        """End the requests of the discarded inboxes; nobody wants their outputs."""
        while self.discarded:
            inbox = self.discarded.popleft()
            requests = [self.requests[request_id] for request_id in inbox.unfinished]
            for request in requests:
                self._end(request)
            self.forget_drafts(requests)

    def forget_drafts(self, ended: list[Request]) -> None:
        """Let drafters forget the sequences of requests that ended early. In strict mode it raises
        what they raise."""
        sequences = [seq for request in ended for seq in request.group.sequences]
        if sequences and self.state.broken_by is None:
            self.speculation.drop(sequences, finished=True)

    def fail(self, request: Request, error: Exception) -> None:
        """Let a request end with an error when the step's outputs are delivered."""
        if request.error is not None:
            return
        reason = describe(error)
        shown = None if isinstance(error, NoTokenError) else error
        request_id = request.group.request_id
        logger.error("request %s ends with an error: %s", request_id, reason, exc_info=shown)
        request.fail(reason)
        self._failed.append(request)

    def deliver(self, touched: list[Request]) -> list[Request]:
        """Put outputs into the inboxes, forget what is finished, and end what failed.

        Args:
            touched: the requests that got tokens, or ended.

        Returns:
            the requests that failed; `forget_drafts` is due for them.
        """
        for request in touched:
            inbox, is_finished = self._inbox_of(request), request.group.is_finished
            if is_finished or inbox.every_step:
                try:
                    inbox.receive(request)
                except Exception as error:
                    self.fail(request, error)
                    continue
            if is_finished:
                self._forget(request)
        failed, self._failed = self._failed, []
        for request in failed:
            self._inbox_of(request).put(self._end(request))
        return failed

    def _end(self, request: Request) -> RequestOutput:
        """Stop a request, free its blocks, and return what it has."""
        self._forget(request)
        for seq in request.group.sequences:
            if not seq.status.is_finished and request.error is None:
                request.outputs[seq.seq_id].finish_reason = "abort"
        try:
            self.scheduler.abort(request.group.request_id)
        except Exception:
            if self.state.broken_by is None:
                raise
            logger.exception("the broken engine cannot free the blocks of a request")
        request.group.metrics.finished_time = time.monotonic()
        try:
            output = make_output(request)
        except Exception as error:
            request.fail(describe(error))
            output = make_output(request)
        output.finished = True
        return output

    def _forget(self, request: Request) -> None:
        request_id = request.group.request_id
        del self.requests[request_id]
        self._inboxes.pop(request_id).unfinished.pop(request_id)
