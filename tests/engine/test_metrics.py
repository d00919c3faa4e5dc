"""What a request and the engine say about speculation adds up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import harness
from harness import make_llm, run

from folospec import SamplingParams


def speculative_run(models: Any, **settings: Any) -> harness.Run:
    draft = {"method": "draft_model", "model": models.near, "num_speculative_tokens": 4}
    return run(make_llm(models.target, {**draft, **settings}))


def test_histogram_and_positions_agree_with_the_counts(models: Any) -> None:
    result = speculative_run(models)
    for counts in [o.metrics for o in result.outputs]:
        histogram, per_pos = counts.acceptance_histogram, counts.num_accepted_tokens_per_pos
        assert sum(histogram) == counts.num_drafts
        assert sum(i * n for i, n in enumerate(histogram)) == counts.num_accepted_tokens
        assert sum(per_pos) == counts.num_accepted_tokens
        assert per_pos == sorted(per_pos, reverse=True)
        assert counts.acceptance_length == 1 + counts.num_accepted_tokens / counts.num_drafts


def test_the_engine_counts_what_its_requests_count(models: Any) -> None:
    result = speculative_run(models)
    for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
        total = sum(getattr(o.metrics, name) for o in result.outputs)
        assert result.stats[name] == total > 0
    tokens = sum(len(c.token_ids) for o in result.outputs for c in o.outputs)
    assert result.stats["num_output_tokens"] == tokens


def test_every_target_pass_gives_one_token_and_the_accepted_ones(models: Any) -> None:
    """For one sequence whose output ends by length, with room for the last bonus token."""
    params = SamplingParams(temperature=0, max_tokens=21, ignore_eos=True)
    settings = {"method": "draft_model", "model": models.near, "num_speculative_tokens": 4}
    result = run(make_llm(models.target, settings), harness.PROMPTS[:1], params)
    counts = result.outputs[0].metrics
    assert counts.num_target_passes + counts.num_accepted_tokens == 21
    assert counts.num_target_passes == result.stats["num_target_passes"]
    assert 0 < counts.num_accepted_tokens < counts.num_draft_tokens


def test_without_speculation_there_is_nothing_to_count(plain: harness.Run) -> None:
    assert plain.stats["num_drafts"] == 0
    assert plain.stats["acceptance_length"] == 1.0
    assert plain.stats["draft_time"] >= 0.0
    assert all(o.metrics.acceptance_rate == 0.0 for o in plain.outputs)


def test_times_are_ordered_and_add_up(models: Any) -> None:
    result = speculative_run(models)
    for output in result.outputs:
        counts = output.metrics
        assert counts.first_token_time is not None
        assert counts.finished_time is not None
        assert counts.arrival_time <= counts.first_token_time <= counts.finished_time
        spent = counts.draft_time + counts.target_time + counts.sampling_time
        assert 0 < spent <= counts.finished_time - counts.arrival_time
        for part in ("draft_time", "target_time", "sampling_time"):
            assert 0 < getattr(counts, part) <= result.stats[part]
    assert result.stats["draft_time"] > 0
    assert result.stats["target_time"] > 0
    assert result.stats["sampling_time"] > 0


def test_a_request_can_turn_speculation_off_or_shorten_it(models: Any) -> None:
    lengths = [0, 1, None]
    params = [
        SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, num_speculative_tokens=k)
        for k in lengths
    ]
    draft = {"method": "draft_model", "model": models.near, "num_speculative_tokens": 4}
    off, short, full = run(make_llm(models.target, draft), harness.PROMPTS[:3], params).outputs
    assert off.metrics.num_drafts == 0
    assert short.metrics.num_drafts > 0
    assert short.metrics.num_draft_tokens == short.metrics.num_drafts
    assert full.metrics.num_draft_tokens > full.metrics.num_drafts


def test_adaptive_lengths_shrink_for_a_draft_model_that_knows_nothing(models: Any) -> None:
    draft = {"method": "draft_model", "model": models.far, "num_speculative_tokens": 4}
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    fixed = run(make_llm(models.target, draft), params=params)
    adaptive = run(make_llm(models.target, {**draft, "adaptive": True}), params=params)
    assert adaptive.tokens == fixed.tokens
    assert adaptive.stats["num_draft_tokens"] < 0.7 * fixed.stats["num_draft_tokens"]


def test_preemptions_and_cached_tokens_are_counted_per_request(models: Any) -> None:
    result = run(make_llm(models.target, num_blocks=16, block_size=4))
    assert sum(o.metrics.num_preemptions for o in result.outputs) == result.stats["num_preemptions"]
    assert result.stats["num_preemptions"] > 0
    llm = make_llm(models.target, block_size=4)
    run(llm)
    again = run(llm)
    assert again.outputs[4].metrics.num_cached_tokens == 16
    assert again.outputs[5].metrics.num_cached_tokens == 0


def test_a_snapshot_keeps_its_reasons(models: Any) -> None:
    engine = make_llm(models.target, "ngram").engine
    engine.add_request(
        {"prompt_token_ids": [5, 6, 7, 8]}, SamplingParams(max_tokens=12, ignore_eos=True)
    )
    snapshots = []
    while engine.has_unfinished_requests:
        snapshots += engine.step()
    counts = [sum(output.metrics.num_undrafted.values()) for output in snapshots]
    assert counts[0] < counts[-1]


def test_accepted_tokens_behind_a_stop_are_not_counted(models: Any) -> None:
    """The target drafts for itself: all is accepted, and the stop is inside the accepted run."""
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    whole = run(make_llm(models.target), harness.PROMPTS[:1], params).tokens[0][0]
    place = next(i for i in range(3, 12) if whole[i] not in whole[:i])
    params = replace(params, stop_token_ids=[whole[place]], max_tokens=60)
    draft = {"method": "draft_model", "model": models.target, "num_speculative_tokens": 24}
    result = run(make_llm(models.target, draft), harness.PROMPTS[:1], params)
    counts = result.outputs[0].metrics
    assert result.tokens[0][0] == whole[: place + 1]
    # One token is of the prompt's pass, the others are the accepted ones; no bonus is committed.
    assert (counts.num_drafts, counts.num_accepted_tokens) == (1, place)
    assert counts.acceptance_length == 1 + place
    assert counts.acceptance_histogram == [*[0] * place, 1]
    assert result.stats["num_accepted_tokens"] == place
