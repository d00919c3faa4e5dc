"""What the engine takes over from a drafter is checked, and its own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from folospec.core.token_tree import TokenTree
from folospec.spec.acceptance import ACCEPTANCE
from folospec.spec.checks import AnswerLimits, ProposalChecks, take_answers, take_progress
from folospec.spec.proposal import Proposal
from folospec.spec.read_only import ReadOnlyList

VOCAB_SIZE = 6
LIMITS = AnswerLimits("mine", "kv", num_tokens=9, max_draft_tokens=3, num_slots=4)
CHAIN = TokenTree.chain([1, 2, 3])
EVEN = torch.full((3, VOCAB_SIZE), 1.0 / VOCAB_SIZE)


def take(answer: Any, rule: str = "coupled") -> Proposal | None:
    checks = ProposalChecks(ACCEPTANCE[rule], VOCAB_SIZE, torch.device("cpu"))
    return checks.take(answer, LIMITS)


def test_numbers_of_numpy_become_those_of_python() -> None:
    tree = TokenTree.chain(np.array([1, 2, 3]))
    slots = {"kv": [np.int64(1), None, np.int64(3)]}
    taken = take(Proposal(tree, confidence=np.array([0.5, 0.25, 1.0]), draft_slots=slots))
    assert taken is not None
    values = (*taken.tree.token_ids, *taken.confidence, *taken.draft_slots["kv"])
    assert values == (1, 2, 3, 0.5, 0.25, 1.0, 1, None, 3)
    assert {type(value) for value in values} == {int, float, type(None)}


def test_what_is_taken_is_out_of_the_drafters_hands() -> None:
    probs = EVEN.clone()
    answer = Proposal(TokenTree.chain([1, 2, 3]), probs, draft_slots={"kv": [1, 2, None]})
    taken = take(answer, "rejection")
    probs.zero_()
    answer.draft_slots.clear()  # type: ignore[attr-defined]
    object.__setattr__(answer.tree, "token_ids", (5, 5, 5))
    assert taken is not None
    assert taken.tree.token_ids == (1, 2, 3)
    assert taken.draft_slots == {"kv": (1, 2, None)}
    assert torch.equal(taken.draft_probs, EVEN)


def test_a_rule_that_shares_noise_has_no_use_for_probs() -> None:
    taken = take(Proposal(CHAIN, torch.full((3, 2), math.nan)))
    assert taken is not None
    assert taken.draft_probs is None


def test_a_confidence_that_is_out_by_rounding_is_clipped() -> None:
    taken = take(Proposal(CHAIN, confidence=[1.0 + 1e-7, -1e-9, 0.5]))
    assert taken is not None
    assert taken.confidence == (1.0, 0.0, 0.5)


@pytest.mark.parametrize("answer", [None, Proposal(TokenTree())])
def test_no_nodes_are_no_proposal(answer: Proposal | None) -> None:
    assert take(answer) is None


@pytest.mark.parametrize(
    ("probs", "message"),
    [
        (EVEN[:, :4], r"must be \[3, 6\]"),
        (EVEN.half(), "float32 or float64"),
        (EVEN.long(), "float32 or float64"),
        (EVEN.to_sparse(), "dense"),
        (EVEN.to("meta"), "on cpu"),
        (EVEN.numpy(), "dense Tensor, got a ndarray"),
        (EVEN * 1.01, "sum to 1"),
        (EVEN - torch.eye(3, 6) + torch.eye(3, 6).roll(1, 1), "at least 0"),
        (EVEN * math.nan, "finite"),
        (EVEN * math.inf, "finite"),
    ],
)
def test_probs_that_are_no_distribution_are_refused(probs: Any, message: str) -> None:
    answer = Proposal(CHAIN)
    object.__setattr__(answer, "draft_probs", probs)
    with pytest.raises(ValueError, match=message):
        take(answer, "rejection")


@pytest.mark.parametrize(
    "slots",
    [{"kv": [1, 1, None]}, {"kv": [0, 1, 2]}, {"kv": [1, 2, 5]}, {"other": [1, 2, 3]}],
)
def test_slots_are_the_drafters_own_in_range_and_used_once(slots: Any) -> None:
    with pytest.raises(ValueError, match="draft_slots must be"):
        take(Proposal(CHAIN, draft_slots=slots))


@pytest.mark.parametrize("progress", [-1, 10, 2.0, True, None, "3"])
def test_progress_is_a_count_of_tokens(progress: Any) -> None:
    assert take_progress(np.int32(9), LIMITS) == 9
    with pytest.raises(ValueError, match="num_draft_computed must be"):
        take_progress(progress, LIMITS)


@pytest.mark.parametrize("answers", [None, iter([None]), {0: None}, "a", [], [None, None]])
def test_answers_are_a_list_of_one_for_each_request(answers: Any) -> None:
    with pytest.raises(ValueError, match="must"):
        take_answers(answers, 1)


class TestReadOnlyList:
    def test_it_shows_the_list_as_it_grows(self) -> None:
        values = [1, 2, 3]
        view = ReadOnlyList(values)
        values.append(4)
        assert len(view) == 4
        assert (view[-1], view[1:3], list(view), 4 in view) == (4, [2, 3], [1, 2, 3, 4], True)
        assert view == [1, 2, 3, 4] == view
        assert np.array(view).tolist() == torch.tensor(view).tolist() == values

    def test_nothing_that_it_gives_changes_the_list(self) -> None:
        values = [1, 2, 3]
        view: Any = ReadOnlyList(values)
        view[:].append(9)
        np.array(view)[0] = 9
        np.asarray(view)[0] = 9
        for change in ("append", "extend", "insert", "pop", "clear", "__setitem__", "__iadd__"):
            assert not hasattr(view, change)
        assert values == [1, 2, 3]
