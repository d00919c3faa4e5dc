"""Prompt lookup: what is copied from where, as a chain and as a tree, and what it costs."""

from __future__ import annotations

import pytest
from lookup_rows import ask, chain_of, make, num_read_per_step, tell

from folospec.core.token_tree import TokenTree
from folospec.spec.drafters.ngram import NgramIndex


def test_the_continuation_of_the_latest_longest_match_is_copied():
    drafter = make("ngram")
    assert chain_of(drafter, [1, 2, 3, 4, 5, 1, 2, 6, 7, 8, 1, 2]) == [6, 7, 8, 1, 2]
    drafter = make("ngram")
    assert chain_of(drafter, [9, 1, 2, 3, 4, 5, 8, 1, 2, 6, 7, 9, 1, 2])[:2] == [3, 4]


def test_a_copy_that_reaches_the_end_goes_on_with_itself():
    assert chain_of(make("ngram"), [1, 2, 3, 1, 2, 3], max_draft_tokens=8) == [1, 2, 3] * 2 + [1, 2]


def test_nothing_is_drafted_without_a_match_and_no_more_than_allowed():
    drafter = make("ngram")
    assert ask(drafter, [1, 2, 3, 4]) is None
    assert ask(make("ngram"), [1]) is None
    periodic = [1, 2, 3, 1, 2, 3]
    assert len(chain_of(make("ngram"), periodic, max_draft_tokens=2)) == 2
    assert len(chain_of(make("ngram"), periodic, max_depth=3)) == 3


def test_several_matches_are_merged_into_one_tree_the_latest_first():
    token_ids = [1, 2, 5, 6, 9, 1, 2, 7, 8, 9, 1, 2, 5, 4, 9, 1, 2]
    proposal = ask(make("ngram", num_matches=3), token_ids, max_draft_tokens=10, max_depth=2)
    #    root - 5 - 4      the latest, then the second (7 8), then the first, which shares its 5
    #       |     `- 6
    #       `- 7 - 8
    tree = proposal.tree
    assert tree == TokenTree([5, 7, 4, 8, 6], [-1, -1, 0, 1, 0])
    assert len(ask(make("ngram", num_matches=2), token_ids, max_depth=2).tree) == 4


def test_a_longer_match_stands_before_a_later_one():
    token_ids = [8, 1, 2, 3, 9, 1, 2, 4, 8, 1, 2]
    tree = ask(make("ngram", num_matches=2), token_ids, max_depth=1).tree
    assert tree.token_ids == (3, 4)


def test_copies_share_the_budget_level_by_level():
    token_ids = [1, 2, 5, 6, 5, 9, 1, 2, 7, 8, 7, 9, 1, 2]
    tree = ask(make("ngram", num_matches=2), token_ids, max_draft_tokens=5).tree
    assert tree.depths == (1, 1, 2, 2, 3)
    tree = ask(make("ngram", num_matches=2), [3, 4] * 5, max_draft_tokens=5).tree
    assert tree.is_chain, "copies that agree leave the budget to depth"
    assert len(tree) == 5


def test_one_match_of_a_tree_drafter_is_the_chain():
    token_ids = [1, 2, 3, 4, 5, 1, 2]
    assert ask(make("ngram", num_matches=4), token_ids).tree == ask(make("ngram"), token_ids).tree


def test_confidence_follows_what_was_accepted_and_siblings_share_at_most_one():
    token_ids = [1, 2, 5, 6, 9, 1, 2, 7, 8, 9, 1, 2]
    drafter = make("ngram", num_matches=2)
    before = ask(drafter, token_ids, max_depth=1)
    for _ in range(30):
        proposal = ask(drafter, token_ids, max_depth=1)
        tell(drafter, proposal, path=[1])
    after = ask(drafter, token_ids, max_depth=1)
    assert after.confidence[1] > 0.8 > before.confidence[1]
    assert after.confidence[0] < 0.2 < before.confidence[0]
    assert sum(before.confidence) <= 1.0 + 1e-12


@pytest.mark.parametrize("num_matches", [1, 3])
def test_a_lookup_costs_what_is_new(num_matches):
    costs = {num_read_per_step(make("ngram", num_matches=num_matches), n) for n in (70, 7000)}
    assert len(costs) == 1


def test_an_index_that_starts_over_reads_the_whole_context(monkeypatch):
    """Control of the test above."""
    real = NgramIndex.update

    def forgetful(self, token_ids):
        self._num_indexed = 0
        real(self, token_ids)

    monkeypatch.setattr(NgramIndex, "update", forgetful)
    short, long = (num_read_per_step(make("ngram"), n) for n in (70, 7000))
    assert long > 50 * short


def test_memory_per_ngram_is_bounded():
    index = NgramIndex(1, 2, num_places=3)
    index.update([1, 2] * 500)
    assert len(index) == 4
    assert all(len(places) <= 3 for places in index._next.values())
    assert [place for place, _ in index.lookup([1, 2] * 500)] == [998, 996, 994]


def test_a_dropped_sequence_is_forgotten():
    drafter = make("ngram")
    tell(drafter, ask(drafter, [1, 2, 3, 1, 2]))
    assert drafter.stats() == {"num_ngrams": 6}
    drafter.drop("a")
    assert drafter.stats() == {"num_ngrams": 0}
    assert ask(drafter, [1, 2]) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_matches": 0}, "num_matches must be an integer of at least 1, got 0"),
        ({"num_matches": 2.0}, "num_matches must be an integer of at least 1, got 2.0"),
        (
            {"num_matches": 2, "acceptance": "block"},
            "num_matches must be 1 with acceptance='block'",
        ),
    ],
)
def test_bad_options_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make("ngram", **settings)


def test_trees_have_a_budget_to_match():
    assert make("ngram").num_speculative_tokens == 5
    assert make("ngram", num_matches=3).num_speculative_tokens == 15
    assert make("ngram", num_matches=3, num_speculative_tokens=4).num_speculative_tokens == 4
