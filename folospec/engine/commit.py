"""Applies the verified tokens of a step: append, move KV, advance, roll back."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from folospec.core.kv_moves import KVMoves
from folospec.core.scheduler import Scheduler
from folospec.core.sequence import Sequence, SequenceGroup, SequenceStatus
from folospec.core.sequence_step import SequenceStep
from folospec.core.stats import EngineStats
from folospec.core.token_tree import Verdict
from folospec.requests.logprobs import LogprobsProcessor
from folospec.requests.output_processor import OutputProcessor
from folospec.sampling.sampler import NO_TOKEN
from folospec.spec.proposal import Proposal
from folospec.worker.worker import TARGET, Worker

_STATUS = {"stop": SequenceStatus.FINISHED_STOPPED, "length": SequenceStatus.FINISHED_LENGTH}


class Committer:
    """Appends tokens, moves the KV of accepted nodes into place, rolls back the rest, and ends what
    is done.

        slots    ... | root | node 0 | node 1 | node 2 |      accepted path: nodes 0 and 2
                                ^                 |
        commit       | root | node 0 | node 2 |   '-> its row moves to slot root + 2
        roll back    blocks past the last committed token go back to the pool

    An error that comes from one request (its text, its logprobs) ends that request with `fail`; the
    caller frees its blocks.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        worker: Worker,
        stats: EngineStats,
        outputs: OutputProcessor,
        logprobs: LogprobsProcessor,
        fail: Callable[[SequenceGroup, Exception], None],
    ) -> None:
        self._fail, self._outputs = fail, outputs
        self.scheduler, self.manager = scheduler, scheduler.manager
        self._worker = worker
        self.stats, self.logprobs = stats, logprobs

    def commit(self, steps: list[SequenceStep], shown: Tensor) -> list[SequenceGroup]:
        """Commit a step; those whose request fails, or has failed, leave the list.

        Args:
            steps: one for each sequence of the step.
            shown: float [num_rows, vocab_size], what logprobs are taken from;
                `SequenceStep.logits_indices` are its indices.

        Returns:
            the requests that got tokens.
        """
        emitted: list[Sequence] = []
        moves = KVMoves()
        for step in steps:
            if step.group.error is not None:
                continue  # A sibling has failed.
            try:
                emitted += self._commit(step, shown, moves)
            except Exception as error:
                self._fail(step.group, error)
        self._worker.apply(moves=moves)
        steps[:] = [step for step in steps if step.group.error is None]
        groups: dict[int, SequenceGroup] = {}
        for seq in emitted:
            assert seq.group is not None
            if seq.group.error is not None:
                continue
            groups[id(seq.group)] = seq.group
            reason = self._outputs.of(seq).finish_reason
            if reason is not None:
                self.scheduler.finish(seq, _STATUS[reason])
        now = time.monotonic()
        for group in groups.values():
            _note_time(group, now)
        self._count_drafts(steps)
        return list(groups.values())

    def _commit(self, step: SequenceStep, shown: Tensor, moves: KVMoves) -> list[Sequence]:
        """Commit one sequence's part; return the sequences that got tokens."""
        if not step.verdicts:
            self.manager.commit(step.seq, step.start + step.num_tokens)
            return []
        seq, verdict, root = step.seq, step.verdicts[0], step.seq.num_tokens - 1
        self._fork_siblings(step)
        step.new_token_ids = self._emit(step, seq, verdict, shown)
        path = step.accepted_path = verdict.path[: len(step.new_token_ids)]
        if step.proposal is not None:
            self._move_accepted(seq, path, root, moves)
            self._move_draft_kv(seq, step.proposal, path, root, moves)
        self._advance(seq, root + 1 + len(path))
        for sibling, sibling_verdict in zip(step.siblings, step.verdicts[1:], strict=True):
            self._emit(step, sibling, sibling_verdict, shown)
            self._advance(sibling, root + 1)
        return [seq, *step.siblings]

    def _fork_siblings(self, step: SequenceStep) -> None:
        """With n > 1, fork the siblings off the computed prompt: they share every block until they
        write."""
        if step.num_draws == 1:
            return
        group, seq = step.group, step.seq
        self.manager.commit(seq, seq.num_tokens)
        step.siblings = group.fork_siblings()
        for sibling in step.siblings:
            self._outputs.add_fork(seq, sibling)
            self.scheduler.add_fork(sibling)

    def _emit(
        self, step: SequenceStep, seq: Sequence, verdict: Verdict, shown: Tensor
    ) -> list[int]:
        """Append a verdict's tokens up to the first that ends the output; return those appended.

        After an accepted draft there may be no token that the request's options allow. Then the
        next step finds the same without a draft, and ends the request as plain decoding would.
        """
        new_ids: list[int] = []
        for token_id in verdict.token_ids(step.tree):
            if token_id == NO_TOKEN:
                break
            new_ids.append(token_id)
            if self._outputs.append_token(seq, token_id):
                break
        self.stats.num_output_tokens += len(new_ids)
        if step.group.needs_logprobs and new_ids:
            places = [step.logits_indices.start + 1 + node for node in [-1, *verdict.path]]
            self.logprobs.take_output(seq, shown[places[: len(new_ids)]], new_ids)
        return new_ids

    def _move_accepted(self, seq: Sequence, path: list[int], root: int, moves: KVMoves) -> None:
        """Bring the accepted nodes' KV to the slots after the root; a chain's is there already."""
        places = [(node + 1, depth) for depth, node in enumerate(path, 1) if node + 1 != depth]
        if not places:
            return
        moves.add(
            TARGET,
            [self.manager.slot(seq, root + source) for source, _ in places],
            [self.manager.slot(seq, root + target) for _, target in places],
        )
        self.stats.num_moved_rows += len(places)

    def _move_draft_kv(
        self, seq: Sequence, proposal: Proposal, path: list[int], root: int, moves: KVMoves
    ) -> None:
        """Bring the drafters' KV of accepted nodes to those slots, and advance their progress."""
        for owner, draft_slots in proposal.draft_slots.items():
            sources, targets = [], []
            for depth, node in enumerate(path, start=1):
                offset = draft_slots[node]
                if offset is None:
                    break
                sources.append(self.manager.slot(seq, root + offset))
                targets.append(self.manager.slot(seq, root + depth))
            if sources != targets:
                moves.add(owner, sources, targets)
            self.manager.mark_draft(seq, owner, root + 1 + len(sources))

    def _count_drafts(self, steps: list[SequenceStep]) -> None:
        """Count the drafts that were verified, each for its request and for the engine."""
        for step in steps:
            proposal, verdict = step.proposal, step.verdict
            if proposal is not None and verdict is not None and proposal.num_draft_tokens > 0:
                # An output may end within the accepted path; what is behind its end is not counted.
                num_accepted = min(verdict.num_accepted, len(step.new_token_ids))
                metrics = step.group.metrics
                self.stats.record_draft(metrics, proposal.num_draft_tokens, num_accepted)

    def _advance(self, seq: Sequence, num_computed_tokens: int) -> None:
        # The last token is run again if it is the root of the next step, whatever KV it has.
        self.manager.commit(seq, min(num_computed_tokens, seq.num_tokens - 1))
        self.manager.rollback(seq)


def _note_time(group: SequenceGroup, now: float) -> None:
    if group.metrics.first_token_time is None:
        group.metrics.first_token_time = now
    if group.is_finished:
        group.metrics.finished_time = now
