"""The suffix tree against a model that counts by looking at every place of every text."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folospec.spec.stores import suffix_tree
from folospec.spec.stores.suffix_store import SuffixStore, load_texts, save_texts
from folospec.spec.stores.suffix_tree import Node, Reader, SuffixTree, Writer

Text = list[int]
TEXT = st.lists(st.integers(0, 2), max_size=14)
DEPTH = st.integers(2, 6)


def occurrences(texts: list[Text], wanted: Text) -> int:
    size = len(wanted)
    return sum(t[i : i + size] == wanted for t in texts for i in range(len(t) - size + 1))


def substrings(texts: list[Text], max_depth: int) -> list[Text]:
    found = {
        tuple(text[start : start + size])
        for text in texts
        for start in range(len(text))
        for size in range(1, min(max_depth, len(text) - start) + 1)
    }
    return [list(one) for one in sorted(found)]


def edges(node: Node) -> Iterator[tuple[Node, Node]]:
    for child in (node.children or {}).values():
        yield node, child
        yield from edges(child)


def write(tree: SuffixTree, text: Text) -> array[int]:
    writer = Writer(tree)
    for token_id in text:
        writer.append(token_id)
    return writer.close()


def shape(tree: SuffixTree) -> set[tuple[tuple[int, ...], int]]:
    """Every node as its path and count."""
    return {(tuple(n.text[n.start : n.start + n.depth]), n.count) for _, n in edges(tree.root)}


@settings(deadline=None, max_examples=150)
@given(DEPTH, st.lists(TEXT, max_size=4))
def test_every_substring_has_its_count(max_depth: int, texts: list[Text]) -> None:
    tree = SuffixTree(max_depth)
    for text in texts:
        write(tree, text)
    for wanted in substrings(texts, max_depth):
        assert tree.count(wanted) == occurrences(texts, wanted)
    for unseen in ([7], [0, 7], [0] * (max_depth + 1), []):
        assert tree.count(unseen) == 0
    assert tree.num_nodes == len(list(edges(tree.root)))


@settings(deadline=None, max_examples=150)
@given(DEPTH, st.lists(TEXT, max_size=5), st.randoms(use_true_random=False))
def test_a_removed_text_leaves_no_trace(max_depth: int, texts: list[Text], random: Any) -> None:
    tree = SuffixTree(max_depth)
    written = [(text, write(tree, text)) for text in texts]
    random.shuffle(written)
    while written:
        _, gone = written.pop()
        tree.remove(gone)
        never = SuffixTree(max_depth)
        for text, _ in written:
            write(never, text)
        assert shape(tree) == shape(never)
        assert tree.num_nodes == never.num_nodes
        assert all(node.text is not gone for _, node in edges(tree.root))


def test_counts_that_stay_after_a_removal_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control of the test above."""
    monkeypatch.setattr(SuffixTree, "_compress", lambda *_: None)
    tree, never = SuffixTree(4), SuffixTree(4)
    write(tree, [1, 2, 3])
    gone = write(tree, [1, 2, 4])
    tree.remove(gone)
    write(never, [1, 2, 3])
    assert shape(tree) != shape(never)


@settings(deadline=None, max_examples=100)
@given(DEPTH, TEXT)
def test_a_text_that_is_being_written_can_be_looked_up(max_depth: int, text: Text) -> None:
    tree = SuffixTree(max_depth)
    writer = Writer(tree)
    for end in range(1, len(text) + 1):
        writer.append(text[end - 1])
        seen = text[:end]
        known = [size for size in range(1, max_depth) if occurrences([seen], seen[-size:]) > 1]
        assert [point.depth for point in writer.points] == known[::-1]
        for point in writer.points:
            pattern = seen[-point.depth :]
            found = {token_id: count for token_id, count, _, _ in point.continuations()}
            assert set(found) == {t for t in range(3) if occurrences([seen], [*pattern, t])}
            if len(found) > 1:  # at a branch the counts decide; on an edge there is no choice
                assert found == {t: occurrences([seen], [*pattern, t]) for t in found}


def test_suffixes_that_are_counted_too_far_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: a split that forgets those who have not come so far yet."""
    text = [0, 0, 1, 0, 0, 2, 0, 0, 1]
    right, wrong = SuffixTree(4), SuffixTree(4)
    write(right, text)

    def careless(self: Writer, point: Any) -> None:
        own, self.points = self.points, [other for other in self.points if other is not point]
        split(self, point)
        self.points = own

    split = Writer._split
    monkeypatch.setattr(Writer, "_split", careless)
    write(wrong, text)
    assert shape(right) != shape(wrong)


@settings(deadline=None, max_examples=100)
@given(DEPTH, st.lists(TEXT, min_size=1, max_size=4), TEXT)
def test_a_reader_finds_its_suffixes_while_the_tree_changes(
    max_depth: int, texts: list[Text], text: Text
) -> None:
    tree = SuffixTree(max_depth)
    reader = Reader(tree)
    live: list[tuple[Text, array[int]]] = []
    for end in range(1, len(text) + 1):
        if end % 3 == 1 and texts:
            live.append((texts[-1], write(tree, texts.pop())))
        elif end % 3 == 0 and live:
            tree.remove(live.pop()[1])
        reader.append(text[end - 1])
        seen, there = text[:end], [one for one, _ in live]
        known = [s for s in range(1, max_depth) if s <= end and occurrences(there, seen[-s:])]
        assert [point.depth for point in reader.points] == known[::-1]


def test_a_repetitive_text_costs_two_nodes_a_token() -> None:
    for text in ([1] * 500, [1, 2] * 250, list(range(500)), [*range(250), *range(250)]):
        tree = SuffixTree(64)
        write(tree, text)
        assert tree.num_nodes <= 2 * len(text)


@pytest.mark.parametrize("max_depth", [4, 16])
def test_a_token_costs_at_most_the_depth(max_depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    advance = suffix_tree.Point.advance

    def counted(self: Any, token_id: int) -> bool:
        nonlocal calls
        calls += 1
        return advance(self, token_id)

    monkeypatch.setattr(suffix_tree.Point, "advance", counted)
    write(SuffixTree(max_depth), [1, 2] * 400)
    assert calls <= 800 * max_depth


class TestStore:
    @settings(deadline=None, max_examples=100)
    @given(st.lists(TEXT, max_size=12), st.integers(1, 30))
    def test_the_bound_holds_and_the_oldest_go(self, texts: list[Text], max_tokens: int) -> None:
        store = SuffixStore(4, max_tokens)
        expected: list[Text] = []
        evicted = 0
        for text in texts:
            store.add(text)
            kept = text[-max_tokens:]
            while kept and sum(map(len, expected)) + len(kept) > max_tokens:
                del expected[0]
                evicted += 1
            expected += [kept] if kept else []
            assert store.texts == expected
            assert store.num_tokens == sum(map(len, expected)) <= max_tokens
            assert store.num_evictions == evicted
        for wanted in substrings(expected, 4):
            assert store.tree.count(wanted) == occurrences(expected, wanted)

    def test_a_text_that_was_of_use_stays(self) -> None:
        store = SuffixStore(4, 6)
        store.add([1, 2, 3])
        store.add([4, 5, 6])
        assert store.tree.root.children is not None
        store.touch(store.tree.root.children[1].text)
        store.add([7, 8])
        assert store.texts == [[1, 2, 3], [7, 8]]
        store.touch(array("i", [9]))  # a copy that outlived its text
        assert store.texts == [[1, 2, 3], [7, 8]]

    def test_a_store_of_nothing_keeps_nothing(self) -> None:
        store = SuffixStore(4, 0)
        store.add([1, 2, 3])
        assert len(store) == store.tree.num_nodes == store.num_evictions == 0


class TestFile:
    @pytest.mark.parametrize("texts", [[], [[1, 2, 3]], [[1], [0, 60, 5], [7, 7]]])
    def test_what_was_saved_is_loaded(self, texts: list[Text], tmp_path: Path) -> None:
        path = tmp_path / "corpus"
        save_texts(path, texts, vocab_size=61)
        assert load_texts(path, vocab_size=61) == texts
        assert [p.name for p in tmp_path.iterdir()] == ["corpus"]

    def test_a_file_for_another_vocabulary_is_refused(self, tmp_path: Path) -> None:
        save_texts(tmp_path / "corpus", [[1]], vocab_size=61)
        with pytest.raises(ValueError, match="vocab_size of .* must be 60, got 61"):
            load_texts(tmp_path / "corpus", vocab_size=60)

    def test_a_missing_or_foreign_file_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "corpus"
        with pytest.raises(ValueError, match="cannot be read"):
            load_texts(path, vocab_size=61)
        path.write_bytes(b"nothing of the kind")
        with pytest.raises(ValueError, match="cannot be read"):
            load_texts(path, vocab_size=61)
        np.save(tmp_path / "one.npy", np.arange(3))
        with pytest.raises(ValueError, match="cannot be read"):
            load_texts(tmp_path / "one.npy", vocab_size=61)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"version": np.int64(9)}, "version of .* must be 1, got 9"),
            ({"version": np.zeros(2, np.int64)}, "version of .* must be 1"),
            ({"lengths": np.array([2])}, "damaged"),
            ({"lengths": np.array([4, -1])}, "damaged"),
            ({"token_ids": np.array([[1, 2, 3]])}, "damaged"),
            ({"token_ids": np.array([1, 2, 61])}, r"in \[0, 61\), got 61"),
            ({"token_ids": np.array([1.0, 2.0, 3.0])}, "must hold the integers"),
            ({"more": np.int64(0)}, "must hold the integers"),
        ],
    )
    def test_a_damaged_file_is_refused(
        self, change: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        path = tmp_path / "corpus"
        save_texts(path, [[1, 2], [3]], vocab_size=61)
        with np.load(path) as file:
            arrays = {**file, **change}
        with path.open("wb") as opened:
            np.savez(opened, **arrays)
        with pytest.raises(ValueError, match=message):
            load_texts(path, vocab_size=61)
