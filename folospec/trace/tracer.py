"""Records what every step did, for a file, for a callback, or for both.

    step        schedule | propose | forward | transform | verify | commit | observe
    recorder   begin               add_forward               add_commit     finish -> StepTrace

With nobody listening there is no recorder, and a step costs one `if`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from folospec.core.token_tree import ROOT
from folospec.sampling.sampler import NO_TOKEN
from folospec.trace.records import (
    SCHEMA,
    VERSION,
    BlockCounts,
    DrafterInfo,
    NextKind,
    NodeTrace,
    NodeVerdict,
    ProposalTrace,
    SequenceTrace,
    StepTimes,
    StepTrace,
    TokenTrace,
    TraceFile,
    TraceHeader,
)

if TYPE_CHECKING:
    from folospec.config import EngineConfig
    from folospec.core.kv_cache_manager import KVCacheManager
    from folospec.core.scheduler import SchedulerOutput
    from folospec.core.sequence import Sequence
    from folospec.core.sequence_step import SequenceStep
    from folospec.core.stats import EngineStats
    from folospec.core.token_tree import Verdict
    from folospec.requests.output_processor import GroupOutput, OutputProcessor
    from folospec.spec.proposal import Proposal
    from folospec.spec.proposer import Proposer

logger = logging.getLogger(__name__)

Text = Callable[[int], "str | None"]


class Tracer:
    """Who wants to know of an engine's steps, and what they are told.

    Args:
        text: token id -> its text; None where there is no tokenizer.

    Raises:
        ValueError: `config.trace` cannot be written.
    """

    def __init__(
        self,
        config: EngineConfig,
        manager: KVCacheManager,
        stats: EngineStats,
        proposer: Proposer,
        outputs: OutputProcessor,
        text: Text,
    ) -> None:
        self._outputs = outputs
        self.on_step: Callable[[StepTrace], None] | None = None
        self.header = _header(config, manager, proposer)
        self._manager, self._stats, self._proposer = manager, stats, proposer
        self._tries_in_order = not proposer.rule.shares_noise
        self._text = text
        self._file = TraceFile(config.trace, self.header) if config.trace is not None else None

    def begin(self) -> StepRecorder | None:
        """A recorder for the step that begins now; None if nobody wants to know."""
        if self.on_step is None and self._file is None:
            return None
        return StepRecorder(
            self._manager,
            self._stats,
            self._proposer,
            self._outputs,
            self._text,
            self._tries_in_order,
        )

    def finish(self, recorder: StepRecorder) -> None:
        """Tell of a step that is over. A step that cannot be recorded is left out, and a file that
        cannot be written ends there, with an error in the log; what `on_step` raises is the
        caller's."""
        try:
            trace = recorder.finish()
        except Exception:
            logger.exception("step %d is missing in the trace", self._stats.num_steps)
            return
        if self._file is not None:
            try:
                self._file.write(trace)
            except Exception as error:
                logger.error("the trace ends before step %d: %s", trace.step, error)
                self._file = None
        if self.on_step is not None:
            self.on_step(trace)


class StepRecorder:
    """Takes notes during one step. Times of drafting, target and sampling are those that the engine
    counts in its stats."""

    def __init__(
        self,
        manager: KVCacheManager,
        stats: EngineStats,
        proposer: Proposer,
        outputs: OutputProcessor,
        text: Text,
        tries_in_order: bool,
    ) -> None:
        self._proposer, self._outputs = proposer, outputs
        self._manager, self._stats = manager, stats
        self._text, self._tries_in_order = text, tries_in_order
        self._before = _counts(stats)
        self._unix_time = time.time()
        self._begin = time.perf_counter()
        self.is_complete = False
        """Whether the step came as far as its commit."""

    def add_forward(self, schedule: SchedulerOutput, steps: list[SequenceStep]) -> None:
        """To be called when the target has run, and nothing is verified yet."""
        self._ran_at, self._ran = time.perf_counter(), _counts(self._stats)
        self._schedule, self._steps = schedule, list(steps)
        self._group_outputs = [self._outputs.of_group(step.group) for step in steps]
        self._reasons = dict(self._proposer.reasons)
        self._num_blocks = {s.seq.seq_id: len(s.seq.block_table) for s in steps}
        total, free = self._manager.num_blocks, self._manager.num_free_blocks
        self._blocks = BlockCounts(total, held=total - free, free=free)

    def add_commit(self, steps: list[SequenceStep]) -> None:
        """To be called when the step's tokens are committed. A request that has failed is not among
        `steps`."""
        self._committed_at = time.perf_counter()
        self._committed = {step.seq.seq_id for step in steps}
        self.is_complete = True

    def finish(self) -> StepTrace:
        """The step's trace, when the drafters have been told of it and failed requests are
        ended."""
        now = time.perf_counter()
        after = _counts(self._stats)
        draft, target = self._ran.draft - self._before.draft, self._ran.target - self._before.target
        sampling = after.sampling - self._ran.sampling
        times = StepTimes(
            schedule=self._ran_at - self._begin - draft - target,
            draft=draft,
            target=target,
            sampling=sampling,
            commit=self._committed_at - self._ran_at - sampling,
            observe=now - self._committed_at,
            total=now - self._begin,
        )
        return StepTrace(
            step=self._stats.num_steps,
            unix_time=self._unix_time,
            times=times,
            num_rows=after.num_rows - self._before.num_rows,
            blocks=self._blocks,
            preempted=[seq.seq_id for seq in self._schedule.preempted],
            copies=[[copy.src, copy.dst] for copy in self._schedule.copies],
            num_moved_rows=after.num_moved_rows - self._before.num_moved_rows,
            sequences=[
                trace
                for step, outputs in zip(self._steps, self._group_outputs, strict=True)
                for trace in self._sequences(step, outputs)
            ],
        )

    def _sequences(self, step: SequenceStep, outputs: GroupOutput) -> Iterator[SequenceTrace]:
        """A sequence that ran, and the siblings that were forked from it at the end of the step."""
        if step.seq.seq_id not in self._committed:
            yield self._sequence(step, step.seq, outputs, None, [])
            return
        yield self._sequence(step, step.seq, outputs, step.verdict, step.new_token_ids)
        for sibling, verdict in zip(step.siblings, (step.verdicts or [])[1:], strict=True):
            yield self._sequence(step, sibling, outputs, verdict, sibling.output_token_ids)

    def _sequence(
        self,
        step: SequenceStep,
        seq: Sequence,
        outputs: GroupOutput,
        verdict: Verdict | None,
        new_token_ids: list[int],
    ) -> SequenceTrace:
        proposal = step.proposal
        path = [int(node) for node in verdict.path] if verdict is not None else []
        next_id = verdict.next_token_id if verdict is not None else NO_TOKEN
        root = step.start + step.num_tokens - 1 if step.logits_indices else None
        output = outputs.sequences[seq.seq_id]
        return SequenceTrace(
            request_id=step.group.request_id,
            seq_id=seq.seq_id,
            forked_from=step.seq.seq_id if seq is not step.seq else None,
            start=step.start,
            num_tokens=step.num_tokens,
            num_prompt_tokens=seq.num_prompt_tokens,
            root=self._token(seq.token_ids[root]) if root is not None else None,
            root_position=root,
            proposal=self._proposal(proposal, verdict) if proposal is not None else None,
            undrafted_reason=self._reasons.get(seq.seq_id),
            path=path,
            next_token=self._token(next_id) if next_id != NO_TOKEN else None,
            next_kind=_next_kind(proposal, path) if next_id != NO_TOKEN else None,
            new_tokens=[self._token(token_id) for token_id in new_token_ids],
            num_blocks=self._num_blocks[step.seq.seq_id],
            num_blocks_kept=len(seq.block_table),
            draft_progress=dict(seq.draft_progress),
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason if output.error is None else output.error,
        )

    def _token(self, token_id: int) -> TokenTrace:
        return TokenTrace(int(token_id), self._text(int(token_id)))

    def _proposal(self, proposal: Proposal, verdict: Verdict | None) -> ProposalTrace:
        token_ids = [int(token_id) for token_id in proposal.tree.token_ids]
        verdicts = node_verdicts(proposal, verdict, tries_in_order=self._tries_in_order)
        probs: list[float | None] = [None] * len(proposal)
        if proposal.draft_probs is not None:
            probs = proposal.draft_probs[range(len(proposal)), token_ids].tolist()
        confidence = proposal.confidence
        return ProposalTrace(
            proposal.drafter,
            [
                NodeTrace(
                    token_id=token_id,
                    text=self._text(token_id),
                    parent=int(proposal.tree.parents[node]),
                    confidence=float(confidence[node]) if confidence is not None else None,
                    draft_prob=probs[node],
                    verdict=verdicts[node],
                )
                for node, token_id in enumerate(token_ids)
            ],
        )


def node_verdicts(
    proposal: Proposal, verdict: Verdict | None, *, tries_in_order: bool
) -> list[NodeVerdict]:
    """What became of each node of a proposal; without a verdict no node was reached.

    Args:
        tries_in_order: the rule tries siblings in turn, and none after the accepted one.
    """
    tree = proposal.tree
    reached = [ROOT, *verdict.path] if verdict is not None else []
    winners = dict(zip(reached, verdict.path, strict=False)) if verdict is not None else {}

    def spared(node: int, winner: int) -> bool:
        # Of siblings that are verified at once, a duplicate has the token that won.
        return node > winner if tries_in_order else tree.token_ids[node] == tree.token_ids[winner]

    found: list[NodeVerdict] = []
    for node, parent in enumerate(tree.parents):
        winner = winners.get(parent)
        if not proposal.is_candidate(node):
            found.append("scratch")
        elif parent not in reached:
            found.append("not_reached")
        elif node == winner:
            found.append("accepted")
        elif winner is not None and spared(node, winner):
            found.append("not_reached")
        else:
            found.append("rejected")
    return found


def _next_kind(proposal: Proposal | None, path: list[int]) -> NextKind:
    if proposal is None:
        return "plain"
    below = proposal.tree.children(path[-1] if path else ROOT)
    return "recovered" if any(proposal.is_candidate(node) for node in below) else "bonus"


class _Counts(NamedTuple):
    draft: float
    target: float
    sampling: float
    num_rows: int
    num_moved_rows: int


def _counts(stats: EngineStats) -> _Counts:
    times = stats.draft_time, stats.target_time, stats.sampling_time
    return _Counts(*times, stats.num_scheduled_tokens, stats.num_moved_rows)


def _header(config: EngineConfig, manager: KVCacheManager, proposer: Proposer) -> TraceHeader:
    speculative = config.speculative
    return TraceHeader(
        schema=SCHEMA,
        version=VERSION,
        model=config.model,
        vocab_size=proposer.vocab_size,
        block_size=manager.block_size,
        num_blocks=manager.num_blocks,
        drafters=[
            DrafterInfo(
                name=drafter.name,
                method=drafter.config.method,
                model=drafter.config.model,
                num_speculative_tokens=drafter.num_speculative_tokens,
                options=dict(drafter.config.options),
            )
            for drafter in proposer.drafters
        ],
        acceptance=speculative.acceptance if speculative is not None else None,
        merge=speculative.merge if speculative is not None else False,
        adaptive=speculative.is_adaptive if speculative is not None else False,
    )
