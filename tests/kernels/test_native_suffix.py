"""The native trees of the suffix drafter draft what those in Python do, bit for bit, and give back
what they no longer need."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
from native_builds import RULES, breakable, require_native

from folospec.kernels import native, native_suffix
from folospec.kernels.native_suffix import NativeSuffixIndex, SuffixAsk, SuffixDraft, SuffixRules
from folospec.spec.stores.suffix_index import SuffixIndex, make_index

Text = list[int]
SEEDS, NUM_STEPS = range(40), 100
BROKEN = [name for name, rule in RULES.items() if rule.file.startswith("suffix")]


def rules(**settings: Any) -> SuffixRules:
    plain = {"max_depth": 16, "max_tokens": 1000, "spec_factor": 2.0, "spec_offset": 2.0}
    return SuffixRules(
        **{**plain, "min_joint": 0.1, "min_score": 0.0, "is_chain": False, **settings}
    )


def random_rules(random_: random.Random) -> SuffixRules:
    choice = random_.choice
    return SuffixRules(
        max_depth=choice([2, 3, 4, 6, 9, 16, 64]),
        max_tokens=choice([0, 7, 30, 60, 200, 2000]),
        spec_factor=choice([0, 0.3, 1, 1.5, 2.0]),
        spec_offset=choice([0.5, 1, 2.0]),
        min_joint=choice([0, 0.05, 0.1, 0.3, 1]),
        min_score=choice([0, 0, 0, 1.2, 3]),
        is_chain=random_.random() < 0.4,
    )


def random_text(random_: random.Random, size: int, num_tokens: int, old: list[Text]) -> Text:
    """Tokens at random, and runs of what was said before, here or in other texts."""
    text: Text = []
    while len(text) < size:
        chance = random_.random()
        if chance < 0.4 and old:
            run = random_.choice(old)
        elif chance < 0.7 and text:
            run = text
        else:
            run = [random_.randrange(num_tokens)]
        start = random_.randrange(len(run))
        text += run[start : start + random_.randrange(1, 20)]
    return text[:size]


class Script:
    """A long life of two indices, which are told and asked the same."""

    def __init__(self, library: native.Native, seed: int) -> None:
        self.random = random.Random(seed)
        given = random_rules(self.random)
        self.python = SuffixIndex(given)
        self.native = NativeSuffixIndex(library.library, given)
        self.num_tokens = self.random.choice([1, 2, 3, 5, 40])
        self.sequences: dict[str, Text] = {}
        self.finished: list[Text] = []
        self.num_drafts = 0

    def text(self, sizes: range | list[int]) -> Text:
        size = self.random.choice(sizes)
        return random_text(self.random, size, self.num_tokens, self.finished)

    def is_same_throughout(self) -> bool:
        return all(self.step() and self.is_same_state() for _ in range(NUM_STEPS))

    def step(self) -> bool:
        chance = self.random.random()
        if chance < 0.75 or not self.sequences:
            return self.ask()
        if chance < 0.9:
            seq_id = self.random.choice(list(self.sequences))
            text = self.sequences.pop(seq_id)
            for index in (self.python, self.native):
                index.add(text)
                index.drop(seq_id)
        else:
            text = self.text(range(50))
            for index in (self.python, self.native):
                index.add(text)
        self.finished += [text] if text else []
        return True

    def ask(self) -> bool:
        asks = []
        for seq_id in self.random.sample("abcd", self.random.randrange(1, 5)):
            token_ids = self.sequences.setdefault(seq_id, [])
            token_ids += self.text([0, 1, 1, 2, 3, 8, 40])
            max_nodes = self.random.choice([0, 1, 2, 5, 8, 24])
            asks.append(
                SuffixAsk(seq_id, token_ids, max_nodes, self.random.choice([0, 1, 3, 10, 10**6]))
            )
        expected = self.python.draft(asks)
        self.num_drafts += sum(draft is not None for draft in expected)
        return self.native.draft(asks) == expected

    def is_same_state(self) -> bool:
        ours, theirs = self.native.stats(), self.python.stats()
        same_sizes = ours._replace(num_bytes=0) == theirs._replace(num_bytes=0)
        return same_sizes and self.native.texts == self.python.texts


def test_every_draft_and_every_size_is_that_of_the_python_form() -> None:
    num_drafts = 0
    for seed in SEEDS:
        script = Script(require_native(), seed)
        assert script.is_same_throughout(), seed
        num_drafts += script.num_drafts
    assert num_drafts > 20 * len(SEEDS)


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_noticed(rule: str) -> None:
    with breakable().without(rule) as library:
        assert not all(Script(library, seed).is_same_throughout() for seed in SEEDS)


def test_the_build_whose_rules_can_break_is_whole_until_they_do() -> None:
    """Control of the control."""
    assert all(Script(breakable().library, seed).is_same_throughout() for seed in SEEDS[:10])


@pytest.fixture
def index() -> NativeSuffixIndex:
    return NativeSuffixIndex(require_native().library, rules())


def ask(token_ids: Text, seq_id: str = "s") -> SuffixAsk:
    return SuffixAsk(seq_id, token_ids, max_nodes=24, max_depth=1000)


def test_a_token_that_anything_may_follow_is_no_special_case() -> None:
    random_ = random.Random(3)
    given = rules(max_tokens=3000, min_joint=0.0)
    indices = [SuffixIndex(given), NativeSuffixIndex(require_native().library, given)]
    for _ in range(40):
        text = [t for _ in range(50) for t in (0, random_.randrange(1, 2000))]
        drafts = []
        for index in indices:
            index.add(text)
            drafts.append(index.draft([ask([*text, 0], str(len(text)))]))
            index.drop(str(len(text)))
        assert drafts[0] == drafts[1] != [None]
    assert indices[0].stats()[:-1] == indices[1].stats()[:-1]
    assert indices[1].stats().num_evictions > 0


def test_evicted_texts_leave_no_nodes(index: NativeSuffixIndex) -> None:
    random_, num_bytes = random.Random(1), []
    for _ in range(300):
        index.add(random_text(random_, random_.randrange(100), 5, []))
        num_bytes.append(index.stats().num_bytes)
    fresh = NativeSuffixIndex(require_native().library, rules())
    for text in index.texts:
        fresh.add(text)
    assert index.stats().num_evictions > 200
    assert index.stats().num_stored_nodes == fresh.stats().num_stored_nodes
    assert num_bytes[-1] < 2 * num_bytes[50]


def test_the_bytes_are_those_of_nodes_and_tokens(index: NativeSuffixIndex) -> None:
    empty = index.stats().num_bytes
    index.draft([ask(list(range(500)))])
    stats = index.stats()
    least = 40 * stats.num_nodes + 4 * stats.num_tokens
    assert least <= stats.num_bytes - empty < 5 * least
    index.drop("s")
    assert index.stats().num_bytes == empty


def resident_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[1])


def test_an_index_that_goes_gives_its_memory_back() -> None:
    text = random_text(random.Random(2), 20_000, 4000, [])
    given = rules(max_tokens=len(text))
    before, taken = resident_bytes(), 0
    for _ in range(40):
        index = NativeSuffixIndex(require_native().library, given)
        index.add(text)
        index.draft([ask(text)])
        taken += index.stats().num_bytes
    assert resident_bytes() - before < taken / 4


def test_a_row_that_cannot_be_read_changes_nothing(index: NativeSuffixIndex) -> None:
    index.draft([ask([1, 2, 3])])
    none: Any = None
    with pytest.raises(TypeError):
        index.draft([ask([1, 2, 3, 1, 2]), ask(none, "t")])
    (draft,) = index.draft([ask([1, 2, 3, 1, 2])])
    assert draft == SuffixDraft([3, 1, 2], [-1, 0, 1], [2 / 3] * 3, 2, "request")
    assert index.stats().num_sequences == 1


def test_only_new_tokens_are_read(index: NativeSuffixIndex) -> None:
    class Counted(list):
        num_reads = 0

        def __getitem__(self, place: Any) -> Any:
            self.num_reads += len(range(*place.indices(len(self))))
            return super().__getitem__(place)

        def __iter__(self) -> Any:
            raise AssertionError("the whole sequence was read")

    token_ids = Counted([1, 2, 3] * 100)
    index.draft([ask(token_ids)])
    assert token_ids.num_reads == 300
    token_ids += [1, 2]
    assert index.draft([ask(token_ids)]) != [None]
    assert token_ids.num_reads == 302


def test_an_index_is_native_where_the_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    require_native()
    assert isinstance(make_index(rules()), NativeSuffixIndex)
    monkeypatch.setattr(native_suffix.native, "load", lambda: None)
    assert isinstance(make_index(rules()), SuffixIndex)
