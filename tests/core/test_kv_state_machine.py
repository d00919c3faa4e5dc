"""Any order of admit, fork, append, draft, commit, rollback, preempt, merge and free.

The model is as simple as can be: a sequence is a list of tokens, and the KV memory holds at every
slot the tokens that its row depends on. Whatever the blocks do, each sequence must find its own
rows, and no block may be lost.
"""

from __future__ import annotations

import pytest
from fake_kv import DRAFTER, TARGET, FakeKV
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from folospec.core import BlockCopy, KVCacheManager, Sequence

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=5)  # few tokens, so prefixes are shared
PICK = st.integers(0, 99)
NUM_BLOCKS, BLOCK_SIZE = 10, 2


class KVMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.manager = KVCacheManager(NUM_BLOCKS, BLOCK_SIZE, enable_prefix_caching=True)
        self.kv = FakeKV(self.manager)
        self.sequences: list[Sequence] = []
        self.tokens: dict[str, list[int]] = {}
        self.drafts: dict[str, str] = {}
        self.num_made = 0

    def copy(self, copies: list[BlockCopy]) -> None:
        self.kv.copy(copies)

    def pick(self, pick: int) -> Sequence:
        return self.sequences[pick % len(self.sequences)]

    def new_id(self) -> str:
        self.num_made += 1
        return f"seq-{self.num_made}"

    def forget(self, seq: Sequence) -> None:
        self.sequences.remove(seq)
        self.drafts.pop(seq.seq_id, None)

    @precondition(lambda self: len(self.sequences) < 6)
    @rule(prompt=TOKENS)
    def arrive(self, prompt: list[int]) -> None:
        seq = Sequence(self.new_id(), prompt)
        self.sequences.append(seq)
        self.tokens[seq.seq_id] = list(prompt)

    @precondition(lambda self: self.sequences)
    @rule(pick=PICK, use_cache=st.booleans())
    def admit(self, pick: int, use_cache: bool) -> None:
        seq = self.pick(pick)
        if seq.kv is None:
            num_cached = self.manager.admit(seq, use_cache=use_cache)
            assert num_cached < seq.num_tokens
            assert num_cached == 0 or use_cache

    @precondition(lambda self: self.sequences)
    @rule(pick=PICK, token_id=st.integers(0, 1))
    def append(self, pick: int, token_id: int) -> None:
        seq = self.pick(pick)
        seq.add_token_id(token_id)
        self.tokens[seq.seq_id].append(token_id)

    @precondition(lambda self: self.sequences)
    @rule(
        pick=PICK, guesses=st.lists(st.integers(0, 1), max_size=4), num_accepted=st.integers(0, 4)
    )
    def step(self, pick: int, guesses: list[int], num_accepted: int) -> None:
        """Compute all that is missing and a chain of guesses; accept some of them; roll back."""
        seq = self.pick(pick)
        if seq.kv is None:
            return
        start, num_tokens = seq.num_computed_tokens, seq.num_tokens
        num_slots = num_tokens - start + len(guesses)
        before = (list(seq.block_table), self.manager.num_free_blocks)
        fits = self.manager.can_allocate(seq, num_slots)
        copies = self.manager.allocate_slots(seq, num_slots)
        assert (copies is not None) == fits
        if copies is None:
            assert (seq.block_table, self.manager.num_free_blocks) == before
            return
        self.copy(copies)
        self.kv.write(TARGET, seq, start, [*seq.token_ids, *guesses])
        accepted = guesses[:num_accepted]
        for token_id in accepted:
            seq.add_token_id(token_id)
        self.tokens[seq.seq_id] += accepted
        self.manager.commit(seq, num_tokens + len(accepted))
        self.manager.rollback(seq)
        assert len(seq.block_table) <= -(-seq.num_tokens // BLOCK_SIZE)

    @precondition(lambda self: self.sequences)
    @rule(pick=PICK, num_left=st.integers(0, 3))
    def catch_up(self, pick: int, num_left: int) -> None:
        """A drafter fills its rows of committed tokens, in blocks that may be shared."""
        seq = self.pick(pick)
        progress = seq.draft_progress.get(DRAFTER, 0)
        stop = seq.num_computed_tokens - num_left
        if seq.kv is not None and stop > progress:
            self.kv.write(DRAFTER, seq, progress, seq.token_ids[:stop])
            self.manager.mark_draft(seq, DRAFTER, stop)

    @precondition(lambda self: 0 < len(self.sequences) < 6)
    @rule(pick=PICK)
    def fork(self, pick: int) -> None:
        seq = self.pick(pick)
        num_free = self.manager.num_free_blocks
        child = seq.fork(self.new_id())
        assert self.manager.num_free_blocks == num_free
        assert child.block_table == seq.block_table
        self.sequences.append(child)
        self.tokens[child.seq_id] = list(seq.token_ids)
        self.drafts[child.seq_id] = seq.seq_id

    @precondition(lambda self: self.drafts)
    @rule(pick=PICK, num_accepted=st.integers(0, 5))
    def merge(self, pick: int, num_accepted: int) -> None:
        draft_id = sorted(self.drafts)[pick % len(self.drafts)]
        draft = next(seq for seq in self.sequences if seq.seq_id == draft_id)
        parents = [seq for seq in self.sequences if seq.seq_id == self.drafts[draft_id]]
        if not parents or parents[0].num_tokens != draft._num_forked_tokens:
            return
        original = parents[0]
        num_added = draft.num_tokens - original.num_tokens
        num_accepted = min(num_accepted, num_added)
        self.tokens[original.seq_id] += draft.token_ids[
            original.num_tokens : original.num_tokens + num_accepted
        ]
        original.merge(draft, num_accepted)
        assert draft.block_table == []
        self.forget(draft)

    @precondition(lambda self: self.sequences)
    @rule(pick=PICK)
    def preempt(self, pick: int) -> None:
        seq = self.pick(pick)
        if seq.kv is not None:
            self.manager.free(seq)

    @precondition(lambda self: self.sequences)
    @rule(pick=PICK)
    def drop(self, pick: int) -> None:
        seq = self.pick(pick)
        seq.drop()
        self.forget(seq)

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        self.manager.check_integrity(self.sequences)

    @invariant()
    def every_sequence_has_its_tokens_and_finds_its_rows(self) -> None:
        for seq in self.sequences:
            assert seq.token_ids == self.tokens[seq.seq_id]
            assert seq.token_ids == seq.prompt_token_ids + seq.output_token_ids
            self.kv.check_all(seq)

    def teardown(self) -> None:
        for seq in self.sequences:
            seq.drop()
        assert self.manager.num_free_blocks == NUM_BLOCKS


TestKVMachine = KVMachine.TestCase
TestKVMachine.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def shared_then_diverging(machine: KVMachine) -> None:
    """Two sequences that share a half-filled block each write a row of their own."""
    machine.arrive([0, 1, 0])
    machine.admit(0, use_cache=True)
    machine.step(0, [], 0)
    machine.fork(0)
    machine.append(0, 1)
    machine.append(1, 0)
    machine.step(0, [], 0)
    machine.step(1, [], 0)
    machine.every_sequence_has_its_tokens_and_finds_its_rows()


def test_the_model_is_content_with_copy_on_write() -> None:
    shared_then_diverging(KVMachine())


def test_the_model_notices_a_copy_that_was_not_made() -> None:
    class Careless(KVMachine):
        def copy(self, copies: list[BlockCopy]) -> None:
            pass

    with pytest.raises(AssertionError, match="target row 2"):
        shared_then_diverging(Careless())


def test_the_model_notices_a_write_into_a_shared_block(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = KVMachine()
    monkeypatch.setattr(machine.manager, "_make_private", lambda seq, index: None)
    with pytest.raises(AssertionError, match="target row 3"):
        shared_then_diverging(machine)
