"""The counts behind n-gram drafting: what is counted, once, for how long, and who wins a tie."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from folospec.spec.stores import ngram_store
from folospec.spec.stores.ngram_store import SCORE_LIMIT, NgramStore


def store_of(token_ids, n=3, kind="basic", **settings):
    store = NgramStore(n, kind, **settings)
    store.update(token_ids, 0)
    return store


@pytest.mark.parametrize("kind", ngram_store.STORES)
@pytest.mark.parametrize("n", [2, 3, 4])
def test_every_count_is_the_number_of_occurrences(kind, n):
    """However the tokens arrive: at once, one by one, or in pieces."""
    rng = random.Random(n)
    token_ids = [rng.randrange(3) for _ in range(60)]
    store, known = NgramStore(n, kind), 0
    for length in (1, 2, 30, 31, 32, 60):
        store.update(token_ids[:length], known)
        known = length
    lengths = range(1, n) if kind == "basic" else [n - 1]
    for length in lengths:
        starts = range(len(token_ids) - length)
        seen = Counter(tuple(token_ids[s : s + length + 1]) for s in starts)
        assert all(store.count(ngram) == times for ngram, times in seen.items())
        assert not store.has_gram([*token_ids[:length], 7])


def test_bigrams_are_stored_and_contexts_of_one_token_are_used():
    assert store_of([7, 8], n=2).lookup([7]).token_id == 8
    match = store_of([7, 8, 9], n=3).lookup([5, 8])
    assert (match.token_id, match.context_length) == (9, 1)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_context_lengths_below_n_are_known_and_no_other(n):
    token_ids = list(range(10, 20))
    store = store_of(token_ids, n=n)
    lengths = [k for k in range(1, 8) if store.count(token_ids[: k + 1])]
    assert lengths == list(range(1, n))


def test_the_longest_known_context_answers():
    store = store_of([1, 2, 3, 9, 2, 4, 9, 2, 4])
    assert store.lookup([1, 2]).token_id == 3
    assert store.lookup([1, 2]).context_length == 2
    assert store.lookup([8, 2]).token_id == 4
    assert store.lookup([8, 2]).context_length == 1
    assert store.lookup([8, 8]) is None


def test_one_level_has_no_shorter_contexts_to_fall_back_on():
    store = store_of([1, 2, 3], kind="one_level")
    assert store.lookup([1, 2]).token_id == 3
    assert store.lookup([8, 2]) is None


@pytest.mark.parametrize("kind", ngram_store.STORES)
def test_a_level_that_has_nothing_yet_is_no_error(kind):
    store = NgramStore(4, kind)
    for context in ([], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4]):
        assert store.lookup(context) is None
    assert not store.has_gram([1, 2, 3, 4])
    store.update([1], 0)
    store.fill([1], [2])
    assert (store.lookup([1]) is None) == (kind == "one_level")


def test_the_most_counted_wins_and_the_most_recent_of_equals():
    assert store_of([1, 2, 1, 3], n=2).lookup([1]).token_id == 3
    assert store_of([1, 2, 1, 2, 1, 3], n=2).lookup([1]).token_id == 2
    assert store_of([1, 2, 1, 2, 1, 3, 1, 3], n=2).lookup([1]).token_id == 3


def test_has_gram_asks_for_the_last_token_after_the_others():
    store = store_of([1, 2, 3])
    assert store.has_gram([1, 2, 3])
    assert store.has_gram([2, 3])
    assert not store.has_gram([2, 3, 3])
    assert not store.has_gram([1, 2, 2])


def test_filler_answers_for_what_was_never_said_and_weighs_less_than_what_was():
    store = store_of([1, 2], n=2)
    store.fill([1], [9, 8])
    store.fill([3], [9, 8])
    assert store.lookup([1]).token_id == 2
    assert not store.lookup([1]).is_filler
    assert store.lookup([3]).token_id == 9
    assert store.lookup([3]).is_filler
    store.update([3, 7], 0)
    assert store.lookup([3]).token_id == 7


def test_guesses_that_come_again_outvote_what_was_said_once():
    store = store_of([1, 2], n=2)
    for expected in (2, 9, 9):
        store.fill([1], [9, 2], said=2)
        assert store.lookup([1]).token_id == expected
    assert not store.has_gram([1, 9])


def test_a_token_that_is_likely_and_said_is_counted_once():
    store = NgramStore(2)
    for _ in range(3):
        store.update([1, 2], 0)
        store.fill([1], [2, 5], said=2)
    found = store.lookup([1]).continuations
    assert (found.score(2), found.score(5)) == (3, 0.75)
    assert len(store) == 2
    store.fill([4], [2], said=2)
    assert store.lookup([4]) is None


def test_a_guess_weighs_half_as_much_for_every_rank():
    store = NgramStore(2)
    store.fill([1], [7, 8, 9])
    found = store.lookup([1]).continuations
    assert [found.score(token_id) for token_id in (7, 8, 9)] == [0.5, 0.25, 0.125]
    assert store.lookup([1]).token_id == 7
    store.fill([1], [8, 7])
    assert store.lookup([1]).token_id == 8


def test_an_old_habit_is_outvoted_before_long():
    store = store_of([1, 2] * 1000, n=2)
    assert store.count([1, 2]) < SCORE_LIMIT
    store.update([1, 3] * SCORE_LIMIT, 0)
    assert store.lookup([1]).token_id == 3


@pytest.mark.parametrize("max_entries", [1, 10, 50])
def test_the_store_is_bounded_and_forgets_what_was_not_used_for_longest(max_entries):
    rng = random.Random(0)
    store, token_ids = NgramStore(3, max_entries=max_entries), [rng.randrange(90)]
    for length in range(1, 400):
        token_ids.append(rng.randrange(90))
        store.update(token_ids, length)
        store.fill(token_ids, [rng.randrange(90) for _ in range(3)])
        assert len(store) <= max_entries
    stored = sum(len(entry) for entry in store._entries.values())
    assert stored == len(store)


def test_a_context_in_use_is_not_forgotten():
    store = store_of([1, 2], n=2, max_entries=10)
    idle = store_of([1, 2], n=2, max_entries=10)
    for token_id in range(100, 200):
        assert store.lookup([1]).token_id == 2
        store.update([token_id, token_id + 1], 0)
        idle.update([token_id, token_id + 1], 0)
    assert idle.lookup([1]) is None


def test_doubt_is_the_share_of_the_largest_entropy():
    assert store_of([1, 2] * 9, n=2).lookup([1]).continuations.doubt == 0.0
    assert store_of([1, 2, 1, 3], n=2).lookup([1]).continuations.doubt == pytest.approx(1.0)
    mostly = store_of([1, 2] * 9 + [1, 3], n=2).lookup([1]).continuations.doubt
    assert mostly == pytest.approx(0.469, abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 1}, "n must be at least 2, got 1"),
        ({"n": 3, "kind": "deep"}, "store must be one of basic, one_level, got 'deep'"),
        ({"n": 3, "max_entries": 0}, "max_entries must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        NgramStore(**settings)
