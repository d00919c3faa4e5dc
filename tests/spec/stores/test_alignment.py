"""Following an output through the text that was expected of it, and drafting from there."""

from __future__ import annotations

import inspect
import math
import random
from pathlib import Path
from typing import Any

import playback
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from playback import CountedList, drafter, play, row
from test_suffix_rule import renamed

from folospec.core import token_tree
from folospec.core.token_tree import ROOT, TokenTree
from folospec.spec.stores import alignment as alignment_module
from folospec.spec.stores.alignment import MAX_CHANGE, MAX_REPLACEMENTS, Alignment, Reading

Text = list[int]


def follow(expected: Text, output: Text, min_match: int = 3) -> Alignment:
    alignment = Alignment(expected, min_match, 8)
    for token_id in output:
        alignment.append(token_id)
    return alignment


def places(alignment: Alignment) -> set[int]:
    return {reading.place for _, reading in alignment.readings()}


def best(alignment: Alignment) -> Reading:
    return max(alignment.readings(), key=lambda pair: pair[0])[1]


EXPECTED = list(range(10, 50))


def test_the_place_moves_along_while_the_output_agrees() -> None:
    for done in (0, 1, 7, 40):
        alignment = follow(EXPECTED, EXPECTED[:done])
        assert alignment.readings() == [(1.0, Reading(done, "same", done))]


@pytest.mark.parametrize(
    ("written", "skipped", "old", "new"),
    [
        ([1], 1, [15], [1]),
        ([1, 2, 3], 1, [15], [1, 2, 3]),
        ([1], 3, [15, 16, 17], [1]),
        ([1, 2], 0, [14], [14, 1, 2]),  # an insertion is told by what is before it
        ([], 2, [14, 15, 16, 17], [14, 17]),  # an omission by what is around it
    ],
)
def test_a_departure_is_learned_once_the_output_is_found_again(
    written: Text, skipped: int, old: Text, new: Text
) -> None:
    output = [*EXPECTED[:5], *written, *EXPECTED[5 + skipped : 8 + skipped]]
    alignment = follow(EXPECTED, output)
    assert alignment.num_departed == 0
    assert alignment.place == 8 + skipped
    assert alignment.replacements == {tuple(old): tuple(new)}


def test_every_way_to_go_on_is_read_until_the_output_is_found_again() -> None:
    replaced = follow(EXPECTED, [*EXPECTED[:5], 1])
    assert places(replaced) == {6, 5}  # as many tokens on, or an insertion
    resumed = follow(EXPECTED, [*EXPECTED[:5], 1, EXPECTED[8]])
    assert best(resumed) == Reading(9, "resumed", 1)
    omitted = follow(EXPECTED, [*EXPECTED[:5], EXPECTED[9]])
    assert best(omitted) == Reading(10, "resumed", 1)
    lost = follow(EXPECTED, [*EXPECTED[:5], *[1] * (MAX_CHANGE + 1)])
    assert lost.readings() == []
    for alignment in (replaced, resumed, omitted):
        assert sum(weight for weight, _ in alignment.readings()) <= 1 + 1e-9


def test_a_moved_part_is_found_ahead_and_behind() -> None:
    text = list(range(100, 300))
    ahead = follow(text, [*text[:20], *text[150:155]])
    assert (ahead.place, ahead.num_departed) == (155, 0)
    behind = follow(text, [*text[:120], *text[3:8]])
    assert (behind.place, behind.num_departed) == (8, 0)
    assert ahead.replacements == behind.replacements == {}


def test_the_nearest_of_equal_places_counts_ahead_before_behind() -> None:
    part = [1, 2, 3]
    text = [*part, 20, 21, 22, *part, 23, 24, 25, 26, *part, 27]
    alignment = follow(text, [*part, 20, 21, 99, *part])
    assert alignment.place == 9
    assert follow(text, [*text[:10], 99, 98, *part]).place == 16


def test_a_place_far_away_must_agree_on_more() -> None:
    text = [1, 2, 3, 4, 5, 20, 21, 22, 23, 24]
    assert follow(text, [*text[:7], 99, 1, 2, 3, 4]).place == 7
    assert follow(text, [*text[:7], 99, 1, 2, 3, 4, 5]).place == 5


def test_a_place_nearby_counts_before_a_longer_match_far_away() -> None:
    part, far = [1, 2, 3, 4, 5], list(range(100, 200))
    near = [20, 21, 22, *part[:3], 23, *far, 99, *part, 24]
    assert follow(near, [20, 21, 99, *part[:3]]).place == 6  # and not behind "99 1 2 3"
    apart = [*part, *far, *part, 24]
    assert follow(apart, [*apart[:40], 99, *part]).place == len(apart) - 1  # ahead, not behind


def test_a_replacement_is_expected_wherever_its_tokens_come_again() -> None:
    text = [1, 2, 3, 4, 5, 6, 1, 2, 7, 8, 9]
    alignment = follow(text, [50, 51, 3, 4, 5])
    assert alignment.replacements == {(1, 2): (50, 51)}
    ((weight, reading),) = alignment.readings()
    (instead, as_expected) = follow(text, [50, 51, 3, 4, 5, 6]).continuations(Reading(6, "same"))
    assert (weight, reading.place) == (1.0, 5)
    assert (instead[0], as_expected[0]) == (50, 1)
    assert instead[1] > 0.5 > as_expected[1]
    assert instead[2].rest == (51,)
    assert instead[2].place == 8


def test_a_replacement_that_is_not_made_is_expected_less() -> None:
    text = [1, 3, 4, 5] * 6
    output = [50, 3, 4, 5, *[1, 3, 4, 5] * 3]
    chances = []
    for done in (4, 8, 12):
        alignment = follow(text, output[:done])
        chances.append(alignment.continuations(best(alignment))[0][1])
    assert chances == sorted(chances, reverse=True)
    assert chances[0] > 0.5 > chances[2]


def test_what_follows_tells_replacements_apart() -> None:
    """`get` becomes `fetch` before `_user` and stays before `_item`."""
    get, fetch, user, item = 1, 2, 3, 4
    text, output = [], []
    for number in range(8):
        tail = [10 + 3 * number, 11 + 3 * number, 12 + 3 * number]
        text += [get, user, *tail, get, item, *tail]
        output += [fetch, user, *tail, get, item, *tail]
    alignment = follow(text, output[:-10])
    assert alignment.place == len(text) - 10
    before_user = alignment.continuations(Reading(len(text) - 10, "same"))
    before_item = alignment.continuations(Reading(len(text) - 5, "same"))
    assert before_user[0][:1] == before_item[0][:1] == (fetch,)
    assert before_user[0][1] > 0.8 > 0.2 > before_item[0][1]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(0, 3), max_size=40),
    st.lists(st.integers(0, 4), max_size=40),
    st.integers(1, 4),
)
def test_any_output_can_be_followed(expected: Text, output: Text, min_match: int) -> None:
    alignment = Alignment(expected, min_match, 8)
    for token_id in output:
        alignment.append(token_id)
        assert 0 <= alignment.place <= len(expected)
        assert sum(weight for weight, _ in alignment.readings()) <= 1 + 1e-9
        for _, reading in alignment.readings():
            shares = [share for _, share, _ in alignment.continuations(reading)]
            assert sum(shares) in (0, pytest.approx(1.0))
    assert len(alignment.replacements) <= MAX_REPLACEMENTS
    assert alignment.output == output


def test_replacements_are_bounded() -> None:
    num = MAX_REPLACEMENTS + 20
    text = [t for i in range(num) for t in (1000 + i, 2000 + i, 3000 + i, 4000 + i)]
    output = [t for i in range(num) for t in (7000 + i, 2000 + i, 3000 + i, 4000 + i)]
    alignment = follow(text, output)
    assert len(alignment.replacements) == MAX_REPLACEMENTS
    assert (1000 + num - 1,) in alignment.replacements
    assert (1000,) not in alignment.replacements


class TestDrafter:
    def test_a_prediction_that_is_right_is_drafted_to_its_end(self) -> None:
        played = play(drafter("prediction"), [1], EXPECTED, EXPECTED)
        assert played.num_accepted == played.num_drafted
        assert played.num_accepted == played.num_tokens - played.num_steps > 30

    def test_without_a_prediction_nothing_is_drafted(self) -> None:
        source = drafter("prediction")
        assert source.needs.prediction
        assert source.propose([row([1, 2, 1, 2, 1])]) == [None]
        assert source.propose([row([1, 5], prediction=[5])]) == [None]  # it has come to its end
        assert source.stats()["num_sequences"] == 1

    def test_both_readings_are_branches_of_a_tree(self) -> None:
        text, output = [1, 3, 4, 5, 6, 1, 7, 8], [50, 3, 4, 5, 6]
        (tree,) = drafter("prediction").propose([row([9, *output], prediction=text)])
        assert {tuple(tree.tree.path_token_ids(node)) for node in range(len(tree))} == {
            *((50, 7, 8)[:size] for size in (1, 2, 3)),
            *((1, 7, 8)[:size] for size in (1, 2, 3)),
        }
        first, second = tree.tree.children(ROOT)
        assert tree.tree.token_ids[first] == 50
        assert tree.confidence[first] > tree.confidence[second] > 0
        for options in ({"tree": False}, {"acceptance": "block"}):
            (chain,) = drafter("prediction", **options).propose(
                [row([9, *output], prediction=text)]
            )
            assert chain.tree == TokenTree.chain([50, 7, 8])

    @pytest.mark.parametrize("tree", [True, False])
    def test_an_edited_file_is_drafted_in_long_runs(self, tree: bool) -> None:
        original, edited = editing_task()
        played = play(drafter("prediction", tree=tree), [1], edited, original)
        assert played.acceptance_length > 10
        assert played.num_accepted < played.num_drafted
        assert abs(played.confidence - played.num_accepted) < 0.1 * played.num_tried

    def test_what_is_learned_of_replacements_is_what_makes_the_runs_long(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Control of the test above."""
        original, edited = editing_task()
        learned = play(drafter("prediction"), [1], edited, original)
        monkeypatch.setattr(Alignment, "_learn", lambda *_: None)
        unlearned = play(drafter("prediction"), [1], edited, original)
        assert unlearned.acceptance_length < 0.8 * learned.acceptance_length

    def test_a_prediction_of_something_else_costs_little(self) -> None:
        random_ = random.Random(3)
        said = [random_.randrange(1000) for _ in range(300)]
        expected = [random_.randrange(1000) for _ in range(300)]
        played = play(drafter("prediction"), [1], said, expected)
        assert played.num_accepted < 10
        assert played.num_drafted < 2 * played.num_steps
        assert played.confidence < 0.25 * played.num_tried

    def test_dropped_sequences_leave_nothing(self) -> None:
        source = drafter("prediction")
        source.propose([row([1], prediction=[1, 2], seq_id=name) for name in "ab"])
        assert source.stats()["num_expected_tokens"] == 4
        source.drop("a")
        source.drop("b")
        source.drop("never there")
        assert source.stats() == dict.fromkeys(source.stats(), 0)


def editing_task() -> tuple[Text, Text]:
    from tokenizers import Tokenizer

    folder = Path(playback.folospec.__path__[0]) / "demo_models" / "folospec-demo"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    code = inspect.getsource(token_tree)
    original, edited = (
        tokenizer.encode(text, add_special_tokens=False).ids for text in (code, renamed(code))
    )
    assert original != edited
    return original, edited


class TestCost:
    """A step costs what is new, however long the output and the prediction are."""

    def cost(self, num_old: int, monkeypatch: pytest.MonkeyPatch, *, warm: bool) -> tuple[int, int]:
        """Comparisons of places, and tokens of the sequence that were read, in ten steps of three
        tokens, every fifth of them unexpected."""
        random_ = random.Random(num_old)
        expected = [random_.randrange(1, 50_000) for _ in range(2 * num_old)]
        said = [0 if place % 5 == 4 else token for place, token in enumerate(expected)]
        source, calls = drafter("prediction"), 0
        tokens = CountedList([1, *said[:num_old]])
        if warm:
            source.propose([row(tokens, prediction=expected)])
        agreement = Alignment._agreement

        def counted(*args: Any) -> int:
            nonlocal calls
            calls += 1
            return agreement(*args)

        with monkeypatch.context() as patch:
            patch.setattr(alignment_module.Alignment, "_agreement", counted)
            tokens.num_reads = 0
            for start in range(num_old, num_old + 30, 3):
                tokens += said[start : start + 3]
                source.propose([row(tokens, prediction=expected)])
        return calls, tokens.num_reads

    def test_a_step_costs_what_is_new(self, monkeypatch: pytest.MonkeyPatch) -> None:
        short, short_reads = self.cost(200, monkeypatch, warm=True)
        long, long_reads = self.cost(2000, monkeypatch, warm=True)
        assert short_reads == long_reads == 30
        assert 0 < long < 1.5 * short

    def test_a_drafter_that_starts_anew_is_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Control of the test above."""
        short, _ = self.cost(200, monkeypatch, warm=False)
        long, long_reads = self.cost(2000, monkeypatch, warm=False)
        assert long_reads == 2030
        assert long > 3 * short


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_match": 0}, "min_match must be an integer of at least 1, got 0"),
        ({"max_match": 2.5}, "max_match must be an integer"),
        ({"min_match": 9}, "min_match must be at most max_match=8, got 9"),
        ({"min_token_prob": -0.1}, r"min_token_prob must be in \[0, 1\], got -0.1"),
        ({"min_token_prob": math.nan}, r"min_token_prob must be in \[0, 1\]"),
        ({"tree": 1}, "tree must be None, True or False, got 1"),
        ({"tree": True, "acceptance": "block"}, "acceptance='block' verifies chains"),
        ({"model": "draft"}, "the prediction drafter has no model"),
        ({"depth": 3}, "unknown option"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drafter("prediction", **options)
