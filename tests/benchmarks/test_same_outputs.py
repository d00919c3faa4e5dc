"""A comparison of two commits sees what differs, and what says nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from benchmarks.engine.same_outputs import MUST_OCCUR, PER_DRAFT, PER_STEP, differences

COUNTS = dict.fromkeys((*PER_STEP, *PER_DRAFT, *MUST_OCCUR), 7)
RECORD: dict[str, Any] = {
    "ngram": {
        "outputs": [[{"token_ids": [1, 2], "text": "ab", "logprobs": []}]],
        "counts": {**COUNTS, "num_draft_tokens": 9},
    }
}


def test_equal_records_are_the_same() -> None:
    assert differences(RECORD, copy.deepcopy(RECORD)) == []


@pytest.mark.parametrize(
    ("part", "key", "value", "line"),
    [
        ("outputs", 0, [{"token_ids": [1, 3]}], "ngram: request 0 differs"),
        ("counts", "num_steps", 8, "ngram: num_steps is 7 and 8"),
    ],
)
def test_what_differs_is_named(part: str, key: Any, value: Any, line: str) -> None:
    other = copy.deepcopy(RECORD)
    other["ngram"][part][key] = value
    assert differences(RECORD, other) == [line]


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("num_preemptions", 0, "ngram: num_preemptions is zero"),
        ("num_accepted_tokens", 9, "ngram: nothing was rejected"),
    ],
)
def test_a_comparison_that_says_nothing_is_no_success(key: str, value: int, line: str) -> None:
    one = copy.deepcopy(RECORD)
    one["ngram"]["counts"][key] = value
    assert differences(one, copy.deepcopy(one)) == [line]
