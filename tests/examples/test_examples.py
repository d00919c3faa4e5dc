"""Every example runs, stays short, and shows what it says."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SHOWS = {  # what must be in the output, how often at least
    "01_generate.py": (" tokens, ended by ", 3),
    "02_speculative.py": ("  yes", 3),
    "03_fork_draft_verify_merge.py": ("BlockCopy", 1),
    "04_custom_drafter.py": ("tokens equal: yes", 2),
    "05_stream.py": ("tokens per increment: [", 1),
    "06_sampling_seeded.py": ("tokens equal: yes", 4),
    "07_learning_drafter.py": (" drafts accepted", 6),
    "08_engine_loop.py": (" finished by ", 2),
}


def test_every_example_is_tested() -> None:
    assert sorted(p.name for p in EXAMPLES.glob("*.py")) == sorted(SHOWS)


@pytest.mark.parametrize("name", SHOWS)
def test_example_is_under_60_lines(name: str) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) < 60


@pytest.mark.parametrize("name", SHOWS)
def test_example_runs_and_shows_what_it_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    printed = capsys.readouterr().out
    text, count = SHOWS[name]
    assert printed.count(text) >= count
    assert "equal: no" not in printed


def test_a_drafter_of_ones_own_takes_less_than_40_lines() -> None:
    assert len((EXAMPLES / "04_custom_drafter.py").read_text().splitlines()) < 40
