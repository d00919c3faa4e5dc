"""Rolling back rejected draft tokens, as a lesson.

A step writes the KV of guesses before anybody knows whether they are right. Nothing is erased when
they are wrong: the sequence just does not advance over them, the next step writes over them, and
blocks that hold nothing but guesses go back to the pool. With block_size 4:

    the prompt t0..t4 is computed, t5 is the root, d0..d3 are guesses:

        block 0            block 1            block 2
        +----+----+----+----+----+----+----+----+----+----+----+----+
        | t0 | t1 | t2 | t3 | t4 | t5 | d0 | d1 | d2 | d3 |    |    |
        +----+----+----+----+----+----+----+----+----+----+----+----+
                              n = 5 computed

    the target accepts d0, rejects d1 and says x instead:

        +----+----+----+----+----+----+----+----+   +----+----+----+----+
        | t0 | t1 | t2 | t3 | t4 | t5 | d0 | x? |   |    free again     |
        +----+----+----+----+----+----+----+----+   +----+----+----+----+
                                        n = 7     x is the next root; its KV is not computed yet,
                                                  and will be written where d1's was
"""

import pytest
from fake_kv import TARGET, FakeKV

from folospec.core import KVCacheManager, Sequence

PROMPT = [10, 11, 12, 13, 14]
ROOT = 15
GUESSES = [20, 21, 22, 23]
BLOCK_SIZE = 4


class Step:
    """The sequence of the drawing, right after the target has run over root and guesses."""

    def __init__(self, num_blocks: int = 8, *, caching: bool = False) -> None:
        self.manager = KVCacheManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=caching)
        self.seq = Sequence("main", PROMPT)
        self.manager.admit(self.seq)
        self.manager.allocate_slots(self.seq, len(PROMPT))
        self.manager.commit(self.seq, len(PROMPT))
        self.seq.add_token_id(ROOT)
        self.manager.allocate_slots(self.seq, 1 + len(GUESSES))
        self.table_with_guesses = list(self.seq.block_table)

    def verdict(self, num_accepted: int, next_token_id: int) -> None:
        """Append what the target says, commit the KV of what it accepted, roll back the rest."""
        for token_id in [*GUESSES[:num_accepted], next_token_id]:
            self.seq.add_token_id(token_id)
        self.manager.commit(self.seq, len(PROMPT) + 1 + num_accepted)
        self.manager.rollback(self.seq)
        self.manager.check_integrity([self.seq])


@pytest.fixture
def step() -> Step:
    return Step()


def test_guesses_need_blocks_before_they_are_verified(step: Step) -> None:
    assert len(step.table_with_guesses) == 3  # 5 prompt tokens + root + 4 guesses in blocks of 4


def test_guesses_alone_change_no_token_and_no_progress(step: Step) -> None:
    assert step.seq.token_ids == [*PROMPT, ROOT]
    assert step.seq.num_computed_tokens == len(PROMPT)


def test_rollback_after_a_rejection_frees_the_block_of_guesses_alone(step: Step) -> None:
    step.verdict(num_accepted=1, next_token_id=99)
    assert step.seq.token_ids == [*PROMPT, ROOT, 20, 99]
    assert step.seq.num_computed_tokens == 7
    assert step.seq.block_table == step.table_with_guesses[:2]
    assert step.manager.num_free_blocks == 6


def test_rollback_keeps_the_block_where_the_next_token_will_live(step: Step) -> None:
    step.verdict(num_accepted=2, next_token_id=99)  # 9 tokens: the last one is token 0 of block 2
    assert step.seq.block_table == step.table_with_guesses


def test_rollback_after_full_acceptance_frees_nothing(step: Step) -> None:
    step.verdict(num_accepted=4, next_token_id=99)
    assert step.seq.num_computed_tokens == 10
    assert step.seq.block_table == step.table_with_guesses


def test_rollback_of_everything_leaves_the_plain_step(step: Step) -> None:
    step.verdict(num_accepted=0, next_token_id=99)
    assert step.seq.token_ids == [*PROMPT, ROOT, 99]
    assert step.seq.num_computed_tokens == 6
    assert step.seq.block_table == step.table_with_guesses[:2]


def test_rollback_twice_is_rollback_once(step: Step) -> None:
    step.verdict(num_accepted=0, next_token_id=99)
    table, num_free = list(step.seq.block_table), step.manager.num_free_blocks
    step.manager.rollback(step.seq)
    assert (step.seq.block_table, step.manager.num_free_blocks) == (table, num_free)


def test_the_next_step_writes_over_the_rejected_row(step: Step) -> None:
    memory = FakeKV(step.manager)
    memory.write(TARGET, step.seq, 0, [*PROMPT, ROOT, *GUESSES])
    slot_of_rejected = step.manager.slot(step.seq, 7)
    step.verdict(num_accepted=1, next_token_id=99)
    memory.check(TARGET, step.seq, step.seq.num_computed_tokens)

    step.manager.allocate_slots(step.seq, 1)
    assert step.manager.slot(step.seq, 7) == slot_of_rejected
    memory.write(TARGET, step.seq, 7, step.seq.token_ids)
    step.manager.commit(step.seq, 8)
    memory.check(TARGET, step.seq, 8)


def test_advancing_over_a_rejected_row_would_be_noticed(step: Step) -> None:
    """The control of the test above: the memory does tell a rejected row from a right one."""
    memory = FakeKV(step.manager)
    memory.write(TARGET, step.seq, 0, [*PROMPT, ROOT, *GUESSES])
    step.verdict(num_accepted=1, next_token_id=99)
    step.manager.commit(step.seq, 8)  # wrong: 99 has no KV yet, its slot holds that of guess 21
    with pytest.raises(AssertionError, match="row 7"):
        memory.check(TARGET, step.seq, 8)


def test_rejected_tokens_never_enter_the_prefix_cache() -> None:
    step = Step(caching=True)
    step.verdict(num_accepted=1, next_token_id=99)
    guessed_right = Sequence("other", [*PROMPT, ROOT, *GUESSES])
    assert step.manager.admit(guessed_right) == 4  # block 0 only, not t4 t5 d0 d1


def test_accepted_tokens_enter_the_prefix_cache_when_their_block_is_full() -> None:
    step = Step(caching=True)
    step.verdict(num_accepted=2, next_token_id=99)
    guessed_right = Sequence("other", [*PROMPT, ROOT, *GUESSES])
    assert step.manager.admit(guessed_right) == 8


def test_rollback_takes_nothing_from_a_fork_that_shares_the_block(step: Step) -> None:
    step.manager.rollback(step.seq)
    fork = step.seq.fork("fork")
    copies = step.manager.allocate_slots(step.seq, 5)
    assert [copy.src for copy in copies or []] == [fork.block_table[1]]
    step.manager.rollback(step.seq)
    assert fork.block_table == step.table_with_guesses[:2]
    step.manager.check_integrity([step.seq, fork])


def test_rollback_sets_a_drafter_back_to_the_last_token(step: Step) -> None:
    step.manager.mark_draft(step.seq, "drafter", 6)
    step.seq.draft_progress["drafter"] = 10  # it drafted over its own guesses
    step.verdict(num_accepted=1, next_token_id=99)
    assert step.seq.draft_progress["drafter"] == 8
