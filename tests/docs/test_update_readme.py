"""The README's table is what the committed rows say, and its numbers agree with each other."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from docs import update
from docs.tables import readme

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ROWS = [
    json.loads(line)
    for line in (ROOT / "benchmarks" / "results" / "peers.jsonl").read_text().splitlines()
]


def row(contestant: str, seconds: list[float], cell: tuple[str, str], **extra: Any) -> Any:
    source = {
        "command": "python -m benchmarks.peers.compare",
        "time": "2026-01-02",
        "cpu": "Some CPU",
        "torch": "2.0",
        "git_commit": "0123456789abcdef",
        "git_uncommitted_changes": False,
    }
    return {
        **dict(zip(("checkpoint", "task"), cell, strict=True)),
        **{"benchmark": "peers", "dtype": "bfloat16", "temperature": 0.0, "batch": 1},
        **{"contestant": contestant, "peer": contestant.split()[0], "group": 0, "threads": 2},
        **{"num_prompts": 4, "max_tokens": 25, "rounds": len(seconds), "seconds": seconds},
        "provenance": source,
        **extra,
    }


def rows_of() -> list[Any]:
    """A run of every cell, in which the fastest peer is `b lookup`."""
    return [
        row(contestant, seconds, cell)
        for cell in readme.CELLS
        for contestant, seconds in {
            "folospec plain": [2.0, 2.0],
            "folospec auto": [1.0, 0.6],
            "folospec suffix": [0.1, 0.1],
            "a plain": [3.0, 3.0],
            "b lookup": [1.0, 1.5],
            "llama_cpp_q4_1 plain": [0.1, 0.1],
        }.items()
    ]


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+", line)]


def test_the_readme_is_what_the_committed_rows_say() -> None:
    assert update.updated(README, ROWS, "README.md") == README, "run python -m docs.update"
    assert update.updated(README, rows_of(), "README.md") != README


def test_every_ratio_is_the_quotient_of_its_neighbours() -> None:
    lines = re.findall(r"^\| .*\d\.\d.*\|$", readme.text(ROWS), re.M)
    assert len(lines) == len(readme.CELLS)
    for line in lines:
        plain, auto, peer, *ratios = numbers(line)
        for other, (value, low, high) in zip((plain, peer), (ratios[:3], ratios[3:]), strict=True):
            assert abs(value - auto / other) < 0.01
            assert low <= value <= high


def test_a_line_has_the_fastest_peer_of_the_same_weights() -> None:
    section = readme.text(rows_of())
    cells = "| 50.0 | 125.0 | 80.0 (b lookup) | 2.50 (2.00 to 3.33) | 1.56 (1.00 to 2.50) |"
    assert section.count(cells) == len(readme.CELLS)
    for word in ("Some CPU", "0123456789", "2 rounds of 4 prompts", "25 new tokens"):
        assert word in section


def test_the_newest_run_of_a_cell_counts() -> None:
    rows = rows_of()
    old = [{**r, "provenance": {**r["provenance"], "time": "2026-01-01"}} for r in rows]
    other = [{**r, "temperature": 0.8} for r in rows]
    assert readme.newest([*rows, *old, *other]) == readme.newest(rows) == rows


def test_a_cell_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="there must be rows of"):
        readme.newest(rows_of()[6:])


def test_what_did_not_take_turns_is_refused() -> None:
    rows = [{**r, "group": int(r["peer"] == "b")} for r in rows_of()]
    with pytest.raises(ValueError, match="in one group"):
        readme.text(rows)


def test_other_rounds_are_refused() -> None:
    rows = [{**r, "seconds": r["seconds"][: 1 + (r["peer"] != "b")]} for r in rows_of()]
    with pytest.raises(ValueError, match="the same rounds and tokens"):
        readme.text(rows)
