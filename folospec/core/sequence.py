"""Defines a sequence: its tokens, how far their KV is computed, and the blocks that hold it.

A request is a group of sequences. They work on tokens alone; blocks come in when a
`KVCacheManager` admits one.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

from folospec.core.prefix_cache import hash_block
from folospec.outputs import RequestMetrics
from folospec.sampling_params import SamplingParams

if TYPE_CHECKING:
    from folospec.core.kv_cache_manager import KVCacheManager


class SequenceStatus(Enum):
    """Where a sequence is in its life. PREEMPTED waits with its tokens, but without blocks."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED_STOPPED = "stop"
    FINISHED_LENGTH = "length"
    FINISHED_ABORTED = "abort"
    FINISHED_DROPPED = "dropped"

    def __init__(self, value: str) -> None:
        self.is_finished = value in ("stop", "length", "abort", "dropped")


class Sequence:
    """Tokens that grow at the end, and the KV that catches up with them.

    `num_computed_tokens` of the `num_tokens` tokens have KV, in the blocks of `block_table`: token
    i at slot `block_table[i // block_size] * block_size + i % block_size`. `draft_progress` says
    the same for each drafter that keeps KV of its own in those blocks. `token_ids` is prompt +
    output, kept as tokens arrive; treat the lists as read-only.

    Guessing ahead, by hand (fork, draft, verify, merge)::

        original = Sequence(seq_id="main", prompt_token_ids=[1, 2, 3])

        draft = original.fork("draft")         # 1. a sequence of its own, sharing every block
        draft.add_token_id(100)                # 2. append guesses: only the fork changes
        draft.add_token_id(101)
        draft.add_token_id(102)
        verdict = [True, True, False]          # 3. ask the target; nothing counts after a False
        original.merge(draft, num_accepted=2)  # 4. original: [1, 2, 3, 100, 101]; the fork ends

    `draft.drop()` instead of step 4 leaves the original as it was. Without a cache manager this
    moves tokens alone. Once the original is admitted (`manager.admit(original)`), the fork holds
    the same blocks, counted once more; its first write into a shared block
    (`manager.allocate_slots(draft, n)`) gives it a block of its own and returns the copy to make;
    and `merge` hands the fork's blocks over, frees those past the last token, and leaves every
    block accounted for.

    Raises:
        ValueError: the prompt is empty or has a negative token id.
    """

    def __init__(self, seq_id: str, prompt_token_ids: list[int], *, sample_index: int = 0) -> None:
        if len(prompt_token_ids) == 0:
            raise ValueError(f"prompt_token_ids of sequence {seq_id!r} must not be empty")
        if min(prompt_token_ids) < 0:
            raise ValueError(f"prompt_token_ids must be at least 0, got {min(prompt_token_ids)}")
        self.seq_id = seq_id
        self.sample_index = sample_index
        self.prompt_token_ids = list(prompt_token_ids)
        self.output_token_ids: list[int] = []
        self.token_ids = list(prompt_token_ids)
        self.num_computed_tokens = 0
        self.block_table: list[int] = []
        self.draft_progress: dict[str, int] = {}
        self.status = SequenceStatus.WAITING
        self.kv: KVCacheManager | None = None
        self.group: SequenceGroup | None = None
        self._block_hashes: list[bytes] = []
        self._hashed_block_size = 0
        self._origin: Sequence | None = None
        self._num_forked_tokens = 0
        # Ids in use by this sequence and the forks around it; one set for all of them.
        self._family_ids = {seq_id}

    def __repr__(self) -> str:
        return (
            f"Sequence({self.seq_id!r}, {self.status.name}, num_tokens={self.num_tokens}, "
            f"num_computed_tokens={self.num_computed_tokens}, block_table={self.block_table})"
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)

    @property
    def arrival_key(self) -> tuple[int, int]:
        """The ordinal of the request and the index within it; the largest is the youngest."""
        return (self.group.arrival if self.group is not None else 0, self.sample_index)

    def add_token_id(self, token_id: int) -> None:
        """Append one committed token; its KV is computed in a later step.

        Raises:
            ValueError: the token id is negative, or the sequence is finished.
        """
        if token_id < 0:
            raise ValueError(f"token_id must be at least 0, got {token_id}")
        self._check_unfinished("add a token to")
        self.output_token_ids.append(token_id)
        self.token_ids.append(token_id)

    def fork(self, new_seq_id: str, sample_index: int | None = None) -> Sequence:
        """A sequence with the same tokens and progress, which shares every block with this one.

        It may later be merged into this sequence, dropped, or run on its own
        (`Scheduler.add_fork`); for that give it a `sample_index` of its own, or it draws the same
        tokens.

        Raises:
            ValueError: this sequence is finished, or `new_seq_id` is in use by it, its forks or its
                request.
        """
        self._check_unfinished("fork")
        if new_seq_id in self._family_ids:
            raise ValueError(
                f"new_seq_id must not be in use, got {new_seq_id!r} of {sorted(self._family_ids)}"
            )
        index = self.sample_index if sample_index is None else sample_index
        child = Sequence(new_seq_id, self.prompt_token_ids, sample_index=index)
        child.output_token_ids = list(self.output_token_ids)
        child.token_ids = list(self.token_ids)
        child.status = self.status
        child.group = self.group
        child._block_hashes = list(self._block_hashes)
        child._hashed_block_size = self._hashed_block_size
        child._origin = self
        child._num_forked_tokens = self.num_tokens
        child._family_ids = self._family_ids
        child._family_ids.add(new_seq_id)
        if self.kv is not None:
            self.kv.fork(self, child)
        return child

    def merge(self, draft: Sequence, num_accepted: int) -> None:
        """Append the first `num_accepted` tokens that `draft` added since its fork; the draft ends.

        With blocks: this sequence takes the draft's over and releases its own, and what lies past
        the last token is freed. Then `num_computed_tokens` is the draft's, as far as its tokens
        were accepted. Only if the draft's KV is behind do this sequence's own blocks stay; a
        sequence without blocks takes the tokens alone.

        Raises:
            ValueError: `draft` is not a fork of this sequence, one of the two is finished, this
                sequence has had tokens since the fork, `num_accepted` is out of range, or the two
                live in different cache managers. Nothing is changed then.
        """
        self._check_mergeable(draft, num_accepted)
        start = draft._num_forked_tokens
        for token_id in draft.token_ids[start : start + num_accepted]:
            self.add_token_id(token_id)
        if self.kv is not None and draft.kv is not None:
            self.kv.take_over(self, draft)
        draft.drop()

    def drop(self) -> None:
        """End this sequence and release its blocks; one that is finished stays as it is."""
        if self.status.is_finished:
            return
        if self.kv is not None:
            self.kv.free(self)
        self.status = SequenceStatus.FINISHED_DROPPED
        self._family_ids.discard(self.seq_id)

    def block_hashes(self, block_size: int, num_blocks: int) -> list[bytes]:
        """The chained hashes of the first `num_blocks` blocks of tokens; each is computed once."""
        if block_size != self._hashed_block_size:
            self._hashed_block_size, self._block_hashes = block_size, []
        hashes = self._block_hashes
        for i in range(len(hashes), num_blocks):
            tokens = self.token_ids[i * block_size : (i + 1) * block_size]
            hashes.append(hash_block(hashes[-1] if hashes else None, tokens))
        return hashes[:num_blocks] if len(hashes) > num_blocks else hashes

    def _check_mergeable(self, draft: Sequence, num_accepted: int) -> None:
        if draft._origin is not self:
            raise ValueError(f"sequence {draft.seq_id!r} is not a fork of {self.seq_id!r}")
        self._check_unfinished("merge into")
        draft._check_unfinished("merge")
        start = draft._num_forked_tokens
        if self.num_tokens != start:
            raise ValueError(
                f"sequence {self.seq_id!r} has {self.num_tokens} tokens, "
                f"but had {start} when {draft.seq_id!r} was forked"
            )
        if not 0 <= num_accepted <= draft.num_tokens - start:
            raise ValueError(
                f"num_accepted must be in [0, {draft.num_tokens - start}], got {num_accepted}"
            )
        if self.kv is not None and draft.kv is not None and self.kv is not draft.kv:
            raise ValueError(
                f"sequences {self.seq_id!r} and {draft.seq_id!r} live in different cache managers"
            )

    def _check_unfinished(self, verb: str) -> None:
        if self.status.is_finished:
            raise ValueError(
                f"cannot {verb} sequence {self.seq_id!r}: its status is {self.status.name}"
            )


class SequenceGroup:
    """One request: its sequences, what was asked for, and what it has cost so far.

    It starts with one sequence, `{request_id}-0`. When the prompt is computed, `fork_siblings`
    makes the others that `n` or `best_of` ask for; they share the prompt's blocks. What is fixed at
    admission is here; text and logprobs are in the engine's output processor.

    Args:
        arrival: the request's ordinal.
        prompt: the prompt's text, where it was given as text.
        seed: of the request's noise.
        max_num_tokens: most tokens of a sequence, prompt and output; None for no limit.
        eos_token_ids: EOS ids that end the output; empty with `ignore_eos`.
        prediction_token_ids: the tokens of `params.prediction`.
        sampling: what the sampling pipeline derives from `params`; nothing here looks into it.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        arrival: int,
        prompt: str | None = None,
        seed: int = 0,
        max_num_tokens: int | None = None,
        eos_token_ids: frozenset[int] = frozenset(),
        prediction_token_ids: list[int] | None = None,
        sampling: Any = None,
    ) -> None:
        self.request_id = request_id
        self.params, self.sampling = params, sampling
        self.arrival, self.seed = arrival, seed
        self.prompt = prompt
        self.max_num_tokens = max_num_tokens
        self.eos_token_ids = eos_token_ids
        self.needs_logprobs = params.logprobs is not None or params.num_sequences > params.n
        """Whether the logprobs of output tokens are computed: when asked for, and to choose among
        `best_of`."""
        self.draft_params = params.detached()
        """What drafters are given: their own copy."""
        self.prediction_token_ids = prediction_token_ids or []
        self.error: str | None = None
        """What has ended the request, where it did not end by itself."""
        self.metrics = RequestMetrics()
        first = Sequence(f"{request_id}-0", prompt_token_ids)
        first.group = self
        self.sequences = [first]

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.sequences[0].prompt_token_ids

    def room(self, seq: Sequence) -> int:
        """How many tokens one of the sequences may still generate.

        Raises:
            ValueError: there is no limit.
        """
        if self.max_num_tokens is None:
            raise ValueError(f"request {self.request_id!r} has no max_num_tokens")
        return self.max_num_tokens - seq.num_tokens

    @property
    def num_sequences_wanted(self) -> int:
        return self.params.num_sequences

    @property
    def num_pending_siblings(self) -> int:
        """Sequences that are still to be forked from the first one."""
        return max(0, self.num_sequences_wanted - len(self.sequences))

    @property
    def is_finished(self) -> bool:
        return all(seq.status.is_finished for seq in self.sequences)

    def add_fork(self, seq: Sequence) -> None:
        """Make a fork of one of the sequences a sequence of the request."""
        if any(seq.seq_id == other.seq_id for other in self.sequences):
            raise ValueError(f"request {self.request_id!r} has a sequence {seq.seq_id!r} already")
        seq.group = self
        self.sequences.append(seq)

    def fork_siblings(self) -> list[Sequence]:
        """Fork the missing siblings, with sample indices 1, 2, ...; give each its first token next.

        Raises:
            ValueError: the first sequence has output already, or KV for a part of the prompt only.
        """
        first = self.sequences[0]
        if first.num_output_tokens > 0:
            raise ValueError(
                f"siblings are forked before the first output token, {first!r} has output"
            )
        if first.kv is not None and first.num_computed_tokens < first.num_prompt_tokens:
            raise ValueError(
                f"siblings are forked when the prompt is computed, {first!r} is not there yet"
            )
        siblings = []
        for index in range(len(self.sequences), self.num_sequences_wanted):
            siblings.append(first.fork(f"{self.request_id}-{index}", sample_index=index))
            self.add_fork(siblings[-1])
        return siblings
