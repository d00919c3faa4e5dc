"""KV memory and a runner without a model. A KV row *is* the tokens it depends on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Seq

from folospec.core import (
    BlockCopy,
    KVCacheManager,
    Scheduler,
    SchedulerOutput,
    Sequence,
    SequenceGroup,
    SequenceStatus,
    SequenceStep,
)
from folospec.sampling_params import SamplingParams

TARGET = "target"
DRAFTER = "drafter"


class FakeKV:
    """Rows by KV owner and slot. Row i of a sequence must hold its tokens 0..i."""

    def __init__(self, manager: KVCacheManager) -> None:
        self.manager = manager
        self.rows: dict[str, dict[int, tuple[int, ...]]] = defaultdict(dict)

    def copy(self, copies: Seq[BlockCopy]) -> None:
        size = self.manager.block_size
        for rows in self.rows.values():
            for src, dst in copies:
                for offset in range(size):
                    rows[dst * size + offset] = rows.get(src * size + offset, ())

    def write(self, owner: str, seq: Sequence, start: int, token_ids: Seq[int]) -> None:
        """Write rows start.. of a sequence that would have these tokens in all."""
        for index in range(start, len(token_ids)):
            self.rows[owner][self.manager.slot(seq, index)] = tuple(token_ids[: index + 1])

    def check(self, owner: str, seq: Sequence, num_tokens: int) -> None:
        for index in range(num_tokens):
            row = self.rows[owner].get(self.manager.slot(seq, index))
            expected = tuple(seq.token_ids[: index + 1])
            assert row == expected, f"{owner} row {index} of {seq!r} holds {row}, not {expected}"

    def check_all(self, seq: Sequence) -> None:
        self.check(TARGET, seq, seq.num_computed_tokens)
        for owner, progress in seq.draft_progress.items():
            self.check(owner, seq, progress)


def next_token(token_ids: Seq[int], sample_index: int) -> int:
    """The target: a fixed function of the whole history."""
    return (sum(token_ids) * 31 + len(token_ids) * 7 + sample_index * 13) % 97


def plain_run(prompt: list[int], sample_index: int, max_tokens: int) -> list[int]:
    token_ids = list(prompt)
    for _ in range(max_tokens):
        token_ids.append(next_token(token_ids, sample_index))
    return token_ids[len(prompt) :]


class FakeRunner:
    """Does with a scheduler what an engine does, and checks every row it reads and every block."""

    def __init__(self, scheduler: Scheduler, num_drafts: int = 0, *, copies: bool = True) -> None:
        self.scheduler = scheduler
        self.manager = scheduler.manager
        self.num_drafts = num_drafts
        self.kv = FakeKV(self.manager)
        self.makes_copies = copies
        self.num_accepted = self.num_rejected = self.num_preempted = self.num_copies = 0
        self.groups: list[SequenceGroup] = []

    def add(self, prompt: list[int], **params: object) -> SequenceGroup:
        wanted = SamplingParams(**params)  # type: ignore[arg-type]
        number = len(self.groups)
        group = SequenceGroup(f"r{number}", prompt, wanted, arrival=number)
        self.scheduler.add(group)
        self.groups.append(group)
        return group

    def run(self) -> None:
        num_steps = 0
        while self.scheduler.has_unfinished:
            self.step()
            num_steps += 1
            assert num_steps < 2000, "the scheduler makes no progress"
        for group in self.groups:
            for seq in group.sequences:
                max_tokens = group.params.max_tokens
                expected = plain_run(seq.prompt_token_ids, seq.sample_index, max_tokens)
                assert seq.output_token_ids == expected
        assert self.manager.num_free_blocks == self.manager.num_blocks

    def step(self) -> SchedulerOutput:
        queued = (*self.scheduler.running, *self.scheduler.waiting)
        output = self.scheduler.schedule({seq.seq_id: self._draft_count(seq) for seq in queued})
        self.scheduler.check_integrity()
        assert output.steps, "a step must do something"
        assert output.num_tokens <= self.scheduler.max_num_batched_tokens
        self.num_preempted += len(output.preempted)
        self.num_copies += len(output.copies)
        if self.makes_copies:
            self.kv.copy(output.copies)
        for step in output.steps:
            self._compute(step)
            self.scheduler.check_integrity()
        return output

    def _draft_count(self, seq: Sequence) -> int:
        room = seq.group.params.max_tokens - seq.num_output_tokens - 1
        return min(self.num_drafts, room)

    def _compute(self, step: SequenceStep) -> None:
        seq, group = step.seq, step.seq.group
        self.kv.check_all(seq)
        drafts = self._draft(seq, step.num_draft_slots)
        computed = step.start + step.num_tokens
        self.kv.write(TARGET, seq, step.start, [*seq.token_ids[:computed], *drafts])
        if not step.samples:
            self.manager.commit(seq, computed)
            return
        siblings: list[Sequence] = []
        if group.num_pending_siblings:
            self.manager.commit(seq, computed)
            siblings = group.fork_siblings()
            for sibling in siblings:
                self.scheduler.add_fork(sibling)
        num_accepted = 0
        while True:
            seq.add_token_id(next_token(seq.token_ids, seq.sample_index))
            if num_accepted == len(drafts) or seq.token_ids[-1] != drafts[num_accepted]:
                break
            num_accepted += 1
        self.num_accepted += num_accepted
        self.num_rejected += len(drafts) - num_accepted
        self.manager.commit(seq, computed + num_accepted)
        self.manager.rollback(seq)
        for sibling in siblings:
            sibling.add_token_id(next_token(sibling.token_ids, sibling.sample_index))
        for each in (seq, *siblings):
            if each.num_output_tokens == group.params.max_tokens:
                self.scheduler.finish(each, SequenceStatus.FINISHED_LENGTH)

    def _draft(self, seq: Sequence, num_drafts: int) -> list[int]:
        """Catch up the drafter's own KV, then guess; every fifth guess is wrong."""
        if num_drafts == 0:
            return []
        token_ids = list(seq.token_ids)
        self.kv.write(DRAFTER, seq, seq.draft_progress.get(DRAFTER, 0), token_ids)
        self.manager.mark_draft(seq, DRAFTER, seq.num_tokens)
        for _ in range(num_drafts):
            guess = next_token(token_ids, seq.sample_index)
            token_ids.append(guess if len(token_ids) % 5 else (guess + 1) % 97)
        self.kv.write(DRAFTER, seq, seq.num_tokens, token_ids[:-1])
        return token_ids[seq.num_tokens :]


def make_runner(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    num_drafts: int = 0,
    caching: bool = False,
    copies: bool = True,
    **limits: object,
) -> FakeRunner:
    settings = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "enable_chunked_prefill": True,
        **limits,
    }
    manager = KVCacheManager(num_blocks, block_size, enable_prefix_caching=caching)
    scheduler = Scheduler(manager, **settings)  # type: ignore[arg-type]
    return FakeRunner(scheduler, num_drafts, copies=copies)


def computed(
    manager: KVCacheManager,
    prompt: list[int],
    seq_id: str = "main",
    *,
    num_tokens: int | None = None,
) -> Sequence:
    """An admitted sequence whose first `num_tokens` tokens (default: all) have been computed."""
    seq = Sequence(seq_id, prompt)
    num_cached = manager.admit(seq)
    stop = len(prompt) if num_tokens is None else num_tokens
    assert manager.allocate_slots(seq, stop - num_cached) is not None
    manager.commit(seq, stop)
    return seq
