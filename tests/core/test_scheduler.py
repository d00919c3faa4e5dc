import pytest
from fake_kv import FakeRunner, make_runner
from hypothesis import given, settings
from hypothesis import strategies as st

from folospec.core import (
    BlockCopy,
    KVCacheManager,
    Scheduler,
    SequenceGroup,
    SequenceStatus,
)
from folospec.sampling_params import SamplingParams


def request(number: int, num_tokens: int, **params: object) -> SequenceGroup:
    prompt = list(range(num_tokens))
    return SequenceGroup(f"r{number}", prompt, SamplingParams(**params), arrival=number)  # type: ignore[arg-type]


def make_scheduler(
    num_blocks: int = 16, block_size: int = 4, *, caching: bool = False, **limits: object
) -> Scheduler:
    settings_ = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "enable_chunked_prefill": True,
        **limits,
    }
    manager = KVCacheManager(num_blocks, block_size, enable_prefix_caching=caching)
    return Scheduler(manager, **settings_)  # type: ignore[arg-type]


def advance(
    scheduler: Scheduler, num_drafts: int = 0, num_long_tokens: int | None = None
) -> list[tuple[str, int, int, int]]:
    """One step whose every draft is rejected; what ran: (seq_id, start, tokens, draft slots)."""
    queued = (*scheduler.running, *scheduler.waiting)
    output = scheduler.schedule({seq.seq_id: num_drafts for seq in queued}, num_long_tokens)
    for step in output.steps:
        if step.samples:
            step.seq.add_token_id(7)
        scheduler.manager.commit(step.seq, step.start + step.num_tokens)
        scheduler.manager.rollback(step.seq)
    scheduler.check_integrity()
    return [(s.seq.seq_id, s.start, s.num_tokens, s.num_draft_slots) for s in output.steps]


# Whole runs -----------------------------------------------------------------------------------

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [3, 1, 4, 1, 5, 9, 7, 7, 7, 7, 7], [2, 7], [1] * 13, [8] * 5]


def add_mix(runner: FakeRunner) -> None:
    for number, prompt in enumerate(PROMPTS):
        runner.add(prompt, max_tokens=12 + number, n=3 if number == 1 else 1)


@pytest.mark.parametrize("num_blocks", [9, 64])
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("num_drafts", [0, 4])
def test_every_request_gets_the_tokens_of_a_run_alone(
    num_blocks: int, caching: bool, chunked: bool, num_drafts: int
) -> None:
    runner = make_runner(
        num_blocks=num_blocks,
        caching=caching,
        num_drafts=num_drafts,
        enable_chunked_prefill=chunked,
        max_num_batched_tokens=16,
    )
    add_mix(runner)
    runner.run()
    assert (runner.num_preempted > 0) == (num_blocks == 9)
    assert runner.num_copies > 0
    assert (runner.num_accepted > 0) == (num_drafts > 0)
    assert (runner.num_rejected > 0) == (num_drafts > 0)
    if caching and num_blocks == 9:
        assert runner.manager.stats.hits > 0


def test_a_runner_that_makes_no_copies_is_noticed() -> None:
    runner = make_runner(copies=False)
    add_mix(runner)
    with pytest.raises(AssertionError, match="row"):
        runner.run()


REQUESTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 1), min_size=1, max_size=11), st.integers(1, 9), st.integers(1, 3)
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(REQUESTS, st.integers(5, 12), st.integers(0, 4), st.booleans(), st.integers(12, 20))
def test_random_requests_get_the_tokens_of_a_run_alone(
    requests: list[tuple[list[int], int, int]],
    num_blocks: int,
    num_drafts: int,
    caching: bool,
    budget: int,
) -> None:
    runner = make_runner(
        num_blocks=num_blocks,
        num_drafts=num_drafts,
        caching=caching,
        enable_chunked_prefill=budget % 2 == 0,
        max_num_batched_tokens=budget,
        max_num_seqs=4,
    )
    for prompt, max_tokens, n in requests:
        runner.add(prompt, max_tokens=max_tokens, n=n)
    runner.run()


# Budget and chunks ----------------------------------------------------------------------------


def test_a_prompt_is_split_to_fill_the_budget() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(request(0, 6))
    scheduler.add(request(1, 11))
    assert advance(scheduler) == [("r0-0", 0, 6, 0), ("r1-0", 0, 2, 0)]
    assert advance(scheduler) == [("r0-0", 6, 1, 0), ("r1-0", 2, 7, 0)]
    assert advance(scheduler) == [("r0-0", 7, 1, 0), ("r1-0", 9, 2, 0)]


def test_without_chunked_prefill_a_prompt_waits_for_a_step_that_takes_it_whole() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8, enable_chunked_prefill=False)
    scheduler.add(request(0, 6))
    scheduler.add(request(1, 7))
    assert advance(scheduler) == [("r0-0", 0, 6, 0)]
    assert advance(scheduler) == [("r0-0", 6, 1, 0), ("r1-0", 0, 7, 0)]


def test_without_chunked_prefill_a_recompute_past_the_budget_is_still_possible() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4, enable_chunked_prefill=False)
    scheduler.add(request(0, 4))
    for _ in range(3):
        advance(scheduler)
    seq = scheduler.running[0]
    scheduler._preempt(seq)
    assert advance(scheduler) == [("r0-0", 0, 4, 0)]
    assert advance(scheduler) == [("r0-0", 4, 3, 0)]


def test_only_the_last_chunk_samples() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4)
    scheduler.add(request(0, 6))
    (step,) = scheduler.schedule().steps
    assert not step.samples
    scheduler.manager.commit(step.seq, 4)
    (step,) = scheduler.schedule().steps
    assert step.samples


def test_drafts_count_against_the_budget() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=6)
    for number in range(3):
        scheduler.add(request(number, 2))
    advance(scheduler)
    assert advance(scheduler, num_drafts=2) == [
        ("r0-0", 2, 1, 2),
        ("r1-0", 2, 1, 1),
        ("r2-0", 2, 1, 0),
    ]


def test_only_sequences_that_have_caught_up_get_draft_slots() -> None:
    scheduler = make_scheduler()
    scheduler.add(request(0, 5))
    assert advance(scheduler, num_drafts=3) == [("r0-0", 0, 5, 0)]
    assert advance(scheduler, num_drafts=3) == [("r0-0", 5, 1, 3)]


def test_a_request_with_pending_siblings_gets_no_draft_slots() -> None:
    scheduler = make_scheduler()
    scheduler.add(request(0, 1, n=2))
    assert advance(scheduler, num_drafts=3) == [("r0-0", 0, 1, 0)]


# Out of blocks --------------------------------------------------------------------------------


def test_drafts_are_shed_before_anybody_is_preempted() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    scheduler.add(request(0, 6))
    scheduler.add(request(1, 6))
    advance(scheduler)
    ran = advance(scheduler, num_drafts=6)  # 4 blocks are held: two free slots in the last of each
    assert ran == [("r0-0", 6, 1, 1), ("r1-0", 6, 1, 1)]
    assert all(seq.status is SequenceStatus.RUNNING for seq in scheduler.running)
    assert scheduler.waiting == ()


def test_the_youngest_is_preempted_and_waits_in_front() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4, max_num_seqs=2)
    for number in range(3):
        scheduler.add(request(number, 7))
    advance(scheduler)
    advance(scheduler)
    output = scheduler.schedule()  # both need a third block
    assert [seq.seq_id for seq in output.preempted] == ["r1-0"]
    assert [step.seq.seq_id for step in output.steps] == ["r0-0"]
    assert [seq.seq_id for seq in scheduler.waiting] == ["r1-0", "r2-0"]
    preempted = scheduler.waiting[0]
    assert preempted.status is SequenceStatus.PREEMPTED
    assert preempted.num_tokens == 9
    assert (preempted.num_computed_tokens, preempted.block_table) == (0, [])
    scheduler.check_integrity()


def test_the_youngest_sequence_preempts_itself_rather_than_an_older_one() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    scheduler.add(request(0, 7))
    scheduler.add(request(1, 8))
    advance(scheduler)
    output = scheduler.schedule()
    assert [step.seq.seq_id for step in output.steps] == ["r0-0"]
    assert [seq.seq_id for seq in output.preempted] == ["r1-0"]


def test_nobody_is_admitted_in_a_step_that_preempts() -> None:
    scheduler = make_scheduler(num_blocks=5, block_size=4)
    scheduler.add(request(0, 8))
    scheduler.add(request(1, 8))
    scheduler.add(request(2, 1))
    advance(scheduler)
    output = scheduler.schedule()
    assert [seq.seq_id for seq in output.preempted] == ["r2-0", "r1-0"]
    assert [step.seq.seq_id for step in output.steps] == ["r0-0"]
    assert [seq.seq_id for seq in scheduler.waiting] == ["r1-0", "r2-0"]


def test_a_preempted_sibling_leaves_the_shared_prompt_to_the_others() -> None:
    scheduler = make_scheduler(num_blocks=8, block_size=4)
    group = request(0, 6, n=2)
    scheduler.add(group)
    (step,) = scheduler.schedule().steps
    scheduler.manager.commit(step.seq, 6)
    (sibling,) = group.fork_siblings()
    scheduler.add_fork(sibling)
    table = list(step.seq.block_table)
    scheduler._preempt(sibling)
    assert step.seq.block_table == table
    scheduler.check_integrity()


# Admission ------------------------------------------------------------------------------------


def test_first_come_is_first_served_even_if_a_later_one_would_fit() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    scheduler.add(request(0, 9))
    scheduler.add(request(1, 9))
    scheduler.add(request(2, 1))
    assert [ran[0] for ran in advance(scheduler)] == ["r0-0"]


def test_no_more_sequences_run_than_may() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for number in range(3):
        scheduler.add(request(number, 2))
    assert len(advance(scheduler)) == 2
    scheduler.finish(scheduler.running[0], SequenceStatus.FINISHED_STOPPED)
    assert [ran[0] for ran in advance(scheduler)] == ["r1-0", "r2-0"]


@pytest.mark.parametrize("params", [{"n": 3}, {"n": 1, "best_of": 3}])
def test_future_siblings_have_their_seats_kept(params: dict[str, int]) -> None:
    scheduler = make_scheduler(max_num_seqs=4)
    group = request(0, 2, **params)
    scheduler.add(group)
    scheduler.add(request(1, 2))
    scheduler.add(request(2, 2))
    output = scheduler.schedule()
    assert [step.seq.seq_id for step in output.steps] == ["r0-0", "r1-0"]
    for step in output.steps:
        scheduler.manager.commit(step.seq, 2)
    siblings = group.fork_siblings()
    for sibling in siblings:
        scheduler.add_fork(sibling)
    assert [seq.seq_id for seq in scheduler.running] == ["r0-0", "r0-1", "r0-2", "r1-0"]
    scheduler.check_integrity()


def test_siblings_share_the_prompt_and_part_at_the_first_write() -> None:
    scheduler = make_scheduler()
    group = request(0, 6, n=3)
    scheduler.add(group)
    (step,) = scheduler.schedule().steps
    scheduler.manager.commit(step.seq, 6)
    for sibling in group.fork_siblings():
        scheduler.add_fork(sibling)
    assert scheduler.manager.num_free_blocks == 14
    for token_id, seq in enumerate(group.sequences):
        seq.add_token_id(token_id)
    shared = step.seq.block_table[1]
    output = scheduler.schedule()
    assert [copy.src for copy in output.copies] == [shared, shared]
    assert output.copies[0] == BlockCopy(shared, group.sequences[0].block_table[1])
    assert group.sequences[2].block_table[1] == shared  # the last one left needs no copy
    assert len({tuple(seq.block_table) for seq in group.sequences}) == 3
    assert scheduler.manager.num_free_blocks == 12
    scheduler.check_integrity()


def test_a_prefix_hit_leaves_one_token_to_compute_and_is_counted() -> None:
    scheduler = make_scheduler(caching=True)
    scheduler.add(request(0, 9))
    advance(scheduler)
    second = request(1, 8)
    scheduler.add(second)
    assert advance(scheduler)[1] == ("r1-0", 4, 4, 0)
    third = request(2, 9)
    scheduler.add(third)
    assert advance(scheduler)[2] == ("r2-0", 8, 1, 0)
    assert (second.metrics.num_cached_tokens, third.metrics.num_cached_tokens) == (4, 8)


def test_prompt_logprobs_skip_the_prefix_cache() -> None:
    scheduler = make_scheduler(caching=True)
    scheduler.add(request(0, 9))
    advance(scheduler)
    scheduler.add(request(1, 9, prompt_logprobs=0))
    assert advance(scheduler)[1] == ("r1-0", 0, 9, 0)


def test_a_hit_makes_room_in_the_budget() -> None:
    scheduler = make_scheduler(
        caching=True, max_num_batched_tokens=10, enable_chunked_prefill=False
    )
    scheduler.add(request(0, 9))
    advance(scheduler)
    scheduler.add(request(1, 9))
    scheduler.add(request(2, 9))
    assert [ran[:3] for ran in advance(scheduler)[1:]] == [("r1-0", 8, 1), ("r2-0", 8, 1)]


# Requests come and go -------------------------------------------------------------------------


def test_finish_frees_the_blocks_and_ends_the_request() -> None:
    scheduler = make_scheduler()
    group = request(0, 5)
    scheduler.add(group)
    advance(scheduler)
    scheduler.finish(group.sequences[0], SequenceStatus.FINISHED_LENGTH)
    assert not scheduler.has_unfinished
    assert group.is_finished
    assert scheduler.manager.num_free_blocks == 16
    scheduler.add(request(0, 5))  # the id is free again


def test_finishing_twice_changes_nothing() -> None:
    scheduler = make_scheduler()
    group = request(0, 5)
    scheduler.add(group)
    scheduler.finish(group.sequences[0], SequenceStatus.FINISHED_LENGTH)
    scheduler.finish(group.sequences[0], SequenceStatus.FINISHED_ABORTED)
    assert group.sequences[0].status is SequenceStatus.FINISHED_LENGTH


def test_abort_ends_running_and_waiting_sequences_alike() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    running, waiting = request(0, 5), request(1, 5)
    scheduler.add(running)
    scheduler.add(waiting)
    advance(scheduler)
    assert scheduler.abort("r0")
    assert scheduler.abort("r1")
    assert not scheduler.abort("r0")
    assert not scheduler.abort("never seen")
    assert not scheduler.has_unfinished
    assert scheduler.manager.num_free_blocks == 16
    scheduler.check_integrity()


def test_a_live_fork_runs_on_its_own() -> None:
    scheduler = make_scheduler()
    group = request(0, 5)
    scheduler.add(group)
    advance(scheduler)
    fork = group.sequences[0].fork("fork", sample_index=1)
    scheduler.check_integrity(others=[fork])
    scheduler.add_fork(fork)
    assert [ran[0] for ran in advance(scheduler)] == ["r0-0", "fork"]
    assert group.sequences[1] is fork
    scheduler.finish(group.sequences[0], SequenceStatus.FINISHED_STOPPED)
    assert not group.is_finished


def test_a_draft_fork_merges_back_into_a_running_sequence() -> None:
    scheduler = make_scheduler()
    group = request(0, 5)
    scheduler.add(group)
    advance(scheduler)
    seq = group.sequences[0]
    draft = seq.fork("draft")
    draft.add_token_id(8)
    scheduler.manager.allocate_slots(draft, 2)
    scheduler.manager.commit(draft, 7)
    seq.merge(draft, num_accepted=1)
    seq.add_token_id(9)
    scheduler.check_integrity()
    assert advance(scheduler) == [("r0-0", 7, 1, 0)]


def test_what_cannot_fit_an_empty_pool_is_refused() -> None:
    scheduler = make_scheduler(num_blocks=2, block_size=4)
    assert scheduler.fits_empty_pool(8)
    assert not scheduler.fits_empty_pool(9)
    with pytest.raises(ValueError, match="shorter than the KV pool of 8 slots, got 8 tokens"):
        scheduler.add(request(0, 8))
    assert not scheduler.has_unfinished
    scheduler.add(request(0, 7))


def test_a_prompt_past_the_budget_is_refused_without_chunked_prefill() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4, enable_chunked_prefill=False)
    with pytest.raises(ValueError, match="at most max_num_batched_tokens=4 tokens, got 5"):
        scheduler.add(request(0, 5))


def test_more_siblings_than_seats_are_refused() -> None:
    with pytest.raises(ValueError, match="at most max_num_seqs=4, got 5"):
        make_scheduler().add(request(0, 5, n=5))


def test_a_request_id_in_use_is_refused() -> None:
    scheduler = make_scheduler()
    scheduler.add(request(0, 5))
    with pytest.raises(ValueError, match="got 'r0'"):
        scheduler.add(request(0, 5))


def test_a_fork_that_is_here_already_is_refused() -> None:
    scheduler = make_scheduler()
    scheduler.add(request(0, 5))
    advance(scheduler)
    with pytest.raises(ValueError, match="new to the scheduler"):
        scheduler.add_fork(scheduler.running[0])


def test_a_fork_without_a_seat_is_refused() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(request(0, 5))
    advance(scheduler)
    with pytest.raises(ValueError, match="max_num_seqs=1 sequences run already"):
        scheduler.add_fork(scheduler.running[0].fork("fork", sample_index=1))


def test_finishing_with_a_status_that_is_none_is_refused() -> None:
    scheduler = make_scheduler()
    scheduler.add(request(0, 5))
    with pytest.raises(ValueError, match="FINISHED one, got RUNNING"):
        scheduler.finish(scheduler.waiting[0], SequenceStatus.RUNNING)


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens"])
def test_a_limit_below_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
        make_scheduler(**{name: 0})


# Negative controls of check_integrity ---------------------------------------------------------


def test_integrity_catches_a_running_sequence_that_lost_its_status() -> None:
    scheduler = make_scheduler()
    scheduler.add(request(0, 5))
    advance(scheduler)
    scheduler.running[0].status = SequenceStatus.PREEMPTED
    with pytest.raises(AssertionError, match="not a running sequence"):
        scheduler.check_integrity()


def test_integrity_catches_a_waiting_sequence_with_blocks() -> None:
    scheduler = make_scheduler()
    scheduler.add(request(0, 5))
    scheduler.waiting[0].block_table.append(0)
    with pytest.raises(AssertionError, match="not a waiting sequence without blocks"):
        scheduler.check_integrity()


def test_integrity_catches_a_queue_out_of_order() -> None:
    scheduler = make_scheduler()
    scheduler.add(request(0, 5))
    scheduler.add(request(1, 5))
    scheduler._waiting.reverse()
    with pytest.raises(AssertionError, match="not in order of age"):
        scheduler.check_integrity()


def test_integrity_catches_a_fork_that_nobody_mentioned() -> None:
    scheduler = make_scheduler()
    scheduler.add(request(0, 5))
    advance(scheduler)
    scheduler.running[0].fork("draft")
    with pytest.raises(AssertionError, match="block tables hold it"):
        scheduler.check_integrity()
