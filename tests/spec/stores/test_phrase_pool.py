"""The pool against a plain list of what was inserted, and the trees that are made of phrases."""

from __future__ import annotations

import random

import pytest
from lookup_rows import CountingList, make, num_read_per_step

from folospec.core.token_tree import TokenTree
from folospec.spec.stores.phrase_pool import NOTHING, PhrasePool, phrase_tree, phrases_said


class NaivePool:
    """Two lists in the order of use, searched from end to end."""

    def __init__(self, phrases_per_token: int, max_first_tokens: int) -> None:
        self.phrases_per_token, self.max_first_tokens = phrases_per_token, max_first_tokens
        self.tokens: list[int] = []
        self.phrases: list[tuple[int, ...]] = []

    def use(self, token_id: int) -> None:
        self.tokens = [t for t in self.tokens if t != token_id] + [token_id]

    def insert(self, phrase: list[int]) -> None:
        kept = tuple(phrase)
        self.phrases = [p for p in self.phrases if p != kept] + [kept]
        self.use(kept[0])
        same = [p for p in self.phrases if p[0] == kept[0]]
        for old in same[: -self.phrases_per_token]:
            self.phrases.remove(old)
        for token_id in self.tokens[: -self.max_first_tokens]:
            self.phrases = [p for p in self.phrases if p[0] != token_id]
        self.tokens = self.tokens[-self.max_first_tokens :]

    def lookup(self, token_id: int) -> list[tuple[int, ...]]:
        if token_id in self.tokens:
            self.use(token_id)
        return [p[1:] for p in reversed(self.phrases) if p[0] == token_id]


@pytest.mark.parametrize("seed", range(5))
def test_the_pool_does_what_a_naive_one_does(seed: int) -> None:
    rng = random.Random(seed)
    bounds = rng.randint(1, 4), rng.randint(1, 5)
    pool, naive = PhrasePool(*bounds), NaivePool(*bounds)
    num_found = 0
    for _ in range(600):
        if rng.random() < 0.6:
            phrase = [rng.randrange(7) for _ in range(rng.randint(2, 4))]
            pool.insert(phrase)
            naive.insert(phrase)
        else:
            token_id = rng.randrange(7)
            found = pool.lookup(token_id)
            assert found == naive.lookup(token_id)
            num_found += len(found)
        assert len(pool) == len(naive.phrases)
        assert pool.num_tokens == len({p[0] for p in naive.phrases})
    assert num_found > 20


def test_a_text_that_grows_gives_every_ngram_once() -> None:
    rng = random.Random(3)
    text = [rng.randrange(50) for _ in range(60)]
    grown, whole = PhrasePool(100, 100), PhrasePool(100, 100)
    start = 0
    while start < len(text):
        end = min(len(text), start + rng.randint(1, 9))
        grown.insert_ngrams(text[:end], start, 4)
        start = end
    whole.insert_ngrams(text, 0, 4)
    ngrams = {tuple(text[i : i + 4]) for i in range(len(text) - 3)}
    assert len(grown) == len(whole) == len(ngrams)
    for token_id in set(text):
        assert grown.lookup(token_id) == whole.lookup(token_id)
        assert {(token_id, *rest) for rest in whole.lookup(token_id)} == {
            ngram for ngram in ngrams if ngram[0] == token_id
        }


@pytest.mark.parametrize("bounds", [(0, 1), (1, 0), (-2, 5)])
def test_bounds_below_one_are_refused(bounds: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1, got"):
        PhrasePool(*bounds)


def test_phrases_share_the_nodes_of_their_common_beginnings() -> None:
    tree, kinds = phrase_tree([(6, 9), (6, 7, 8), (4,), (6, 9, 1)], max_nodes=20, max_depth=9)
    assert tree == TokenTree([6, 9, 7, 8, 4, 1], [-1, 0, 0, 2, -1, 1])
    assert kinds == [(0, 1), (0, 2), (1, 2), (1, 3), (2, 1), (3, 3)]


def test_a_phrase_tree_keeps_within_nodes_and_depth() -> None:
    phrases = [(6, 9, 1), (6, 7, 8), (4, 4)]
    assert phrase_tree(phrases, max_nodes=20, max_depth=2)[0] == TokenTree(
        [6, 9, 7, 4, 4], [-1, 0, 0, -1, 3]
    )
    assert phrase_tree(phrases, max_nodes=4, max_depth=9)[0] == TokenTree(
        [6, 9, 1, 7], [-1, 0, 1, 0]
    )
    assert len(phrase_tree(phrases, max_nodes=0, max_depth=9)[0]) == 0
    assert len(phrase_tree(phrases, max_nodes=9, max_depth=0)[0]) == 0


def test_a_said_phrase_follows_the_children_that_the_model_agrees_with() -> None:
    #  0: 5 -+- 1: 6 --- 3: 7      the model says 8 after node 0's 5, ..., and nothing after node 3
    #        `- 2: 8 --- 4: 9
    tree = TokenTree([5, 6, 8, 7, 9], [-1, 0, 0, 1, 2])
    said = [8, 7, 9, NOTHING, 3]
    assert list(phrases_said(tree, said, range(5), max_length=9)) == [
        (5, 8, 9, 3),
        (6, 7),
        (8, 9, 3),
        (9, 3),
    ]
    assert list(phrases_said(tree, said, [0], max_length=3)) == [(5, 8, 9)]


def test_inserting_what_is_new_reads_what_is_new() -> None:
    """Whatever the length of the context; with a control that reads all of it."""
    counts = {}
    for length in (70, 7000):
        for num_seen in (length - 4, 0):
            token_ids = CountingList(range(length))
            PhrasePool(7, 10_000).insert_ngrams(token_ids, num_seen, 5)
            counts[length, num_seen == 0] = token_ids.num_read
    assert counts[70, False] == counts[7000, False]
    assert counts[70, True] * 50 < counts[7000, True]


def test_a_lookahead_step_reads_what_is_new() -> None:
    reads = {num_read_per_step(make("lookahead"), length) for length in (70, 7000)}
    assert len(reads) == 1
