"""Lookahead on a target that is a function of the tokens before a place: the window, its Jacobi
trajectory, the n-grams it gives, and what becomes of it where room is short."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from folospec import SamplingParams
from folospec.core.token_tree import TokenTree
from folospec.spec.drafters.base import DrafterContext, DraftRequest, StepResult
from folospec.spec.drafters.lookahead import LookaheadDrafter, Window
from folospec.spec.merge import merge_proposals
from folospec.spec.proposal import Proposal
from folospec.spec.verify import verify_coupled
from folospec.speculative_config import DrafterConfig

VOCAB_SIZE = 40
PROMPT = [1, 2, 3, 4, 5]
Target = Callable[[Sequence[int]], int]


def erratic(token_ids: Sequence[int]) -> int:
    """Any function of all the tokens before a place."""
    return random.Random(str(list(token_ids))).randrange(VOCAB_SIZE)


def repetitive(token_ids: Sequence[int]) -> int:
    """Goes round in a circle of eleven tokens, from wherever it is."""
    return (token_ids[-1] + 3) % 11


def make_drafter(
    acceptance: str = "coupled", num_speculative_tokens: int | None = None, **options: Any
) -> LookaheadDrafter:
    context = DrafterContext(
        config=DrafterConfig(
            method="lookahead", num_speculative_tokens=num_speculative_tokens, options=options
        ),
        name="lookahead",
        stream=0,
        acceptance=acceptance,
        target=SimpleNamespace(vocab_size=VOCAB_SIZE),  # type: ignore[arg-type]
        encode=None,
        default_draft_model=None,
        load_draft_model=None,  # type: ignore[arg-type]
        self_draft_model=None,  # type: ignore[arg-type]
    )
    return LookaheadDrafter(context)


class Decoding:
    """One sequence that is decoded with a drafter, and what it costs."""

    def __init__(self, drafter: LookaheadDrafter, target: Target, prompt: list[int]) -> None:
        self.drafter, self.target = drafter, target
        self.token_ids = [*prompt, target(prompt)]
        self.num_prompt_tokens = len(prompt)
        self.num_steps = 1

    def row(self, **limits: int) -> DraftRequest:
        return DraftRequest(
            seq_id="a",
            token_ids=self.token_ids,
            num_prompt_tokens=self.num_prompt_tokens,
            max_draft_tokens=limits.get("nodes", self.drafter.num_speculative_tokens),
            max_depth=limits.get("depth", 1000),
            num_slots=limits.get("slots", 1000),
            params=SamplingParams(),
            seed=0,
            sample_index=0,
            block_table=[],
        )

    def propose(self, **limits: int) -> Proposal | None:
        return self.drafter.propose([self.row(**limits)])[0]

    def step(
        self, other: Proposal | None = None, max_nodes: int = 1000, **limits: int
    ) -> Proposal | None:
        """Draft, verify, commit, tell; `other` comes before the drafter's own nodes."""
        self.num_steps += 1
        own = self.propose(**limits)
        proposals = [p for p in (other, own) if p is not None]
        if not proposals:
            self.token_ids.append(self.target(self.token_ids))
            return None
        merged, sources = merge_proposals(
            proposals,
            max_nodes=max_nodes,
            max_draft_tokens=max_nodes,
            max_depth=1000,
            unite=True,
            vocab_size=VOCAB_SIZE,
        )
        said = [
            self.target([*self.token_ids, *(merged.tree.path_token_ids(node) if node >= 0 else [])])
            for node in range(-1, len(merged))
        ]
        verdict = verify_coupled(merged.tree, said, merged.candidate)
        new_token_ids = verdict.token_ids(merged.tree)
        self.token_ids += new_token_ids
        own_nodes = {} if own is None else sources[-1]
        top = torch.tensor(said)[:, None]
        outcome = StepResult("a", merged, verdict, new_token_ids, own_nodes, top_token_ids=top)
        self.drafter.observe([outcome])
        return own

    @property
    def window(self) -> list[list[int]]:
        return self.drafter._states["a"].window.rows


def test_a_window_is_a_tree_of_one_row_with_columns_hanging_from_it() -> None:
    """root(50)  2    3       nodes, column by column: 0 and 1 under the root, then 2, 3, 4, ...
    2        3    4
    3        4    5"""
    window = Window([1, 2, 3, 4, 5, 6], num_rows=3, num_columns=3)
    assert window.rows == [[1, 2, 3], [2, 3, 4], [3, 4, 5]]
    window.begin(50)
    tree = window.tree(3)
    assert tree == TokenTree([2, 3, 2, 3, 4, 3, 4, 5], [-1, 0, -1, 2, 3, 2, 5, 6])
    sees = {
        (row, column): [50, *tree.path_token_ids(window.node(row, column))]
        for column in range(3)
        for row in range(3)
        if (row, column) != (0, 0)
    }
    assert sees == {
        (1, 0): [50, 2],
        (2, 0): [50, 2, 3],
        (0, 1): [50, 2],
        (1, 1): [50, 2, 3],
        (2, 1): [50, 2, 3, 4],
        (0, 2): [50, 2, 3],
        (1, 2): [50, 2, 3, 4],
        (2, 2): [50, 2, 3, 4, 5],
    }
    for (row, column), path in sees.items():  # a place is row + column tokens after the root
        assert tree.depths[window.node(row, column)] == row + column == len(path) - 1


def test_a_window_moves_up_and_gives_its_columns() -> None:
    window = Window([1, 2, 3, 4, 5], num_rows=3, num_columns=3)
    window.begin(50)
    assert window.advance([7, 8]) == [(50, 2, 3, 7), (2, 3, 4, 8)]
    assert window.rows == [[2, 3, 3], [3, 4, 4], [7, 8, 5]]


def naive_new_token_ids(target: Target, token_ids: list[int], rows: list[list[int]]) -> list[int]:
    """One forward for each column, over the tokens that its last place may see."""
    new = []
    for column in range(len(rows[0])):
        left = rows[0][1 : column + 1]
        above = [row[column] for row in rows[1:]]
        new.append(target([*token_ids, *left, *above]))
    return new


@pytest.mark.parametrize("target", [erratic, repetitive])
@pytest.mark.parametrize(("ngram", "window"), [(2, 4), (3, 1), (4, 3), (5, 7)])
def test_the_trajectory_is_that_of_one_plain_forward_per_place(
    target: Target, ngram: int, window: int
) -> None:
    drafter = make_drafter(ngram_size=ngram, window=window, guesses=50, prompt_ngrams=False)
    seq = Decoding(drafter, target, PROMPT)
    given: set[tuple[int, ...]] = set()
    rows = [
        [(PROMPT + [target(PROMPT)])[(i + j) % 6] for j in range(window)] for i in range(ngram - 1)
    ]
    for _ in range(12):
        rows[0][0] = seq.token_ids[-1]
        new = naive_new_token_ids(target, seq.token_ids, rows)
        given |= {(*(row[j] for row in rows), new[j]) for j in range(window)}
        rows = [*(list(row) for row in rows[1:]), new]
        seq.step()
        assert seq.window == rows
    kept = {(t, *rest) for t in range(VOCAB_SIZE) for rest in drafter._pool.lookup(t)}
    assert kept == given


def plain(target: Target, prompt: list[int], length: int) -> list[int]:
    token_ids = list(prompt)
    while len(token_ids) < length:
        token_ids.append(target(token_ids))
    return token_ids


def test_a_repetitive_text_takes_fewer_passes_and_stays_the_same() -> None:
    seq = Decoding(make_drafter(prompt_ngrams=False), repetitive, PROMPT)
    while len(seq.token_ids) < 100:
        seq.step()
    assert seq.token_ids == plain(repetitive, PROMPT, len(seq.token_ids))
    # Five tokens a step once the window is full, but for the first few steps.
    assert seq.num_steps < 100 / 3


def test_the_prompts_ngrams_are_drafted_from_the_first_step() -> None:
    prompt = [7, 8, 9, 10, 11, 12, 7, 8, 9, 10, 11]
    for prompt_ngrams, expected in ((True, [7, 8, 9, 10]), (False, [])):
        drafter = make_drafter(window=1, prompt_ngrams=prompt_ngrams)
        proposal = Decoding(drafter, lambda _: 12, prompt).propose()
        assert proposal is not None
        assert proposal.candidate is not None
        verified = [
            t for t, c in zip(proposal.tree.token_ids, proposal.candidate, strict=True) if c
        ]
        assert verified == expected


def test_the_window_gives_way_first_where_slots_are_short() -> None:
    options = {"ngram_size": 4, "window": 3, "guesses": 2}
    seq = Decoding(make_drafter(**options), repetitive, [1, 4, 7, 10, 2, 5, 8, 0, 3, 6, 9] * 2)
    sizes = {}
    for slots in range(14):
        proposal = seq.propose(slots=slots, nodes=min(slots, 6))
        sizes[slots] = (0, 0) if proposal is None else (proposal.num_draft_tokens, len(proposal))
    # One n-gram of three nodes; then columns of two, three and three places.
    assert sizes == {
        0: (0, 0),
        1: (1, 1),
        2: (2, 2),
        **dict.fromkeys((3, 4), (3, 3)),
        **dict.fromkeys((5, 6, 7), (3, 5)),
        **dict.fromkeys((8, 9, 10), (3, 8)),
        **dict.fromkeys((11, 12, 13), (3, 11)),
    }


def test_nothing_is_deeper_than_allowed_and_no_column_is_run_in_part() -> None:
    seq = Decoding(make_drafter(ngram_size=4, window=3), repetitive, list(range(11)) * 2)
    num_scratch = {}
    for depth in range(1, 7):
        proposal = seq.propose(depth=depth)
        assert proposal is not None
        assert max(proposal.tree.depths) <= depth
        num_scratch[depth] = len(proposal) - proposal.num_draft_tokens
    assert num_scratch == {1: 0, 2: 2, 3: 5, 4: 8, 5: 8, 6: 8}


def test_columns_that_were_not_run_wait() -> None:
    seq = Decoding(make_drafter(ngram_size=4, window=3, prompt_ngrams=False), erratic, PROMPT)
    seq.step()
    before = [list(row) for row in seq.window]
    seq.step(slots=5)  # room for two columns
    after = seq.window
    assert [row[2] for row in after] == [row[2] for row in before]
    assert [row[1] for row in after[:-1]] == [row[1] for row in before[1:]]


def test_a_merged_proposal_moves_the_window_as_its_own_does() -> None:
    """Other nodes come first, one of the window's is shared, and the last column is cut off."""
    alone, merged = (
        Decoding(make_drafter(ngram_size=4, window=3, prompt_ngrams=False), erratic, PROMPT)
        for _ in range(2)
    )
    for _ in range(4):
        alone.step()
        merged.step()
    other = Proposal(TokenTree([merged.window[1][0], 33, 34], [-1, 0, -1]))
    alone.step(slots=5)
    own = merged.step(other, max_nodes=9)
    assert own is not None
    assert len(own) == 8
    assert merged.token_ids == alone.token_ids
    assert merged.window == alone.window


def test_a_proposal_that_was_not_used_leaves_the_window_where_it_is() -> None:
    seq = Decoding(make_drafter(), erratic, PROMPT)
    seq.propose()
    before = [list(row) for row in seq.window]
    other = Proposal(TokenTree([3], [-1]))
    verdict = verify_coupled(other.tree, [3, 4])
    top = torch.tensor([[3], [4]])
    seq.drafter.observe([StepResult("a", other, verdict, [3, 4], {}, top_token_ids=top)])
    assert seq.window == before


def test_confidence_is_learnt_and_siblings_share_it() -> None:
    seq = Decoding(make_drafter(prompt_ngrams=False, guesses=4), repetitive, PROMPT)
    first: list[float] = []
    while len(seq.token_ids) < 200:
        proposal = seq.step()
        assert proposal is not None
        assert proposal.confidence is not None
        sums: dict[int, float] = {}
        for node, chance in enumerate(proposal.confidence):
            assert 0.0 <= chance <= 1.0
            assert proposal.is_candidate(node) == (chance > 0.0)
            parent = proposal.tree.parents[node]
            sums[parent] = sums.get(parent, 0.0) + chance
        assert all(total <= 1.0 + 1e-12 for total in sums.values())
        if proposal.num_draft_tokens:
            first.append(proposal.confidence[0])
    assert first[0] < first[-1]
    assert first[-1] > 0.9


def test_a_sequence_that_is_dropped_begins_anew_and_the_pool_stays() -> None:
    seq = Decoding(make_drafter(), repetitive, PROMPT)
    for _ in range(5):
        seq.step()
    num_ngrams = seq.drafter.stats()["num_ngrams"]
    assert seq.drafter.stats()["num_sequences"] == 1
    seq.drafter.drop("a")
    assert seq.drafter.stats() == {
        "num_sequences": 0,
        "num_ngrams": num_ngrams,
        "num_first_tokens": seq.drafter.stats()["num_first_tokens"],
    }
    assert num_ngrams > 0
    assert seq.step() is not None


@pytest.mark.parametrize(
    "options",
    [
        {"window": 0},
        {"window": 2.5},
        {"ngram_size": 1},
        {"guesses": 0},
        {"guesses": True},
        {"max_first_tokens": 0},
        {"prompt_ngrams": 1},
        {"level": 5},
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        make_drafter(**options)


def test_a_rule_for_chains_is_refused() -> None:
    with pytest.raises(ValueError, match="acceptance='block'"):
        make_drafter(acceptance="block")


def test_slots_follow_from_the_options() -> None:
    drafter = make_drafter(window=3, ngram_size=4, guesses=5)
    assert (drafter.num_speculative_tokens, drafter.max_scratch_slots) == (15, 8)
    assert make_drafter(num_speculative_tokens=6).num_speculative_tokens == 6
