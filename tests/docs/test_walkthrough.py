"""The walkthrough says what the code prints, and shows what it is about."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "walkthrough.md").read_text()
SHOWN = [
    "accepted path: [2, 4]",  # a child that is not the first one
    "move rows: 3 -> 1, 5 -> 2",
    "as plain decoding: True",
    "promises tokens: ",
    "promises distribution: ",
    "PREEMPTED",
    "second: 12 of 16 prompt tokens from the cache, tokens equal: True",
]


@pytest.fixture(scope="module")
def script() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(DOCS / "update_walkthrough.py")))


@pytest.mark.slow
def test_walkthrough_prints_what_it_says(script: SimpleNamespace) -> None:
    assert script.rendered(PAGE) == PAGE, "run python docs/update_walkthrough.py"


@pytest.mark.parametrize("line", SHOWN)
def test_walkthrough_is_not_vacuous(line: str) -> None:
    assert line in PAGE


def test_walkthrough_of_coupled_runs_says_only_that_tokens_are_equal() -> None:
    coupled = [line for line in PAGE.splitlines() if " promises tokens: " in line]
    assert len(coupled) == 2
    assert all(line.endswith("tokens equal: True") for line in coupled)


def test_an_output_that_is_not_printed_is_noticed(script: SimpleNamespace) -> None:
    page = "```python\nx = 2\nprint(x)\n```\n\n```text\n2\n```\n"
    assert script.rendered(page) == page
    for wrong in (page.replace("2\n```", "3\n```"), page.replace("\n```text\n2\n```\n", "")):
        assert script.rendered(wrong) != wrong


def test_blocks_share_a_namespace_and_print_in_their_own_place(script: SimpleNamespace) -> None:
    page = "```python\nx = 2\n```\n\ntext\n\n```python\nprint(x)\n```\n"
    assert script.rendered(page) == page + "\n```text\n2\n```\n"
