import pytest
from fake_kv import computed

from folospec.core import BlockCopy, KVCacheManager, Sequence

BLOCK_SIZE = 4


def make_manager(num_blocks: int = 8, *, caching: bool = False) -> KVCacheManager:
    return KVCacheManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=caching)


def cached_then_freed(manager: KVCacheManager, prompt: list[int], owner: str | None = None) -> None:
    seq = computed(manager, prompt, "first")
    if owner is not None:
        manager.mark_draft(seq, owner, len(prompt))
    manager.free(seq)


# Slots and copy-on-write ----------------------------------------------------------------------


def test_slot_is_block_times_size_plus_offset() -> None:
    manager = make_manager()
    seq = computed(manager, list(range(6)))
    seq.block_table[:] = [5, 2]
    assert manager.slot(seq, 5) == 2 * BLOCK_SIZE + 1
    assert manager.slots(seq, 2, 6) == [22, 23, 8, 9]


def test_allocate_takes_only_blocks_that_are_missing() -> None:
    manager = make_manager()
    seq = computed(manager, [1, 2, 3])
    assert manager.num_blocks_needed(seq, 1) == 0
    assert manager.num_blocks_needed(seq, 2) == 1
    assert manager.num_blocks_needed(seq, 6) == 2
    assert manager.allocate_slots(seq, 6) == []
    assert len(seq.block_table) == 3


def test_allocate_of_no_slots_changes_nothing() -> None:
    manager = make_manager()
    seq = computed(manager, [1, 2, 3])
    fork = seq.fork("fork")
    assert manager.allocate_slots(fork, 0) == []
    assert fork.block_table == seq.block_table


def test_allocate_without_enough_blocks_changes_nothing() -> None:
    manager = make_manager(num_blocks=3)
    seq = computed(manager, [1, 2, 3])
    fork = seq.fork("fork")
    table = list(fork.block_table)
    assert manager.allocate_slots(fork, 10) is None  # a copy and three new blocks
    assert fork.block_table == table
    manager.check_integrity([seq, fork])
    assert manager.num_free_blocks == 2


def test_first_write_to_a_shared_block_is_a_copy_and_the_last_holder_needs_none() -> None:
    manager = make_manager()
    seq = computed(manager, [1, 2, 3])
    fork = seq.fork("fork")
    shared = seq.block_table[0]
    copies = manager.allocate_slots(fork, 1)
    assert copies == [BlockCopy(shared, fork.block_table[0])]
    assert manager.allocate_slots(seq, 1) == []
    assert seq.block_table == [shared]
    manager.check_integrity([seq, fork])


def test_a_shared_block_without_computed_rows_is_replaced_without_a_copy() -> None:
    manager = make_manager()
    seq = computed(manager, [1, 2, 3, 4])
    manager.allocate_slots(seq, 1)
    fork = seq.fork("fork")
    assert manager.allocate_slots(fork, 1) == []
    assert fork.block_table[0] == seq.block_table[0]
    assert fork.block_table[1] != seq.block_table[1]
    manager.check_integrity([seq, fork])


def test_a_shared_block_that_only_a_drafter_has_filled_is_copied() -> None:
    manager = make_manager()
    seq = computed(manager, [1, 2, 3, 4])
    seq.add_token_id(5)
    manager.allocate_slots(seq, 1)
    manager.mark_draft(seq, "drafter", 5)
    fork = seq.fork("fork")
    copies = manager.allocate_slots(fork, 1)
    assert copies == [BlockCopy(seq.block_table[1], fork.block_table[1])]


def test_full_shared_blocks_stay_shared() -> None:
    manager = make_manager()
    seq = computed(manager, list(range(9)))
    fork = seq.fork("fork")
    manager.allocate_slots(fork, 3)
    assert fork.block_table[:2] == seq.block_table[:2]
    assert fork.block_table[2] != seq.block_table[2]


def test_writing_into_a_cached_block_takes_it_out_of_the_cache() -> None:
    manager = make_manager(caching=True)
    original = computed(manager, [1, 2])
    draft = original.fork("draft")
    draft.add_token_id(3)
    draft.add_token_id(4)
    manager.allocate_slots(draft, 2)
    manager.commit(draft, 4)
    original.merge(draft, num_accepted=1)  # [1, 2, 3], in a block cached as [1, 2, 3, 4]
    (block,) = manager.blocks(original)
    assert block.block_hash is not None
    original.add_token_id(9)
    manager.allocate_slots(original, 1)
    assert block.block_hash is None
    assert manager.cached_blocks(Sequence("other", [1, 2, 3, 4, 5])) == []
    manager.commit(original, 4)
    assert manager.cached_blocks(Sequence("other", [1, 2, 3, 9, 5])) == [block]
    manager.check_integrity([original])


# Prefix cache ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_tokens", "num_cached"), [(4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (20, 12)]
)
def test_a_prefix_hit_leaves_at_least_one_token(num_tokens: int, num_cached: int) -> None:
    manager = make_manager(num_blocks=16, caching=True)
    cached_then_freed(manager, list(range(12)))
    seq = Sequence("second", list(range(num_tokens)))
    assert manager.admit(seq) == num_cached == seq.num_computed_tokens
    assert len(seq.block_table) == num_cached // BLOCK_SIZE
    manager.check_integrity([seq])


def test_a_prefix_hit_ends_at_the_first_other_token() -> None:
    manager = make_manager(caching=True)
    cached_then_freed(manager, [1, 2, 3, 4, 5, 6, 7, 8])
    assert manager.admit(Sequence("second", [1, 2, 3, 4, 5, 0, 7, 8, 9])) == 4


def test_use_cache_off_and_caching_off_start_from_nothing() -> None:
    manager = make_manager(caching=True)
    cached_then_freed(manager, list(range(8)))
    assert manager.admit(Sequence("second", list(range(9))), use_cache=False) == 0
    plain = make_manager()
    cached_then_freed(plain, list(range(8)))
    assert plain.admit(Sequence("second", list(range(9)))) == 0


def test_a_running_sequence_shares_its_full_blocks_with_a_new_one() -> None:
    manager = make_manager(caching=True)
    first = computed(manager, list(range(9)))
    second = Sequence("second", list(range(9)))
    manager.admit(second)
    assert second.block_table == first.block_table[:2]
    manager.check_integrity([first, second])


def test_a_block_is_cached_only_when_full() -> None:
    manager = make_manager(caching=True)
    first = computed(manager, list(range(8)), num_tokens=7)
    assert len(manager.cached_blocks(Sequence("second", list(range(9))))) == 1
    manager.allocate_slots(first, 1)
    manager.commit(first, 8)
    assert len(manager.cached_blocks(Sequence("second", list(range(9))))) == 2


def test_the_beginning_of_a_freed_prompt_outlives_its_end() -> None:
    manager = make_manager(num_blocks=4, caching=True)
    cached_then_freed(manager, list(range(16)))
    other = computed(manager, [50] * 8, "other")
    assert len(manager.cached_blocks(Sequence("again", list(range(17))))) == 2
    manager.check_integrity([other])


def test_admission_counts_hits_that_are_not_free_any_more() -> None:
    manager = make_manager(num_blocks=3, caching=True)
    cached_then_freed(manager, list(range(8)))
    assert manager.can_admit(Sequence("fits", list(range(12))))
    assert not manager.can_admit(Sequence("does not", list(range(13))))


def test_hits_are_counted_in_tokens() -> None:
    manager = make_manager(caching=True)
    cached_then_freed(manager, list(range(8)))
    manager.admit(Sequence("second", list(range(9))))
    assert (manager.stats.queries, manager.stats.hits) == (17, 8)


# Drafters -------------------------------------------------------------------------------------


def test_a_prefix_hit_tells_how_far_each_drafter_has_filled_it() -> None:
    manager = make_manager(num_blocks=16, caching=True)
    first = computed(manager, list(range(12)), "first")
    manager.mark_draft(first, "far", 12)
    manager.mark_draft(first, "near", 7)
    manager.free(first)
    second = Sequence("second", list(range(13)))
    assert manager.admit(second) == 12
    assert second.draft_progress == {"far": 12, "near": 4}


def test_a_drafter_that_skipped_a_block_starts_before_it() -> None:
    manager = make_manager(caching=True)
    first = computed(manager, list(range(8)), "first")
    manager.mark_draft(first, "drafter", 8)
    manager.blocks(first)[0].owners.clear()
    manager.free(first)
    second = Sequence("second", list(range(9)))
    manager.admit(second)
    assert second.draft_progress == {}


def test_a_drafter_may_fill_shared_blocks_later() -> None:
    manager = make_manager(caching=True)
    cached_then_freed(manager, list(range(8)))
    second = Sequence("second", list(range(9)))
    manager.admit(second)
    assert second.draft_progress == {}
    manager.mark_draft(second, "drafter", 8)
    third = Sequence("third", list(range(9)))
    manager.admit(third)
    assert third.draft_progress == {"drafter": 8}


def test_a_drafter_ahead_of_the_target_keeps_its_block() -> None:
    """It fills the last row of a block in the step in which the target does, but before it."""
    manager = make_manager(caching=True)
    seq = computed(manager, [1, 2, 3, 4], num_tokens=3)
    manager.allocate_slots(seq, 1)
    manager.mark_draft(seq, "drafter", 4)
    manager.allocate_slots(seq, 1)
    manager.commit(seq, 4)
    manager.free(seq)
    again = Sequence("again", [1, 2, 3, 4, 5])
    manager.admit(again)
    assert again.draft_progress == {"drafter": 4}


def test_a_rewritten_block_loses_drafters_that_are_not_past_it() -> None:
    manager = make_manager(caching=True)
    original = computed(manager, [1, 2])
    draft = original.fork("draft")
    draft.add_token_id(3)
    draft.add_token_id(4)
    manager.allocate_slots(draft, 2)
    manager.mark_draft(draft, "drafter", 4)
    manager.commit(draft, 4)
    original.merge(draft, num_accepted=1)
    assert original.draft_progress == {"drafter": 3}
    original.add_token_id(9)
    manager.allocate_slots(original, 1)
    assert manager.blocks(original)[0].owners == set()


# Bad calls ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_computed_tokens", [1, 5])
def test_commit_out_of_range_is_refused(num_computed_tokens: int) -> None:
    manager = make_manager()
    seq = computed(manager, [1, 2, 3, 4], num_tokens=2)
    with pytest.raises(ValueError, match=rf"in \[2, 4\], got {num_computed_tokens}"):
        manager.commit(seq, num_computed_tokens)
    assert seq.num_computed_tokens == 2


def test_commit_past_the_last_slot_is_refused() -> None:
    manager = make_manager()
    seq = computed(manager, list(range(9)), num_tokens=4)
    with pytest.raises(ValueError, match=r"in \[4, 4\], got 5"):
        manager.commit(seq, 5)


def test_marking_more_draft_tokens_than_there_are_is_refused() -> None:
    manager = make_manager()
    seq = computed(manager, [1, 2, 3])
    with pytest.raises(ValueError, match=r"in \[0, 3\], got 4"):
        manager.mark_draft(seq, "drafter", 4)


def test_admitting_twice_is_refused() -> None:
    manager = make_manager()
    seq = computed(manager, [1, 2, 3])
    with pytest.raises(ValueError, match="without blocks can be admitted"):
        manager.admit(seq)


def test_a_manager_without_blocks_or_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="block_size must be an integer of at least 1, got 0"):
        KVCacheManager(4, 0)
    with pytest.raises(ValueError, match="num_blocks must be an integer of at least 1, got 0"):
        KVCacheManager(0, 4)


# Negative controls of check_integrity ---------------------------------------------------------


def healthy() -> tuple[KVCacheManager, list[Sequence]]:
    manager = make_manager(caching=True)
    seq = computed(manager, list(range(9)))
    fork = seq.fork("fork")
    manager.allocate_slots(fork, 1)
    manager.check_integrity([seq, fork])
    return manager, [seq, fork]


def test_integrity_catches_a_sequence_that_was_forgotten() -> None:
    manager, sequences = healthy()
    with pytest.raises(AssertionError, match="block tables hold it"):
        manager.check_integrity(sequences[:1])


def test_integrity_catches_a_lost_block() -> None:
    manager, sequences = healthy()
    sequences[0].block_table.pop()
    sequences[0].num_computed_tokens = 8
    with pytest.raises(AssertionError, match="has ref_cnt 1, but 0 block tables hold it"):
        manager.check_integrity(sequences)


def test_integrity_catches_a_block_twice_in_one_table() -> None:
    manager, sequences = healthy()
    sequences[0].block_table[1] = sequences[0].block_table[0]
    with pytest.raises(AssertionError, match="twice in one block table"):
        manager.check_integrity(sequences)


def test_integrity_catches_a_reference_too_many() -> None:
    manager, sequences = healthy()
    manager.blocks(sequences[0])[0].ref_cnt += 1
    with pytest.raises(AssertionError, match="has ref_cnt 3, but 2 block tables"):
        manager.check_integrity(sequences)


def test_integrity_catches_a_held_block_in_the_free_list() -> None:
    manager, sequences = healthy()
    manager.blocks(sequences[0])[2].ref_cnt = 0
    with pytest.raises(AssertionError, match="missing from the free list"):
        manager.check_integrity(sequences)


def test_integrity_catches_a_block_cached_under_other_tokens() -> None:
    manager, sequences = healthy()
    first, second = manager.blocks(sequences[0])[:2]
    first.block_hash, second.block_hash = second.block_hash, first.block_hash
    with pytest.raises(AssertionError, match="cache"):
        manager.check_integrity(sequences)


def test_integrity_catches_a_cached_block_with_wrong_contents() -> None:
    manager, sequences = healthy()
    sequences[0].token_ids[0] = 77
    sequences[0]._block_hashes.clear()
    with pytest.raises(AssertionError, match="cached under other tokens"):
        manager.check_integrity(sequences)


def test_integrity_catches_progress_without_slots() -> None:
    manager, sequences = healthy()
    sequences[0].num_computed_tokens = 10
    with pytest.raises(AssertionError, match="10 computed tokens are more"):
        manager.check_integrity(sequences)


def test_integrity_catches_a_drafters_progress_without_tokens() -> None:
    manager, sequences = healthy()
    sequences[0].draft_progress["drafter"] = 11
    with pytest.raises(AssertionError, match="11 computed tokens are more"):
        manager.check_integrity(sequences)
