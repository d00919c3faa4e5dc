"""docs/engine.md names every sampling option, and its Python runs, as that of docs/drafters.md."""

import re
from pathlib import Path

import pytest
from page_code import printed_by, python_blocks

from folospec import SamplingParams

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "engine.md").read_text()


@pytest.fixture(scope="module")
def printed() -> list[str]:
    return printed_by(python_blocks(PAGE), "engine.md")


def test_a_stream_and_an_output_are_printed(printed: list[str]) -> None:
    *deltas, output = printed[0].splitlines()
    assert len(deltas) > 3
    assert output.startswith("(RequestOutput(request_id=")


def test_rejection_promises_the_distribution_alone(printed: list[str]) -> None:
    assert printed[1] == "('distribution',)"


def test_every_sampling_option_is_named() -> None:
    names = [n for n in SamplingParams.__dataclass_fields__ if not n.startswith("_")]
    assert [name for name in names if f"`{name}`" not in PAGE] == []


def test_a_drafter_of_your_own_drafts() -> None:
    block = python_blocks((DOCS / "drafters.md").read_text())[0]
    [metrics] = printed_by([block], "drafters.md")
    assert re.search(r"num_drafts=[1-9]", metrics)
