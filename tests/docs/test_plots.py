"""The plots of the pages are small, and their text can be read and searched."""

from __future__ import annotations

from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PLOTS = sorted(DOCS.rglob("*.svg"))
MOST_BYTES = 100_000


def test_there_are_plots() -> None:
    assert PLOTS


@pytest.mark.parametrize("path", PLOTS, ids=lambda path: path.name)
def test_a_plot_is_small_and_its_text_is_text(path: Path) -> None:
    data = path.read_bytes()
    assert len(data) < MOST_BYTES
    assert b"</text>" in data
