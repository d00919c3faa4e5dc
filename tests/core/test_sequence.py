import pytest
from fake_kv import computed

from folospec.core import KVCacheManager, Sequence, SequenceGroup, SequenceStatus
from folospec.sampling_params import SamplingParams


def drafted(original: Sequence, *token_ids: int) -> Sequence:
    draft = original.fork("draft")
    for token_id in token_ids:
        draft.add_token_id(token_id)
    return draft


@pytest.fixture
def original() -> Sequence:
    return Sequence(seq_id="main", prompt_token_ids=[1, 2, 3])


@pytest.fixture
def manager() -> KVCacheManager:
    return KVCacheManager(num_blocks=8, block_size=4)


def test_tokens_are_prompt_then_output(original: Sequence) -> None:
    original.add_token_id(7)
    assert original.token_ids == [1, 2, 3, 7]
    assert (original.num_prompt_tokens, original.num_output_tokens, original.num_tokens) == (
        3,
        1,
        4,
    )


def test_sequence_does_not_share_the_callers_list() -> None:
    prompt = [1, 2, 3]
    seq = Sequence("main", prompt)
    prompt.append(4)
    assert seq.token_ids == [1, 2, 3]


def test_tokens_of_a_fork_leave_the_original_alone(original: Sequence) -> None:
    drafted(original, 100, 101)
    assert original.token_ids == [1, 2, 3]
    assert original.num_output_tokens == 0


def test_merge_takes_the_accepted_tokens(original: Sequence) -> None:
    draft = drafted(original, 100, 101, 102)
    original.merge(draft, num_accepted=2)
    assert original.output_token_ids == [100, 101]
    assert draft.status is SequenceStatus.FINISHED_DROPPED


def test_drop_leaves_the_original_as_it_was(original: Sequence) -> None:
    draft = drafted(original, 100)
    draft.drop()
    assert original.token_ids == [1, 2, 3]
    assert draft.status is SequenceStatus.FINISHED_DROPPED


def test_the_id_of_a_merged_fork_may_be_used_again(original: Sequence) -> None:
    for round_number in range(3):
        original.merge(drafted(original, 100), num_accepted=1)
        assert original.num_output_tokens == round_number + 1


def test_forks_of_forks_merge_step_by_step(original: Sequence) -> None:
    draft = drafted(original, 100)
    deeper = draft.fork("deeper")
    deeper.add_token_id(101)
    draft.merge(deeper, num_accepted=1)
    original.merge(draft, num_accepted=2)
    assert original.output_token_ids == [100, 101]


def test_merge_of_an_admitted_fork_takes_its_blocks_over(
    manager: KVCacheManager,
) -> None:
    original = computed(manager, [1, 2, 3])
    draft = drafted(original, 100, 101, 102)
    assert draft.block_table == original.block_table
    (copy,) = manager.allocate_slots(draft, 3) or []
    assert (copy.src, copy.dst) == (original.block_table[0], draft.block_table[0])
    manager.commit(draft, 6)
    blocks = list(draft.block_table)

    original.merge(draft, num_accepted=2)
    assert original.block_table == blocks
    assert original.num_computed_tokens == 5
    assert draft.block_table == []
    manager.check_integrity([original])
    assert manager.num_free_blocks == 6


def test_merge_frees_blocks_past_the_last_accepted_token(manager: KVCacheManager) -> None:
    original = computed(manager, [1, 2, 3])
    draft = drafted(original, 100, 101, 102)
    manager.allocate_slots(draft, 3)
    manager.commit(draft, 6)
    original.merge(draft, num_accepted=1)
    assert original.num_computed_tokens == original.num_tokens == 4
    assert len(original.block_table) == 1
    manager.check_integrity([original])


def test_merge_keeps_own_blocks_when_the_drafts_kv_is_behind(manager: KVCacheManager) -> None:
    original = computed(manager, [1, 2, 3, 4, 5], num_tokens=2)
    draft = drafted(original, 100)
    manager.allocate_slots(original, 3)
    manager.commit(original, 5)
    own = list(original.block_table)
    original.merge(draft, num_accepted=1)
    assert original.block_table == own
    assert original.num_computed_tokens == 5
    manager.check_integrity([original])


def test_merge_into_a_preempted_original_takes_tokens_alone(manager: KVCacheManager) -> None:
    original = computed(manager, [1, 2, 3])
    draft = drafted(original, 100)
    manager.free(original)
    original.merge(draft, num_accepted=1)
    assert original.token_ids == [1, 2, 3, 100]
    assert original.num_computed_tokens == 0
    manager.check_integrity([original])
    assert manager.num_free_blocks == manager.num_blocks


def test_drop_of_an_admitted_fork_releases_its_blocks(manager: KVCacheManager) -> None:
    original = computed(manager, [1, 2, 3])
    draft = drafted(original, 100)
    manager.allocate_slots(draft, 1)
    draft.drop()
    manager.check_integrity([original])
    assert manager.num_free_blocks == 7


def test_fork_copies_the_drafters_progress(manager: KVCacheManager) -> None:
    original = computed(manager, [1, 2, 3])
    manager.mark_draft(original, "drafter", 2)
    draft = original.fork("draft")
    assert draft.draft_progress == {"drafter": 2}
    manager.mark_draft(draft, "drafter", 3)
    assert original.draft_progress == {"drafter": 2}


def test_merge_of_a_stranger_is_refused(original: Sequence) -> None:
    with pytest.raises(ValueError, match="'other' is not a fork of 'main'"):
        original.merge(Sequence("other", [1, 2, 3]), num_accepted=0)


@pytest.mark.parametrize("num_accepted", [-1, 2])
def test_merge_of_more_than_was_drafted_is_refused(original: Sequence, num_accepted: int) -> None:
    draft = drafted(original, 100)
    with pytest.raises(ValueError, match=rf"must be in \[0, 1\], got {num_accepted}"):
        original.merge(draft, num_accepted)
    assert original.token_ids == [1, 2, 3]
    assert not draft.status.is_finished


def test_merge_after_the_original_has_moved_on_is_refused(original: Sequence) -> None:
    draft = drafted(original, 100)
    original.add_token_id(55)
    with pytest.raises(ValueError, match="has 4 tokens, but had 3"):
        original.merge(draft, num_accepted=1)


def test_merge_of_a_finished_fork_is_refused(original: Sequence) -> None:
    draft = drafted(original, 100)
    draft.drop()
    with pytest.raises(ValueError, match="cannot merge sequence 'draft'.*FINISHED_DROPPED"):
        original.merge(draft, num_accepted=1)


def test_merge_across_managers_is_refused(manager: KVCacheManager) -> None:
    original = computed(manager, [1, 2, 3])
    draft = drafted(original, 100)
    manager.free(draft)
    KVCacheManager(4, 4).admit(draft)
    with pytest.raises(ValueError, match="different cache managers"):
        original.merge(draft, num_accepted=1)


def test_fork_with_an_id_in_use_is_refused(original: Sequence) -> None:
    draft = original.fork("draft")
    for used in ("main", "draft"):
        with pytest.raises(ValueError, match=f"got '{used}'"):
            draft.fork(used)


def test_fork_of_a_finished_sequence_is_refused(original: Sequence) -> None:
    original.drop()
    with pytest.raises(ValueError, match="cannot fork sequence 'main'"):
        original.fork("draft")


def test_a_token_for_a_finished_sequence_is_refused(original: Sequence) -> None:
    original.drop()
    with pytest.raises(ValueError, match="cannot add a token to sequence 'main'"):
        original.add_token_id(1)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="'main' must not be empty"):
        Sequence("main", [])


def test_negative_token_ids_are_refused(original: Sequence) -> None:
    with pytest.raises(ValueError, match="got -4"):
        Sequence("main", [1, -4])
    with pytest.raises(ValueError, match="got -1"):
        original.add_token_id(-1)


def group(n: int) -> SequenceGroup:
    return SequenceGroup("r", [1, 2, 3], SamplingParams(n=n), arrival=4)


def test_group_starts_with_one_sequence() -> None:
    request = group(3)
    assert [seq.seq_id for seq in request.sequences] == ["r-0"]
    assert request.num_pending_siblings == 2
    assert request.sequences[0].arrival_key == (4, 0)


def test_siblings_have_their_own_ids_and_sample_indices(manager: KVCacheManager) -> None:
    request = group(3)
    first = request.sequences[0]
    manager.admit(first)
    manager.allocate_slots(first, 3)
    manager.commit(first, 3)
    siblings = request.fork_siblings()
    assert [(seq.seq_id, seq.sample_index) for seq in siblings] == [("r-1", 1), ("r-2", 2)]
    assert request.sequences == [first, *siblings]
    assert request.num_pending_siblings == 0
    assert manager.num_free_blocks == 7  # one block, held three times
    manager.check_integrity(request.sequences)


def test_best_of_asks_for_its_number_of_sequences() -> None:
    params = SamplingParams(n=2, best_of=5)
    assert SequenceGroup("r", [1], params, arrival=0).num_sequences_wanted == 5


def test_siblings_before_the_prompt_is_computed_are_refused(manager: KVCacheManager) -> None:
    request = group(2)
    manager.admit(request.sequences[0])
    with pytest.raises(ValueError, match="when the prompt is computed"):
        request.fork_siblings()


def test_siblings_after_the_first_output_token_are_refused() -> None:
    request = group(2)
    request.sequences[0].add_token_id(5)
    with pytest.raises(ValueError, match="before the first output token"):
        request.fork_siblings()


def test_a_sequence_twice_in_a_group_is_refused() -> None:
    request = group(1)
    with pytest.raises(ValueError, match="has a sequence 'r-0' already"):
        request.add_fork(Sequence("r-0", [1]))


def test_group_is_finished_with_its_last_sequence() -> None:
    request = group(2)
    first, second = request.sequences[0], request.fork_siblings()[0]
    first.drop()
    assert not request.is_finished
    second.drop()
    assert request.is_finished
