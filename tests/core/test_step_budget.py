"""Long prompts next to sequences that decode get what the caller leaves them."""

from __future__ import annotations

from test_scheduler import advance, make_scheduler, request

from folospec.core import Scheduler
from folospec.core.step_budget import LONG_PROMPT

LONG = LONG_PROMPT + 100


def scheduler_with(*prompts: int, decoding: int = 2, **limits: object) -> Scheduler:
    """So many sequences decode when the prompts arrive."""
    scheduler = make_scheduler(
        num_blocks=400, **{"max_num_seqs": 8, "max_num_batched_tokens": 2048, **limits}
    )
    for number in range(decoding):
        scheduler.add(request(number, 5))
    if decoding:
        run(scheduler, None)
    for number, num_tokens in enumerate(prompts, start=decoding):
        scheduler.add(request(number, num_tokens))
    return scheduler


def run(scheduler: Scheduler, limit: int | None, num_drafts: int = 0) -> dict[str, int]:
    """One step; how many tokens each sequence ran."""
    return {seq_id: tokens for seq_id, _, tokens, _ in advance(scheduler, num_drafts, limit)}


def test_a_long_prompt_next_to_decoding_gets_no_more_than_its_limit() -> None:
    scheduler = scheduler_with(LONG)
    ran = [run(scheduler, 30) for _ in range(12)]
    assert all(one["r0-0"] == one["r1-0"] == 1 for one in ran)
    assert [one["r2-0"] for one in ran] == [30] * (LONG // 30) + [LONG % 30]


def test_control_without_a_limit_it_runs_at_once() -> None:
    assert run(scheduler_with(LONG), None)["r2-0"] == LONG


def test_long_prompts_share_the_limit() -> None:
    scheduler = scheduler_with(LONG, LONG)
    for _ in range(20):
        ran = run(scheduler, 30)
        assert sum(tokens for tokens in ran.values() if tokens > 1) <= 30


def test_a_short_prompt_is_not_limited_and_passes_the_long_one() -> None:
    scheduler = scheduler_with(LONG, LONG_PROMPT)
    assert run(scheduler, 30) == {"r0-0": 1, "r1-0": 1, "r2-0": 30, "r3-0": LONG_PROMPT}


def test_where_nobody_decodes_there_is_no_limit() -> None:
    assert run(scheduler_with(LONG, decoding=0), 30) == {"r0-0": LONG}


def test_an_older_long_prompt_leaves_younger_ones_their_steps() -> None:
    scheduler = scheduler_with(LONG, 5, decoding=0, max_num_batched_tokens=50)
    assert run(scheduler, 30) == {"r0-0": 50}
    scheduler = scheduler_with(LONG, 5, decoding=0, max_num_batched_tokens=300)
    run(scheduler, 30)
    assert run(scheduler, 30) == {"r0-0": LONG - 300, "r1-0": 5}


def test_with_a_limit_of_0_the_others_run() -> None:
    scheduler = scheduler_with(LONG)
    assert run(scheduler, 30)["r2-0"] == 30
    assert run(scheduler, 0) == {"r0-0": 1, "r1-0": 1}
    assert run(scheduler, 30)["r2-0"] == 30


def test_a_prompt_that_may_not_be_split_is_not_limited() -> None:
    assert run(scheduler_with(LONG, enable_chunked_prefill=False), 30)["r2-0"] == LONG


def test_what_a_limit_leaves_is_for_drafts() -> None:
    scheduler = scheduler_with(LONG)
    output = scheduler.schedule({seq.seq_id: 4 for seq in scheduler.running}, 30)
    assert [step.num_draft_slots for step in output.steps] == [4, 4, 0]
