"""Runs the loop behind `add_request`, `step`, `abort` and `stream`.

`_run_step` has the stages in order: plan, schedule, propose, execute, verify, commit, deliver,
observe.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

from folospec.config import EngineConfig
from folospec.core.prefill_pace import PrefillPace
from folospec.core.scheduler import SchedulerOutput
from folospec.core.sequence import SequenceGroup
from folospec.core.sequence_step import SequenceStep
from folospec.engine.builder import build, warm_up
from folospec.engine.exclusive import Exclusive, HeldInterrupt, exclusive
from folospec.engine.stats_report import stats_report
from folospec.models.forward import ForwardResult
from folospec.outputs import RequestOutput
from folospec.requests.inbox import DeltaInbox, Inbox, OutputDelta, Snapshots
from folospec.requests.input_processor import Prompt
from folospec.sampling_params import SamplingParams
from folospec.text.chat import Message, render
from folospec.text.token_decoder import text_function
from folospec.trace.records import StepTrace, check_path
from folospec.trace.tracer import StepRecorder, Tracer
from folospec.worker.loading import load_components
from folospec.worker.product_timing import choose_products

logger = logging.getLogger(__name__)

T = TypeVar("T")


class LLMEngine:
    """Continuous batching over paged KV, with speculation: add requests, then call `step` until
    none is unfinished.

    Its methods may be called from several threads: a step serves the requests of all of them, and
    each thread gets the outputs of its own. An error that one request causes ends that request
    with `finish_reason="error"`. After any other error in a step the engine is broken: `step` and
    the methods that add requests raise `EngineBrokenError`. A Ctrl-C waits for the end of the step.

    Args:
        config: what runs; the name or folder of a model stands for its config with defaults.

    Raises:
        ValueError: the model, drafter, tokenizer, a size or the trace file cannot be used.
    """

    def __init__(self, config: EngineConfig | str | os.PathLike[str]) -> None:
        if not isinstance(config, EngineConfig):
            config = EngineConfig(model=config)  # type: ignore[arg-type]
        self.config, self._exclusive = config, Exclusive()
        check_path(config.trace)
        self.components = components = load_components(config)
        choose_products(config, components)
        self.tokenizer = components.tokenizer
        built = build(config, components)
        self.manager, self.scheduler = built.manager, built.scheduler
        self.proposer, self.multi_step = built.proposer, built.multi_step
        self.worker, self.verifier, self.committer = built.worker, built.verifier, built.committer
        self.inputs, self.open, self.state = built.inputs, built.open, built.state
        self.outputs, self.logprobs = built.outputs, built.logprobs
        self.engine_stats = built.stats
        self.prefill_pace = PrefillPace(config.max_prefill_slowdown)
        warm_up(config, components, built)
        self.tracer = Tracer(
            config,
            self.manager,
            self.engine_stats,
            self.proposer,
            self.outputs,
            text_function(components.tokenizer),
        )
        self._by_hand = Snapshots()
        """Of the requests from `add_request`; `step` empties it."""

    @exclusive
    def add_request(
        self, prompt: Prompt, params: SamplingParams | None = None, request_id: str | None = None
    ) -> str:
        """Queue a request and return its id. Without `params` it has the model's defaults; see
        `EngineConfig.generation_config`.

        Raises:
            ValueError: the request cannot be served, or the id is in use. Nothing has changed then.
            EngineBrokenError: a step has failed before.
        """
        self.state.require_usable()
        return self.open.admit([(prompt, params)], self._by_hand, request_id)[0]

    @exclusive
    def add_requests(
        self, requests: list[tuple[Prompt, SamplingParams | None]], inbox: Inbox[Any]
    ) -> list[str]:
        """Queue requests whose outputs go to `inbox`, and return their ids. `collect` runs them,
        and `discard` must follow, whatever happens.

        Raises:
            ValueError: one of them cannot be served. None is queued then.
            EngineBrokenError: a step has failed before.
        """
        self.state.require_usable()
        return self.open.admit(requests, inbox)

    @exclusive
    def collect(self, inbox: Inbox[T]) -> list[T]:
        """Return the outputs that wait in an inbox; run one step first if there are none.

        Raises:
            EngineBrokenError: a step has failed, now or before.
        """
        if inbox.unfinished and not inbox.outputs:
            self._advance()
        return inbox.take()

    def holding_interrupts(self) -> AbstractContextManager[HeldInterrupt]:
        """Keep a Ctrl-C back in several calls; see `Exclusive.holding_interrupts`."""
        return self._exclusive.holding_interrupts()

    def discard(self, inbox: Inbox[Any]) -> None:
        """Abort what is unfinished of an inbox; from inside a step, when the next one begins."""
        self.open.discarded.append(inbox)
        if self._exclusive.depth == 0:
            with self._exclusive:
                self._end_discarded()

    @exclusive
    def abort(self, request_id: str) -> RequestOutput | None:
        """Stop a request, free its blocks, and return what it has; None if there is no such
        request.

        Raises:
            RuntimeError: it is called from inside a step, by a logits processor or a drafter.
        """
        self.state.refuse_inside_step("abort")
        return self._abort(request_id)

    @exclusive
    def close(self) -> None:
        """Abort every request; the methods that add requests raise `EngineClosedError` from now
        on. `stats` still works."""
        self.state.refuse_inside_step("close")
        for request_id in list(self.requests):
            self._abort(request_id)
        self.state.is_closed = True

    @property
    def requests(self) -> dict[str, SequenceGroup]:
        """The unfinished requests by id, to look at."""
        return self.open.requests

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether `step` has something to run, or an output to return."""
        return bool(self.requests or self._by_hand.outputs)

    @exclusive
    def step(self, *, finished_only: bool = False) -> list[RequestOutput]:
        """Run one step and return a snapshot of every request that got tokens or finished; with
        `finished_only` of those alone that are finished. Requests of `LLM.generate` and `stream`
        run too; their outputs go to their callers.

        Raises:
            EngineBrokenError: the step has failed, or one before.
        """
        inbox = self._by_hand
        inbox.every_step = not finished_only
        try:
            if self.requests and not (self.state.broken_by and inbox.outputs):
                self._advance()
        finally:
            inbox.every_step = False
        return inbox.take()

    def _advance(self) -> None:
        """Run one step; outputs go to the inboxes."""
        recorder = self.tracer.begin()
        try:
            with self.state.stepping():
                self.state.calls_drafters = True
                self._end_discarded()
                self.state.calls_drafters = False
                self._run_step(recorder)
        finally:
            if recorder is not None and recorder.is_complete:
                self.tracer.finish(recorder)

    def _run_step(self, recorder: StepRecorder | None) -> None:
        begin, planner_begin = time.perf_counter(), self.proposer.clock()
        if self.components.device.type == "cuda":  # kernels are launched where the thread is
            torch.cuda.set_device(self.components.device)
        draft_counts, is_multi_step = self._plan(is_traced=recorder is not None)
        self.state.calls_drafters = True
        schedule = self._schedule(draft_counts)
        steps = list(schedule.steps)
        assert steps, "there are requests, and the oldest can always run"
        self._propose(steps)
        self.state.calls_drafters = False
        result = self._execute(steps, is_multi_step)
        if recorder is not None:
            recorder.add_forward(schedule, steps)
        shown = self.verifier.verify(steps, result)
        touched = self.committer.commit(steps, shown)
        if recorder is not None:
            recorder.add_commit(steps)
        self.engine_stats.num_steps += 1
        failed = self.open.deliver(touched)
        # Last, when every request is in order: in strict mode a drafter's failure ends the step.
        self.state.calls_drafters = True
        try:
            self.proposer.observe(steps, result)
        finally:
            self._drop(failed)
        self.state.calls_drafters = False
        num_passes = result.num_passes
        self.prefill_pace.record(schedule.steps, (time.perf_counter() - begin) / num_passes)
        self.proposer.record_step((self.proposer.clock() - planner_begin) / num_passes)

    @property
    def on_step(self) -> Callable[[StepTrace], None] | None:
        """Called at the end of every step with its trace, if set; what it raises comes out of
        `step`, with every request in order."""
        return self.tracer.on_step

    @on_step.setter
    def on_step(self, listener: Callable[[StepTrace], None] | None) -> None:
        self.tracer.on_step = listener

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[OutputDelta]:
        """Run one request, yielding its text and tokens as they come. Closing the iterator aborts
        the request."""
        inbox = DeltaInbox()
        try:
            self.add_requests([(prompt, params)], inbox)
            while inbox.unfinished or inbox.outputs:
                yield from self.collect(inbox)
        finally:
            self.discard(inbox)

    @exclusive
    def render_chat(self, conversation: Seq[Message], **options: Any) -> list[int]:
        """The token ids of a conversation, by the tokenizer's chat template; `options` are those of
        `apply_chat_template`.

        Raises:
            ValueError: there is no template, or it refuses the conversation.
        """
        return render(self.tokenizer, conversation, **options)

    @exclusive
    def stats(self) -> dict[str, Any]:
        """Counts and times since the engine was made, the sizes it runs with, and the promise that
        holds."""
        return stats_report(self)

    def _abort(self, request_id: str) -> RequestOutput | None:
        group = self.requests.get(request_id)
        output = self.open.abort(request_id, caller=self._by_hand)
        self._drop([] if group is None else [group])
        return output

    def _end_discarded(self) -> None:
        if self.open.discarded:
            self._drop(self.open.end_discarded())

    def _drop(self, ended: Seq[SequenceGroup]) -> None:
        """Let drafters forget the sequences of requests that ended early. In strict mode it raises
        what they raise."""
        sequences = [seq for group in ended for seq in group.sequences]
        if sequences and self.state.broken_by is None:
            self.proposer.drop(sequences, finished=True)

    def _plan(self, *, is_traced: bool) -> tuple[dict[str, int], bool]:
        """Return the draft slots by seq_id, and whether they are for further passes of the target;
        a traced step shows every pass, so it has one."""
        candidates = self.scheduler.candidates
        draft_counts = self.proposer.plan(self.scheduler.running, candidates)
        if self.multi_step.is_on and self.proposer.is_idle and not is_traced:
            return self.multi_step.plan(candidates), True
        return draft_counts, False

    def _schedule(self, draft_counts: dict[str, int]) -> SchedulerOutput:
        output = self.scheduler.schedule(draft_counts, self.prefill_pace.limit)
        self.worker.apply(output.copies)
        for seq in output.preempted:
            self.engine_stats.num_preemptions += 1
            assert seq.group is not None
            seq.group.metrics.num_preemptions += 1
        if output.preempted:
            self.proposer.drop(output.preempted, finished=False)
        return output

    def _propose(self, steps: list[SequenceStep]) -> None:
        begin, is_idle = time.perf_counter(), self.proposer.is_idle
        self.proposer.propose(steps)
        drafting = [step for step in steps if step.num_draft_slots > 0 and not is_idle]
        if drafting:
            self.engine_stats.add_time("draft_time", time.perf_counter() - begin, drafting)

    def _execute(self, steps: list[SequenceStep], is_multi_step: bool) -> ForwardResult:
        """Run the target. A step whose request fails leaves the list."""
        begin = time.perf_counter()
        for step in steps:
            if step.group.params.prompt_logprobs is not None:
                step.wants_all_logits = self.logprobs.wants_prompt(step.group)
        result = self.worker.execute(steps, is_multi_step=is_multi_step)
        self.engine_stats.record_pass(steps, result.num_passes, time.perf_counter() - begin)
        if any(step.wants_all_logits for step in steps):
            self.logprobs.take_prompts(steps, result.logits, self.open.fail)
            steps[:] = [step for step in steps if step.group.error is None]
        return result
