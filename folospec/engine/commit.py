"""Make verdicts true: the only place where a step changes committed state."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from folospec.core.scheduler import Scheduler
from folospec.core.sequence import Sequence, SequenceStatus
from folospec.core.stats import EngineStats
from folospec.engine.judgement import Judgement
from folospec.engine.logprobs import LogprobsTaker
from folospec.engine.output_processor import append_token
from folospec.engine.request import Request
from folospec.engine.speculation import Speculation
from folospec.engine.telling import Observed
from folospec.sampling.sampler import NO_TOKEN
from folospec.spec.verify import Verdict
from folospec.worker.kv_cache import KVCache, PendingMoves

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
        speculation: Speculation,
        target_kv: KVCache,
        stats: EngineStats,
        logprobs: LogprobsTaker,
        fail: Callable[[Request, Exception], None],
    ) -> None:
        self._fail = fail
        self.scheduler, self.manager = scheduler, scheduler.manager
        self.speculation, self.target_kv = speculation, target_kv
        self.stats, self.logprobs = stats, logprobs
        self._moves = PendingMoves()

    def commit(
        self, judgements: list[Judgement], shown: Tensor
    ) -> tuple[list[Request], list[Observed]]:
        """Commit a step.

        Args:
            judgements: one for each sequence of the step.
            shown: float [num_rows, vocab_size], what logprobs are taken from; `Judgement.rows` are
                its indices.

        Returns:
            the requests that got tokens, and what the drafter is to be told of each sequence. That
            is the caller's to do, when everything here is done: a drafter may fail.
        """
        observed: list[Observed] = []
        emitted: list[tuple[Request, Sequence]] = []
        for judgement in judgements:
            request = judgement.request
            if request.error is not None:
                continue  # A sibling has failed.
            try:
                sequences = self._commit(judgement, shown, observed)
            except Exception as error:
                self._fail(request, error)
            else:
                emitted.extend((request, seq) for seq in sequences)
        self._moves.make()
        emitted = [(request, seq) for request, seq in emitted if request.error is None]
        observed = [seen for seen in observed if seen.request.error is None]
        for request, seq in emitted:
            reason = request.outputs[seq.seq_id].finish_reason
            if reason is not None:
                self.scheduler.finish(seq, _STATUS[reason])
        requests = {id(request): request for request, _ in emitted}
        now = time.monotonic()
        for request in requests.values():
            _note_time(request, now)
        self.speculation.count(observed)
        return list(requests.values()), observed

    def _commit(
        self, judgement: Judgement, shown: Tensor, observed: list[Observed]
    ) -> list[Sequence]:
        """Commit one sequence's part; return the sequences that got tokens."""
        if not judgement.verdicts:
            self.manager.commit(judgement.seq, judgement.start + judgement.num_tokens)
            observed.append(_observed(judgement, [], [], []))
            return []
        seq, verdict, root = judgement.seq, judgement.verdicts[0], judgement.seq.num_tokens - 1
        siblings = self._fork_siblings(judgement)
        new_ids = self._emit(judgement, seq, verdict, shown)
        path = verdict.path[: len(new_ids)]
        if judgement.proposal is not None:
            self._move_accepted(seq, path, root)
            self.speculation.commit_kv(seq, judgement.proposal, path, root, self._moves)
        observed.append(_observed(judgement, path, new_ids, siblings))
        self._advance(seq, root + 1 + len(path))
        for sibling, sibling_verdict in zip(siblings, judgement.verdicts[1:], strict=True):
            self._emit(judgement, sibling, sibling_verdict, shown)
            self._advance(sibling, root + 1)
        return [seq, *siblings]

    def _fork_siblings(self, judgement: Judgement) -> list[Sequence]:
        """With n > 1, fork the siblings off the computed prompt: they share every block until they
        write."""
        if judgement.num_draws == 1:
            return []
        request, seq = judgement.request, judgement.seq
        self.manager.commit(seq, seq.num_tokens)
        siblings = request.group.fork_siblings()
        for sibling in siblings:
            request.outputs[sibling.seq_id] = request.outputs[seq.seq_id].fork()
            self.scheduler.add_fork(sibling)
        return siblings

    def _emit(
        self, judgement: Judgement, seq: Sequence, verdict: Verdict, shown: Tensor
    ) -> list[int]:
        """Append a verdict's tokens up to the first that ends the output; return those appended.

        After an accepted draft there may be no token that the request's options allow. Then the
        next step finds the same without a draft, and ends the request as plain decoding would.
        """
        request = judgement.request
        new_ids: list[int] = []
        for token_id in verdict.token_ids(judgement.tree):
            if token_id == NO_TOKEN:
                break
            new_ids.append(token_id)
            if append_token(request, seq, token_id):
                break
        self.stats.num_output_tokens += len(new_ids)
        if request.needs_logprobs and new_ids:
            places = [judgement.rows.start + 1 + node for node in [-1, *verdict.path]]
            self.logprobs.take_output(request, seq, shown[places[: len(new_ids)]], new_ids)
        return new_ids

    def _move_accepted(self, seq: Sequence, path: list[int], root: int) -> None:
        """Bring the accepted nodes' KV to the slots after the root; a chain's is there already."""
        moves = [(node + 1, depth) for depth, node in enumerate(path, start=1) if node + 1 != depth]
        if not moves:
            return
        self._moves.add(
            self.target_kv,
            [self.manager.slot(seq, root + source) for source, _ in moves],
            [self.manager.slot(seq, root + target) for _, target in moves],
        )
        self.stats.num_moved_rows += len(moves)

    def _advance(self, seq: Sequence, num_computed_tokens: int) -> None:
        # The last token is run again if it is the root of the next step, whatever KV it has.
        self.manager.commit(seq, min(num_computed_tokens, seq.num_tokens - 1))
        self.manager.rollback(seq)


def _note_time(request: Request, now: float) -> None:
    metrics = request.group.metrics
    if metrics.first_token_time is None:
        metrics.first_token_time = now
    if request.group.is_finished:
        metrics.finished_time = now


def _observed(
    judgement: Judgement, path: list[int], new_token_ids: list[int], siblings: list[Sequence]
) -> Observed:
    end = judgement.first_row + judgement.num_tokens
    return Observed(
        judgement.request,
        judgement.seq,
        judgement.proposal,
        judgement.verdicts[0] if judgement.verdicts else None,
        new_token_ids,
        start=judgement.start,
        rows=[*range(judgement.first_row, end), *(end + node for node in path)],
        judged_rows=judgement.rows,
        siblings=siblings,
    )
