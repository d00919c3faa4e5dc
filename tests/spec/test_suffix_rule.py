"""The suffix drafter against a brute-force reading of the paper's rule, its cost, and its
options."""

from __future__ import annotations

import heapq
import inspect
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import playback
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from playback import CountedList, drafter, play, row
from suffix_forms import FORMS, using

from folospec.core import token_tree
from folospec.core.token_tree import ROOT, TokenTree
from folospec.spec.stores import suffix_tree

Text = list[int]
FACTOR, OFFSET, MIN_PROB, MAX_DEPTH = 1.5, 1.0, 0.2, 6


@pytest.fixture(autouse=True, scope="module", params=FORMS)
def form(request: pytest.FixtureRequest) -> Iterator[None]:
    with using(request.param):
        yield


def occurrences(texts: list[Text], wanted: Text) -> int:
    size = len(wanted)
    return sum(t[i : i + size] == wanted for t in texts for i in range(len(t) - size + 1))


def ratio(texts: list[Text], before: Text, token_id: int) -> float:
    """How much of what followed `before`, in places where anything did, was this token."""
    total = sum(occurrences(texts, [*before, other]) for other in range(4))
    return occurrences(texts, [*before, token_id]) / total if total else 0.0


def score_of_best(texts: list[Text], pattern: Text, max_nodes: int, max_depth: int) -> float:
    """The sum of the probabilities of the tree that the rule grows under a pattern."""
    heap = [(-1.0, [])]  # type: ignore[var-annotated]
    score, num_nodes = -1.0, -1  # the pattern itself is no node
    while heap and num_nodes < max_nodes:
        negative, path = heapq.heappop(heap)
        score, num_nodes = score - negative, num_nodes + 1
        if len(path) < max_depth:
            for token_id in range(4):
                joint = -negative * ratio(texts, [*pattern, *path], token_id)
                if joint >= MIN_PROB:
                    heapq.heappush(heap, (-joint, [*path, token_id]))
    return score


def score_of(texts: list[Text], pattern: Text, tree: TokenTree) -> float:
    """The same for a given tree; nan if the rule would not have one of its nodes."""
    total = 0.0
    for node in range(len(tree)):
        path = tree.path_token_ids(node)
        joint = math.prod(
            ratio(texts, [*pattern, *path[:depth]], path[depth]) for depth in range(len(path))
        )
        total += joint if joint >= MIN_PROB else math.nan
    return total


def candidates(own: Text, finished: list[Text]) -> list[tuple[list[Text], Text]]:
    patterns = [own[-size:] for size in range(1, min(MAX_DEPTH, len(own) + 1))]
    return [(texts, p) for texts in ([own], finished) for p in patterns if occurrences(texts, p)]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), max_size=3),
    st.lists(st.integers(0, 3), min_size=2, max_size=16),
    st.integers(1, 8),
    st.integers(1, 5),
)
def test_the_draft_is_the_one_with_the_highest_score(
    finished: list[Text], own: Text, max_draft_tokens: int, max_depth: int
) -> None:
    source = drafter(
        "suffix",
        max_spec_factor=FACTOR,
        max_spec_offset=OFFSET,
        min_token_prob=MIN_PROB,
        max_tree_depth=MAX_DEPTH,
        preload=finished,
    )
    (proposal,) = source.propose([row(own, max_draft_tokens=max_draft_tokens, max_depth=max_depth)])

    def limits(pattern: Text) -> tuple[int, int]:
        allowed = math.floor(FACTOR * len(pattern) + OFFSET)
        return min(allowed, max_draft_tokens), min(max_depth, MAX_DEPTH - len(pattern))

    found = candidates(own, finished)
    best = max((score_of_best(texts, p, *limits(p)) for texts, p in found), default=0.0)
    if proposal is None:
        assert best == 0.0
        return
    scores = [
        score_of(texts, p, proposal.tree)
        for texts, p in found
        if len(proposal) <= limits(p)[0] and max(proposal.tree.depths) <= limits(p)[1]
    ]
    assert any(score == pytest.approx(best) for score in scores)


def test_a_draft_that_scores_too_low_is_left_to_others() -> None:
    """One token, which followed twice of three times: the score is 2/3."""
    texts = [[1, 2, 3], [1, 2, 3], [1, 2, 4]]
    for min_score, says in ((0.6, True), (0.7, False)):
        source = drafter("suffix", preload=texts, min_score=min_score, tree=False)
        (proposal,) = source.propose([row([9, 1, 2], max_depth=1)])
        assert (proposal is not None) == says


def test_a_tree_holds_what_followed_most_often_and_a_chain_the_best_of_it() -> None:
    texts = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6, 7], [1, 2, 3, 4]]
    (tree,) = drafter("suffix", preload=texts).propose([row([9, 1, 2])])
    assert tree.tree.token_ids == (3, 4, 6, 5, 7)
    assert tree.tree.parents == (ROOT, 0, ROOT, 0, 2)
    assert all(0 < chance < 1 for chance in tree.confidence)
    (chain,) = drafter("suffix", preload=texts, tree=False).propose([row([9, 1, 2])])
    assert chain.tree == TokenTree.chain([3, 4])
    (block,) = drafter("suffix", preload=texts, acceptance="block").propose([row([9, 1, 2])])
    assert block.tree == chain.tree


def test_a_match_of_one_token_allows_less_than_a_long_one() -> None:
    text = list(range(1, 40))
    settings = {"preload": [text], "max_spec_factor": 2, "max_spec_offset": 1}
    for size in (1, 2, 5):
        (proposal,) = drafter("suffix", **settings).propose([row([50, *text[10 : 10 + size]])])
        assert proposal.tree.token_ids == tuple(text[10 + size : 11 + 3 * size])


def test_nothing_seen_before_is_nothing_drafted() -> None:
    assert drafter("suffix").propose([row([1, 2, 3])]) == [None]


def test_a_finished_request_is_found_from_its_first_token() -> None:
    source, prompt, output = drafter("suffix"), [1, 2, 3, 4], [30, 31, 32, 33, 34, 35]
    source.finish("s", [*prompt, *output], len(prompt))
    source.finish("aborted", prompt, len(prompt))
    assert source.stats()["num_stored_requests"] == 1
    (proposal,) = source.propose([row(prompt, num_prompt_tokens=4)])
    assert proposal.tree.token_ids == tuple(output)


def test_a_request_that_is_drafted_from_is_evicted_last() -> None:
    old, new = [1, 2, 3, 4], [11, 12, 13, 14]
    for asked, kept in ((old, old), (new, new)):
        source = drafter("suffix", preload=[old, new], max_cached_tokens=8)
        source.propose([row([50, *asked[:2]])])
        source.finish("s", [60, 61, 62], 1)
        assert source.index.texts[0] == kept
        assert source.stats()["num_evictions"] == 1


def renamed(source: str) -> str:
    for name, new in (("parent", "ancestor"), ("node", "item"), ("token_ids", "symbols")):
        source = re.sub(rf"\b{name}\b", new, source)
    return source


@pytest.fixture(scope="module")
def editing_task() -> tuple[Text, Text]:
    """A file of code, and the same with three identifiers renamed."""
    from tokenizers import Tokenizer

    folder = Path(playback.folospec.__path__[0]) / "demo_models" / "folospec-demo"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    code = inspect.getsource(token_tree)
    return tuple(
        tokenizer.encode(text, add_special_tokens=False).ids for text in (code, renamed(code))
    )  # type: ignore[return-value]


@pytest.mark.parametrize("tree", [True, False])
def test_an_edited_file_is_drafted_in_long_runs(
    tree: bool, editing_task: tuple[Text, Text]
) -> None:
    prompt, output = editing_task
    assert prompt != output
    played = play(drafter("suffix", tree=tree), prompt, output)
    assert played.acceptance_length > 5
    assert played.num_accepted < played.num_drafted
    assert abs(played.confidence - played.num_accepted) < 0.1 * played.num_tried


def test_the_same_request_again_is_drafted_almost_whole(editing_task: tuple[Text, Text]) -> None:
    source, (prompt, output) = drafter("suffix"), editing_task
    first, second = (play(source, prompt[:30], output[:300]) for _ in range(2))
    assert second.acceptance_length > 15 > first.acceptance_length


def test_the_confidence_follows_what_is_accepted() -> None:
    """Matches that are always followed by something else lose their confidence."""
    random_ = random.Random(5)
    source = drafter("suffix", vocab_size=2000, preload=[list(range(1000))])
    (before,) = source.propose([row([1500, 7, 8])])
    source.drop("s")
    said = [t for _ in range(60) for t in (random_.randrange(900), random_.randrange(1000, 2000))]
    played = play(source, [1500], said)
    assert played.num_accepted == 0
    (after,) = source.propose([row([1500, 7])])
    assert after.confidence[0] < before.confidence[0] / 2


@pytest.mark.parametrize("form", ["python"], indirect=True, scope="module")
class TestCost:
    """A step costs what is new, whatever was there before."""

    def cost(self, num_old: int, monkeypatch: pytest.MonkeyPatch, *, warm: bool) -> tuple[int, int]:
        """Point moves, and tokens of the sequence that were read, in ten steps of three tokens."""
        random_ = random.Random(num_old)
        said = [random_.randrange(5) for _ in range(num_old + 30)]
        source = drafter("suffix", max_tree_depth=4, vocab_size=61)
        tokens = CountedList(said[:num_old])
        if warm:
            source.propose([row(tokens)])
        calls = 0
        advance, continuations = suffix_tree.Point.advance, suffix_tree.Point.continuations

        def counted(real: Any) -> Any:
            def call(*args: Any) -> Any:
                nonlocal calls
                calls += 1
                return real(*args)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(suffix_tree.Point, "advance", counted(advance))
            patch.setattr(suffix_tree.Point, "continuations", counted(continuations))
            tokens.num_reads = 0
            for start in range(num_old, num_old + 30, 3):
                tokens += said[start : start + 3]
                source.propose([row(tokens)])
        return calls, tokens.num_reads

    def test_a_step_costs_what_is_new(self, monkeypatch: pytest.MonkeyPatch) -> None:
        short, short_reads = self.cost(200, monkeypatch, warm=True)
        long, long_reads = self.cost(2000, monkeypatch, warm=True)
        assert short_reads == long_reads == 30
        assert long < 1.5 * short

    def test_a_drafter_that_starts_anew_is_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Control of the test above."""
        short, _ = self.cost(200, monkeypatch, warm=False)
        long, long_reads = self.cost(2000, monkeypatch, warm=False)
        assert long_reads == 2030
        assert long > 3 * short


class TestState:
    def test_dropped_sequences_leave_nothing(self) -> None:
        source = drafter("suffix")
        source.propose([row([1, 2, 1], seq_id="a"), row([1, 2, 3, 4], seq_id="b")])
        assert source.stats()["num_sequences"] == 2
        assert source.stats()["num_tokens"] == 7
        source.drop("a")
        source.drop("b")
        source.drop("never there")
        assert source.stats() == drafter("suffix").stats()
        assert source.stats()["num_tokens"] == source.stats()["num_nodes"] == 0

    def test_a_sequence_that_comes_back_starts_from_the_start(self) -> None:
        source = drafter("suffix")
        source.propose([row([1, 2, 3, 1, 2])])
        source.drop("s")
        (again,) = source.propose([row([1, 2, 3, 1, 2])])
        (fresh,) = drafter("suffix").propose([row([1, 2, 3, 1, 2])])
        assert again.tree == fresh.tree
        assert len(fresh) > 0

    def test_the_store_is_saved_and_loaded(self, tmp_path: Path) -> None:
        path = tmp_path / "corpus.npz"
        source = drafter("suffix", preload=[[1, 2, 3], [4, 5]])
        source.save(path)
        loaded = drafter("suffix", load=path, preload=[[7]])
        assert loaded.index.texts == [[7], [1, 2, 3], [4, 5]]
        (proposal,) = loaded.propose([row([1, 2])])
        assert proposal.tree.token_ids == (3,)

    def test_texts_are_encoded(self) -> None:
        source = drafter("suffix", preload=["abc", [5]], encode=lambda text: [*map(ord, text)])
        assert source.index.texts == [[97, 98, 99], [5]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tree_depth": 1}, "max_tree_depth must be an integer of at least 2, got 1"),
        ({"max_tree_depth": 8.0}, "max_tree_depth must be an integer"),
        ({"max_cached_tokens": -1}, "max_cached_tokens must be an integer of at least 0, got -1"),
        ({"max_spec_factor": -1.0}, "max_spec_factor must be finite and at least 0, got -1.0"),
        ({"max_spec_factor": math.inf}, "max_spec_factor must be finite"),
        ({"max_spec_offset": "2"}, "max_spec_offset must be a number, got '2'"),
        ({"max_spec_factor": 0, "max_spec_offset": 0.5}, "must allow a token"),
        ({"min_score": -1}, "min_score must be finite and at least 0, got -1"),
        ({"min_token_prob": 1.1}, r"min_token_prob must be in \[0, 1\], got 1.1"),
        ({"min_token_prob": math.nan}, r"min_token_prob must be in \[0, 1\]"),
        ({"tree": "yes"}, "tree must be None, True or False, got 'yes'"),
        ({"tree": True, "acceptance": "block"}, "acceptance='block' verifies chains"),
        ({"preload": "text"}, "preload must be a list"),
        ({"preload": [7]}, "preload must hold texts or token id lists, got 7"),
        ({"preload": ["text"]}, "need a tokenizer"),
        ({"preload": [[4096]]}, r"token ids of preload must be in \[0, 4096\), got 4096"),
        ({"preload": [[True]]}, "got True"),
        ({"preload": [[1, 2, 3]], "max_cached_tokens": 2}, "at least the 3 tokens of preload"),
        ({"load": "/nowhere/corpus.npz"}, "cannot be read"),
        ({"model": "draft"}, "the suffix drafter has no model"),
        ({"depth": 3}, "unknown option"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drafter("suffix", **options)
