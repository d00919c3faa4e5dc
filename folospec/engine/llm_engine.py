"""The loop: schedule, propose, forward, transform, verify, commit, observe. One call of `step` is
one pass of the target."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from folospec.config import EngineConfig
from folospec.core.kv_cache_manager import KVCacheManager
from folospec.core.scheduler import ScheduledSequence, Scheduler, SchedulerOutput
from folospec.core.sequence import Sequence
from folospec.core.stats import EngineStats
from folospec.engine.asking import Candidate
from folospec.engine.commit import Committer
from folospec.engine.input_processor import InputProcessor, Limits, Prompt
from folospec.engine.loading import load_parts
from folospec.engine.logprobs import LogprobsTaker
from folospec.engine.output_processor import Increment, Stream, make_output
from folospec.engine.request import Request
from folospec.engine.run_ahead import RunAhead
from folospec.engine.speculation import Speculation
from folospec.engine.step_timing import measured_costs
from folospec.engine.target_pass import TargetPass, add_time
from folospec.engine.trace import StepTrace, check_path
from folospec.engine.tracer import Tracer
from folospec.outputs import RequestOutput
from folospec.sampling_params import SamplingParams
from folospec.spec.proposal import Proposal

logger = logging.getLogger(__name__)


class LLMEngine:
    """Continuous batching over paged KV, with speculation: add requests, then call `step` until
    none is unfinished.

    Raises:
        ValueError: the model, drafter, tokenizer, a size or the trace file cannot be used.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        check_path(config.trace)
        self.parts = parts = load_parts(config)
        self.tokenizer = parts.tokenizer
        self.manager = KVCacheManager(
            parts.num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
        )
        self.scheduler = Scheduler(
            self.manager,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            enable_chunked_prefill=config.enable_chunked_prefill,
        )
        spec = parts.target.model.config
        limits = Limits(
            vocab_size=spec.vocab_size,
            max_model_len=parts.max_model_len,
            num_slots=parts.num_blocks * config.block_size,
            eos_token_ids=parts.eos_token_ids,
        )
        self.logprobs = LogprobsTaker(parts.tokenizer)
        self.engine_stats = EngineStats(prefix_cache=self.manager.stats)
        self.speculation = Speculation(
            config.speculative,
            parts.handles,
            self.manager,
            self.engine_stats,
            vocab_size=spec.vocab_size,
            device=parts.device,
            strict=config.strict_drafters,
            costs=measured_costs(config, parts),
        )
        self.speculation.kv = {o: r.kv for o, r in parts.runners.items() if r.kv is not None}
        self.inputs = InputProcessor(config, limits, parts.tokenizer, self.speculation)
        assert parts.target.kv is not None
        self.committer = Committer(
            self.scheduler, self.speculation, parts.target.kv, self.engine_stats, self.logprobs
        )
        self.run_ahead = RunAhead(config, parts.target, self.speculation.needs, self._request)
        self.target_pass = TargetPass(
            config,
            parts.target,
            self.speculation,
            self.run_ahead,
            self.logprobs,
            self._request,
            self._fail,
        )
        self._warm_up()
        self.tracer = Tracer(
            config, self.manager, self.engine_stats, self.speculation, parts.tokenizer
        )
        self._failed: list[Request] = []
        self._streams: dict[str, Stream] = {}
        self.requests: dict[str, Request] = {}
        self._num_requests = 0

    def _warm_up(self) -> None:
        """Record the CUDA graphs that plain steps and steps with drafts will want."""
        config, speculation = self.config, self.speculation
        self.parts.target.warm_up(
            max_num_seqs=config.max_num_seqs,
            max_rows_each=1 + speculation.limit,
            taps=speculation.needs.aux_hidden_state_layers,
        )
        self.run_ahead.warm_up(config.max_num_seqs)
        for drafter in self.parts.drafters:
            drafter.warm_up(config.max_num_seqs)
        for runner in self.parts.all_runners:
            runner.close_graphs()

    def add_request(
        self, prompt: Prompt, params: SamplingParams | None = None, request_id: str | None = None
    ) -> str:
        """Queue a request and return its id.

        Raises:
            ValueError: the request cannot be served, or the id is in use. Nothing has changed then.
        """
        if request_id is None:
            request_id = f"request-{self._num_requests}"
            while request_id in self.requests:
                request_id += "'"
        if request_id in self.requests:
            raise ValueError(f"request_id {request_id!r} is in use")
        request = self.inputs.process(
            request_id, prompt, params or SamplingParams(), self._num_requests
        )
        request.group.metrics.arrival_time = time.monotonic()
        self.scheduler.add(request.group)
        self._num_requests += 1
        self.requests[request_id] = request
        return request_id

    def abort(self, request_id: str) -> RequestOutput | None:
        """Stop a request, free its blocks, and return what it has; None if there is no such
        request."""
        request = self.requests.pop(request_id, None)
        if request is None:
            return None
        for seq in request.group.sequences:
            if not seq.status.is_finished:
                request.outputs[seq.seq_id].finish_reason = "abort"
        self.scheduler.abort(request_id)
        self.speculation.drop(request.group.sequences, finished=True)
        request.group.metrics.finished_time = time.monotonic()
        return make_output(request)

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def step(self, *, finished_only: bool = False) -> list[RequestOutput]:
        """Run one step and return a snapshot of every request that got tokens or finished; with
        `finished_only` of those alone that are finished."""
        if not self.requests:
            return []
        recorder, begin = self.tracer.begin(), time.perf_counter()
        if self.parts.device.type == "cuda":  # kernels are launched where the thread is
            torch.cuda.set_device(self.parts.device)
        self.speculation.plan(self.scheduler.running, self._request)
        # A trace shows every pass.
        goes_ahead = self.run_ahead.is_on and self.speculation.is_idle and recorder is None
        schedule = self._schedule(goes_ahead)
        assert schedule.scheduled, "there are requests, and the oldest can always run"
        proposals = self._propose(schedule.scheduled)
        judgements, result = self.target_pass.run(schedule.scheduled, proposals, goes_ahead)
        if recorder is not None:
            recorder.add_forward(schedule, judgements)
        shown = self.target_pass.judge(judgements, result)
        touched, observed = self.committer.commit(judgements, shown)
        if recorder is not None:
            recorder.add_commit(observed)
        self.engine_stats.num_steps += 1
        outputs = self._take_outputs(touched, finished_only)
        # Last, when every request is in order: in strict mode a drafter's failure ends the step.
        try:
            self.speculation.observe(observed, result)
            spent = time.perf_counter() - begin
            self.speculation.record_step(spent / self.target_pass.num_passes)
        finally:
            if recorder is not None:
                self.tracer.finish(recorder)
        return outputs

    @property
    def on_step(self) -> Callable[[StepTrace], None] | None:
        """Called at the end of every step with its trace, if set; what it raises comes out of
        `step`, with every request in order."""
        return self.tracer.on_step

    @on_step.setter
    def on_step(self, listener: Callable[[StepTrace], None] | None) -> None:
        self.tracer.on_step = listener

    def _take_outputs(self, touched: list[Request], finished_only: bool) -> list[RequestOutput]:
        """End what failed, forget what is finished, and take a snapshot of both, and of the rest
        where it is wanted."""
        failed, self._failed = self._failed, []
        outputs = [self.abort(request.group.request_id) for request in failed]
        for request in touched:
            request_id, is_finished = request.group.request_id, request.group.is_finished
            if is_finished:
                del self.requests[request_id]
            if is_finished or not finished_only:
                outputs.append(make_output(request))
        for request in [*failed, *touched] if self._streams else ():
            if (stream := self._streams.get(request.group.request_id)) is not None:
                stream.take(request)
        return [output for output in outputs if output is not None]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Increment]:
        """Run one request, yielding its text and tokens as they come. Closing the iterator aborts
        the request."""
        request_id = self.add_request(prompt, params)
        # Whoever calls `step`, another stream among them, this one's increments come here.
        stream = self._streams[request_id] = Stream()
        try:
            while stream.arrived or request_id in self.requests:
                if stream.arrived:
                    yield stream.arrived.popleft()
                else:
                    self.step(finished_only=True)
        finally:
            del self._streams[request_id]
            self.abort(request_id)

    def stats(self) -> dict[str, Any]:
        """Counts and times since the engine was made, the sizes it runs with, and the promise that
        holds."""
        drafters = self.speculation.drafter_stats()
        return {
            **self.engine_stats.as_dict(),
            "lossless": self._promise(),
            "num_speculative_tokens": self.speculation.limit,
            "attention_backend": self.parts.attention_backend,
            "device": str(self.parts.device),
            "dtype": str(self.parts.target.model.config.dtype).removeprefix("torch."),
            "quantization": self.config.quantization,
            "max_model_len": self.parts.max_model_len,
            "num_blocks": self.parts.num_blocks,
            "kv_cache_bytes": sum(r.kv.num_bytes for r in self.parts.runners.values() if r.kv),
            "num_free_blocks": self.manager.num_free_blocks,
            "num_cuda_graphs": sum(r.graphs.num_graphs for r in self.parts.all_runners if r.graphs),
            "drafters": drafters,
            "planner": self.speculation.planner_stats(),
        }

    def _promise(self) -> str:
        """The strongest level of the lossless contract that holds: "bit", "path" (up to near ties)
        or "law"; "none" under a lossy rule."""
        rule = self.speculation.rule
        if rule.promise != "tokens":
            return "law" if rule.promise == "distribution" else "none"
        # A registered rule has the tokens drawn by torch, where plain steps may use kernels.
        return "bit" if self.parts.target.is_deterministic and rule.has_kernels else "path"

    def _schedule(self, goes_ahead: bool) -> SchedulerOutput:
        reserve = None if self.speculation.is_idle else self._num_draft_slots
        if goes_ahead:
            reserve = self.run_ahead.num_slots
        output = self.scheduler.schedule(reserve)
        if output.copies:
            for runner in self.parts.runners.values():
                assert runner.kv is not None
                runner.kv.copy_blocks(output.copies)
        for seq in output.preempted:
            self.engine_stats.num_preemptions += 1
            self._request(seq).group.metrics.num_preemptions += 1
        self.speculation.drop(output.preempted, finished=False)
        return output

    def _num_draft_slots(self, seq: Sequence) -> int:
        return self.speculation.num_draft_slots(self._request(seq), seq)

    def _propose(self, scheduled: list[ScheduledSequence]) -> dict[str, Proposal]:
        begin = time.perf_counter()
        candidates = [
            Candidate(self._request(item.seq), item.seq, item.num_draft_slots)
            for item in scheduled
            if item.num_draft_slots > 0 and not self.speculation.is_idle
        ]
        proposals = self.speculation.propose(candidates, scheduled)
        self.speculation.count_undrafted(scheduled, proposals, self._request)
        add_time(self.engine_stats, "draft_time", begin, [c.seq for c in candidates])
        return proposals

    def _fail(self, request: Request, error: Exception) -> None:
        logger.error("request %s is aborted: %s", request.group.request_id, error)
        for seq in request.group.sequences:
            if not seq.status.is_finished:
                request.outputs[seq.seq_id].stop_reason = str(error)
        self._failed.append(request)

    def _request(self, seq: Sequence) -> Request:
        assert seq.group is not None
        return self.requests[seq.group.request_id]
