"""Decides which tokens run in the next step, from counts alone.

It knows no token and no drafter.

There is no prefill phase and no decode phase. Every sequence has tokens without KV, and a step
schedules them up to a token budget: a prompt, a chunk of one, or the one new token of a sequence
that has caught up. Three passes, oldest first:

    1  running sequences get slots for their own tokens; if blocks run out, preempt the youngest
    2  waiting sequences are admitted, as long as they fit without preempting anybody
    3  what is left of budget and blocks goes to draft nodes; so drafts are the first to be shed
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from folospec.core.kv_cache_manager import BlockCopy, KVCacheManager
from folospec.core.sequence import Sequence, SequenceGroup, SequenceStatus
from folospec.core.sequence_step import SequenceStep
from folospec.core.step_budget import StepBudget


@dataclass(slots=True)
class SchedulerOutput:
    """What to do in a step. The copies come first, before anything is written."""

    steps: list[SequenceStep] = field(default_factory=list)
    """Oldest first."""
    copies: list[BlockCopy] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    """Sequences that lost their blocks and wait again; the drafters' state for them is void too."""

    @property
    def num_tokens(self) -> int:
        """Committed tokens and draft slots together: at most `max_num_batched_tokens`."""
        return sum(step.num_tokens + step.num_draft_slots for step in self.steps)


class Scheduler:
    """First come, first served, with continuous batching and preemption by recompute.

    The unit is the sequence: siblings of a request may run at different times. A preempted sequence
    keeps its tokens, loses its blocks and waits in front of all younger ones. The oldest sequence
    can always run, so every request ends.

    Args:
        max_num_seqs: most sequences that run at once, with the siblings that a request is still
            to fork.
        max_num_batched_tokens: token budget of a step, draft nodes included.
        enable_chunked_prefill: split prompts over steps. If False, a prompt runs in one step; only
            a preempted sequence that has grown past the budget is still recomputed in several.

    Raises:
        ValueError: a limit is not a positive integer.
    """

    def __init__(
        self,
        manager: KVCacheManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_chunked_prefill: bool,
    ) -> None:
        for name, value in (
            ("max_num_seqs", max_num_seqs),
            ("max_num_batched_tokens", max_num_batched_tokens),
        ):
            if value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        self.manager = manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.enable_chunked_prefill = enable_chunked_prefill
        # Both sorted by age, oldest first.
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._groups: dict[str, SequenceGroup] = {}

    # Requests come and go -------------------------------------------------------------------------

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """Sequences without blocks, oldest first: new ones and preempted ones."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Sequences that hold blocks, oldest first."""
        return tuple(self._running)

    @property
    def candidates(self) -> tuple[Sequence, ...]:
        """All sequences that may run in the next step: those that run, and the oldest waiting ones,
        as many as there are seats for."""
        num_seats = self.max_num_seqs - len(self._running)
        return (*self._running, *self._waiting[:num_seats])

    @property
    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._running)

    def fits_empty_pool(self, num_tokens: int) -> bool:
        """Whether a sequence of that many tokens can be computed when it is alone.

        Ask it at admission for prompt and `max_tokens` together: what passes is never stuck later.
        """
        return -(-num_tokens // self.manager.block_size) <= self.manager.num_blocks

    def add(self, group: SequenceGroup) -> None:
        """Queue a request.

        Raises:
            ValueError: the request id is in use, the request wants more sequences than may run at
                once, or its prompt fits neither the pool nor, without chunked prefill, the token
                budget. Nothing is changed then.
        """
        seq = group.sequences[0]
        if group.request_id in self._groups:
            raise ValueError(f"request_id must not be in use, got {group.request_id!r}")
        if group.num_sequences_wanted > self.max_num_seqs:
            raise ValueError(
                f"n or best_of must be at most max_num_seqs={self.max_num_seqs}, "
                f"got {group.num_sequences_wanted}"
            )
        if not self.fits_empty_pool(seq.num_tokens + 1):
            num_slots = self.manager.num_blocks * self.manager.block_size
            raise ValueError(
                f"a prompt must be shorter than the KV pool of {num_slots} slots, "
                f"got {seq.num_tokens} tokens"
            )
        if not self.enable_chunked_prefill and seq.num_tokens > self.max_num_batched_tokens:
            raise ValueError(
                f"without chunked prefill a prompt has at most max_num_batched_tokens="
                f"{self.max_num_batched_tokens} tokens, got {seq.num_tokens}"
            )
        self._groups[group.request_id] = group
        insort(self._waiting, seq, key=_age)

    def add_fork(self, seq: Sequence) -> None:
        """Let a fork of a running sequence, such as a sibling of its request, run on its own.

        Raises:
            ValueError: it is finished or here already, or `max_num_seqs` sequences run.
        """
        if seq.status.is_finished or seq in self._running or seq in self._waiting:
            raise ValueError(
                f"a fork to add must be unfinished and new to the scheduler, got {seq!r}"
            )
        if len(self._running) >= self.max_num_seqs:
            raise ValueError(
                f"max_num_seqs={self.max_num_seqs} sequences run already, cannot add {seq!r}"
            )
        if seq.group is not None and seq not in seq.group.sequences:
            seq.group.add_fork(seq)
        if seq.kv is None:
            insort(self._waiting, seq, key=_age)
        else:
            seq.status = SequenceStatus.RUNNING
            insort(self._running, seq, key=_age)

    def finish(self, seq: Sequence, status: SequenceStatus) -> None:
        """End a sequence, free its blocks and forget it; one that is finished stays as it is.

        Raises:
            ValueError: `status` is not a finished one.
        """
        if not status.is_finished:
            raise ValueError(f"status must be a FINISHED one, got {status.name}")
        if seq.status.is_finished:
            return
        for queue in (self._running, self._waiting):
            if seq in queue:
                queue.remove(seq)
        if seq.kv is not None:
            seq.kv.free(seq)
        seq.status = status
        if seq.group is not None and seq.group.is_finished:
            self._groups.pop(seq.group.request_id, None)

    def abort(self, request_id: str) -> bool:
        """End all sequences of a request; False if there is no such request (any more)."""
        group = self._groups.get(request_id)
        if group is None:
            return False
        for seq in group.sequences:
            self.finish(seq, SequenceStatus.FINISHED_ABORTED)
        return True

    # A step ---------------------------------------------------------------------------------------

    def schedule(
        self,
        draft_counts: Mapping[str, int] | None = None,
        max_long_tokens: int | None = None,
    ) -> SchedulerOutput:
        """Choose what runs, reserve its slots, preempt where blocks are short.

        Args:
            draft_counts: by seq_id, how many draft nodes the sequence could use if it decodes in
                this step; one that is not there has none. The limits of the request and the model
                are the caller's to respect. A sequence may get fewer.
            max_long_tokens: most tokens of long prompts, all together, while a sequence decodes
                and prompts may be split; None for no such limit.
        """
        output = SchedulerOutput()
        budget = StepBudget(self.max_num_batched_tokens)
        if max_long_tokens is not None and self.enable_chunked_prefill:
            budget.limit_long(max_long_tokens, self._running)
        self._schedule_running(output, budget)
        # Who was preempted just now waits in front and cannot come back in this step: an older
        # sequence has taken some of the blocks that it would need.
        self._admit_waiting(output, budget)
        if draft_counts:
            self._reserve_drafts(output, budget.num_tokens, draft_counts)
        return output

    def _schedule_running(self, output: SchedulerOutput, budget: StepBudget) -> None:
        position = 0
        while position < len(self._running) and budget.num_tokens > 0:
            seq = self._running[position]
            num_left = seq.num_tokens - seq.num_computed_tokens
            num_tokens = self._share(seq, num_left, budget.of(seq))
            if num_tokens > 0 and not self._reserve(seq, num_tokens, output):
                break  # It was the youngest left, and is preempted itself.
            budget.take(seq, num_tokens)
            position += 1

    def _reserve(self, seq: Sequence, num_tokens: int, output: SchedulerOutput) -> bool:
        """Slots for a running sequence, at the expense of the youngest ones if need be."""
        while True:
            start = seq.num_computed_tokens
            copies = self.manager.allocate_slots(seq, num_tokens)
            if copies is not None:
                output.copies += copies
                output.steps.append(SequenceStep(seq, start, num_tokens))
                return True
            victim = self._running[-1]
            assert victim is not self._running[0], f"not even alone there are blocks for {victim!r}"
            self._preempt(victim)
            output.preempted.append(victim)
            if victim is seq:
                return False

    def _preempt(self, seq: Sequence) -> None:
        self._running.remove(seq)
        self.manager.free(seq)
        seq.status = SequenceStatus.PREEMPTED
        insort(self._waiting, seq, key=_age)

    def _admit_waiting(self, output: SchedulerOutput, budget: StepBudget) -> None:
        if not self._waiting:
            return
        num_seats = self.max_num_seqs - sum(1 + _num_pending(seq) for seq in self._running)
        while self._waiting and budget.num_tokens > 0:
            seq = self._waiting[0]
            use_cache = seq.group is None or seq.group.params.prompt_logprobs is None
            num_cached = (
                len(self.manager.cached_blocks(seq, use_cache=use_cache)) * self.manager.block_size
            )
            num_tokens = self._share(seq, seq.num_tokens - num_cached, budget.of(seq))
            num_seats -= 1 + _num_pending(seq)
            if (
                num_seats < 0
                or num_tokens == 0
                or not self.manager.can_admit(seq, use_cache=use_cache)
            ):
                break
            self.manager.admit(seq, use_cache=use_cache)
            copies = self.manager.allocate_slots(seq, num_tokens)
            assert copies == [], (
                f"an admitted sequence has its own blocks, got {copies} for {seq!r}"
            )
            if seq.status is SequenceStatus.WAITING and seq.group is not None:
                seq.group.metrics.num_cached_tokens += num_cached
            seq.status = SequenceStatus.RUNNING
            insort(self._running, self._waiting.pop(0), key=_age)
            output.steps.append(SequenceStep(seq, num_cached, num_tokens))
            budget.take(seq, num_tokens)

    def _share(self, seq: Sequence, num_left: int, budget: int) -> int:
        """How many of its `num_left` tokens a sequence may run now; 0 if it has to wait."""
        if num_left <= budget:
            return num_left
        may_split = self.enable_chunked_prefill or seq.num_tokens > self.max_num_batched_tokens
        return budget if may_split else 0

    def _reserve_drafts(
        self, output: SchedulerOutput, budget: int, draft_counts: Mapping[str, int]
    ) -> None:
        for step in output.steps:
            if budget == 0:
                break
            # While siblings are pending, the row of the last token is for their first tokens too.
            if step.num_tokens > 1 or not step.samples or _num_pending(step.seq) > 0:
                continue
            num_drafts = min(draft_counts.get(step.seq.seq_id, 0), budget)
            while num_drafts > 0 and not self.manager.can_allocate(step.seq, 1 + num_drafts):
                num_drafts -= 1
            if num_drafts > 0:
                copies = self.manager.allocate_slots(step.seq, 1 + num_drafts)
                assert copies is not None, "can_allocate and allocate_slots disagree"
                output.copies += copies
                step.num_draft_slots = num_drafts
                budget -= num_drafts

    def check_integrity(self, others: Iterable[Sequence] = ()) -> None:
        """Account for every sequence and block, given the sequences outside that hold blocks too.

        Those are forks that somebody drafts on by hand.

        Raises:
            AssertionError: see `KVCacheManager.check_integrity`; or a queue is out of order, has a
                sequence of the wrong status, or has a waiting one with blocks.
        """
        for queue in (self._waiting, self._running):
            if any(_age(a) > _age(b) for a, b in zip(queue, queue[1:], strict=False)):
                raise AssertionError(f"sequences are not in order of age: {queue}")
        for seq in self._running:
            if seq.status is not SequenceStatus.RUNNING or seq.kv is not self.manager:
                raise AssertionError(f"not a running sequence with blocks: {seq!r}")
        for seq in self._waiting:
            if (
                seq.status not in (SequenceStatus.WAITING, SequenceStatus.PREEMPTED)
                or seq.block_table
            ):
                raise AssertionError(f"not a waiting sequence without blocks: {seq!r}")
        if len(self._running) > self.max_num_seqs:
            raise AssertionError(
                f"{len(self._running)} sequences run, more than max_num_seqs={self.max_num_seqs}"
            )
        self.manager.check_integrity([*self._running, *others])


def _age(seq: Sequence) -> tuple[int, int]:
    return seq.arrival_key


def _num_pending(seq: Sequence) -> int:
    """Siblings that this sequence has still to be forked into."""
    group = seq.group
    if group is None or seq is not group.sequences[0]:
        return 0
    return group.num_pending_siblings
