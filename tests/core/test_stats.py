import pytest
from hypothesis import given
from hypothesis import strategies as st

from folospec.core import EngineStats
from folospec.outputs import RequestMetrics

DRAFTS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)).filter(lambda d: d[1] <= d[0]))


@given(DRAFTS)
def test_counts_of_drafts_keep_their_identities(drafts: list[tuple[int, int]]) -> None:
    stats, metrics = EngineStats(), RequestMetrics()
    for num_draft_tokens, num_accepted in drafts:
        stats.record_draft(metrics, num_draft_tokens, num_accepted)
    for counts in (stats, metrics):
        assert counts.num_drafts == len(drafts) == sum(counts.acceptance_histogram)
        assert counts.num_draft_tokens == sum(d for d, _ in drafts)
        weighted = sum(i * count for i, count in enumerate(counts.acceptance_histogram))
        assert counts.num_accepted_tokens == sum(a for _, a in drafts) == weighted
        assert counts.num_accepted_tokens == sum(counts.num_accepted_tokens_per_pos)
    assert stats.acceptance_length == metrics.acceptance_length
    assert stats.acceptance_rate == metrics.acceptance_rate


def test_engine_counts_are_the_sum_over_requests() -> None:
    stats, one, two = EngineStats(), RequestMetrics(), RequestMetrics()
    stats.record_draft(one, 5, 2)
    stats.record_draft(two, 3, 3)
    assert stats.num_accepted_tokens == one.num_accepted_tokens + two.num_accepted_tokens == 5
    assert stats.num_accepted_tokens_per_pos == [2, 2, 1]
    assert stats.acceptance_histogram == [0, 0, 1, 1]
    assert stats.acceptance_length == 3.5


@pytest.mark.parametrize(("num_draft_tokens", "num_accepted"), [(0, 0), (2, 3), (2, -1)])
def test_impossible_counts_are_refused_and_change_nothing(
    num_draft_tokens: int, num_accepted: int
) -> None:
    stats, metrics = EngineStats(), RequestMetrics()
    with pytest.raises(ValueError, match="got"):
        stats.record_draft(metrics, num_draft_tokens, num_accepted)
    assert stats == EngineStats()
    assert metrics == RequestMetrics()


def test_without_drafts_the_acceptance_length_is_one() -> None:
    assert EngineStats().acceptance_length == 1.0


def test_as_dict_is_a_copy_with_the_rates() -> None:
    stats = EngineStats()
    stats.record_draft(RequestMetrics(), 4, 1)
    stats.prefix_cache.hits = 8
    shown = stats.as_dict()
    shown["acceptance_histogram"].append(7)
    assert stats.acceptance_histogram == [0, 1]
    assert shown["acceptance_rate"] == 0.25
    assert shown["prefix_cache_hits"] == 8
