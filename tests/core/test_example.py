import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "03_fork_draft_verify_merge.py"


def test_fork_draft_verify_merge_example_prints_what_it_promises(
    capsys: pytest.CaptureFixture[str],
) -> None:
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    assert "tokens alone: [1, 2, 3, 100, 101]" in printed
    assert "BlockCopy(src=0, dst=1)" in printed
    assert "main merged  [1, 2] [1, 2, 3, 100, 101]" in printed
    assert "free blocks  6 of 8" in printed


def test_fork_draft_verify_merge_example_stays_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 60
