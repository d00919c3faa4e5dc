"""The loop: schedule, propose, forward, transform, verify, commit, observe. One call of `step` is
one pass of the target."""

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
from folospec.core.scheduler import SchedulerOutput
from folospec.core.sequence import SequenceGroup
from folospec.core.sequence_step import SequenceStep
from folospec.engine.builder import Components, build, warm_up
from folospec.engine.chat import Message, render
from folospec.engine.exclusive import Exclusive, HeldInterrupt, exclusive
from folospec.engine.inbox import Inbox, Increment, Increments, Snapshots
from folospec.engine.input_processor import Prompt
from folospec.engine.loading import load_parts
from folospec.engine.prefill_pace import PrefillPace
from folospec.engine.product_timing import choose_products
from folospec.engine.stats_report import stats_report
from folospec.engine.token_decoder import text_function
from folospec.models.forward import ForwardResult
from folospec.outputs import RequestOutput
from folospec.sampling_params import SamplingParams
from folospec.trace.records import StepTrace, check_path
from folospec.trace.tracer import StepRecorder, Tracer

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
        self.parts = parts = load_parts(config)
        choose_products(config, parts)
        self.tokenizer = parts.tokenizer
        built = build(config, parts)
        self.manager, self.scheduler = built.manager, built.scheduler
        self.speculation, self.run_ahead = built.speculation, built.run_ahead
        self.worker, self.verifier, self.committer = built.worker, built.verifier, built.committer
        self.inputs, self.open, self.state = built.inputs, built.open, built.state
        self.outputs, self.logprobs = built.outputs, built.logprobs
        self.engine_stats = built.stats
        self.prefill_pace = PrefillPace(config.max_prefill_slowdown)
        self._warm_up(built)
        self.tracer = Tracer(
            config,
            self.manager,
            self.engine_stats,
            self.speculation,
            self.outputs,
            text_function(parts.tokenizer),
        )
        self._by_hand = Snapshots()
        """Of the requests from `add_request`; `step` empties it."""

    def _warm_up(self, components: Components) -> None:
        warm_up(self.config, self.parts, components)

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
                self.open.end_discarded()

    @exclusive
    def abort(self, request_id: str) -> RequestOutput | None:
        """Stop a request, free its blocks, and return what it has; None if there is no such
        request.

        Raises:
            RuntimeError: it is called from inside a step, by a logits processor or a drafter.
        """
        self.state.refuse_inside_step("abort")
        return self.open.abort(request_id, caller=self._by_hand)

    @exclusive
    def close(self) -> None:
        """Abort every request; the methods that add requests raise `EngineClosedError` from now
        on. `stats` still works."""
        self.state.refuse_inside_step("close")
        for request_id in list(self.requests):
            self.open.abort(request_id, caller=self._by_hand)
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
        self.state.refuse_inside_step("step")
        self.state.require_usable()
        self.open.end_discarded()
        recorder = self.tracer.begin()
        try:
            with self.state.stepping():
                self._run_step(recorder)
        finally:
            if recorder is not None and recorder.is_complete:
                self.tracer.finish(recorder)

    def _run_step(self, recorder: StepRecorder | None) -> None:
        begin, planner_begin = time.perf_counter(), self.speculation.clock()
        if self.parts.device.type == "cuda":  # kernels are launched where the thread is
            torch.cuda.set_device(self.parts.device)
        candidates = self.scheduler.candidates
        draft_counts = self.speculation.plan(self.scheduler.running, candidates)
        # A trace shows every pass.
        goes_ahead = self.run_ahead.is_on and self.speculation.is_idle and recorder is None
        if goes_ahead:
            draft_counts = self.run_ahead.plan(candidates)
        with self.state.calling_drafters():
            schedule = self._schedule(draft_counts)
            steps = list(schedule.steps)
            assert steps, "there are requests, and the oldest can always run"
            self._propose(steps)
        result = self._execute(steps, goes_ahead)
        if recorder is not None:
            recorder.add_forward(schedule, steps)
        shown = self.verifier.verify(steps, result)
        touched = self.committer.commit(steps, shown)
        if recorder is not None:
            recorder.add_commit(steps)
        self.engine_stats.num_steps += 1
        failed = self.open.deliver(touched)
        # Last, when every request is in order: in strict mode a drafter's failure ends the step.
        with self.state.calling_drafters():
            self.open.forget_drafts(failed)
            self.speculation.observe(steps, result)
        num_passes = result.num_passes
        self.prefill_pace.record(schedule.steps, (time.perf_counter() - begin) / num_passes)
        self.speculation.record_step((self.speculation.clock() - planner_begin) / num_passes)

    @property
    def on_step(self) -> Callable[[StepTrace], None] | None:
        """Called at the end of every step with its trace, if set; what it raises comes out of
        `step`, with every request in order."""
        return self.tracer.on_step

    @on_step.setter
    def on_step(self, listener: Callable[[StepTrace], None] | None) -> None:
        self.tracer.on_step = listener

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Increment]:
        """Run one request, yielding its text and tokens as they come. Closing the iterator aborts
        the request."""
        inbox = Increments()
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

    def _schedule(self, draft_counts: dict[str, int]) -> SchedulerOutput:
        output = self.scheduler.schedule(draft_counts, self.prefill_pace.limit)
        self.worker.apply(output.copies)
        for seq in output.preempted:
            self.engine_stats.num_preemptions += 1
            assert seq.group is not None
            seq.group.metrics.num_preemptions += 1
        self.speculation.drop(output.preempted, finished=False)
        return output

    def _propose(self, steps: list[SequenceStep]) -> None:
        begin, is_idle = time.perf_counter(), self.speculation.is_idle
        self.speculation.propose(steps)
        drafting = [step for step in steps if step.num_draft_slots > 0 and not is_idle]
        self.engine_stats.add_time("draft_time", time.perf_counter() - begin, drafting)

    def _execute(self, steps: list[SequenceStep], goes_ahead: bool) -> ForwardResult:
        """Run the target. A step whose request fails leaves the list."""
        begin = time.perf_counter()
        for step in steps:
            step.wants_all_logits = self.logprobs.wants_prompt(step.group)
        result = self.worker.execute(steps, goes_ahead=goes_ahead)
        self.engine_stats.add_time("target_time", time.perf_counter() - begin, steps)
        self.engine_stats.record_pass(steps, result.num_passes)
        self.logprobs.take_prompts(steps, result.logits, self.open.fail)
        steps[:] = [step for step in steps if step.group.error is None]
        return result
