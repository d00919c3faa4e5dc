"""The examples of docs/trace.md are what the command prints, but for times, which hang on the
machine, and for the last digit of a percentage."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from folospec.cli.main import app

PAGE = (Path(__file__).parents[2] / "docs" / "trace.md").read_text()
CONSOLE = re.findall(r"^```console\n\$ folospec (.*?)\n(.*?)^```", PAGE, re.M | re.S)


def is_like(shown: str, printed: str) -> bool:
    def text_of(line: str) -> str:
        return re.sub(r"[\d.]+ ms|\d+%", "#", line).rstrip()

    def percent(line: str) -> list[int]:
        return [int(found) for found in re.findall(r"(\d+)%", line)]

    if text_of(shown) != text_of(printed):
        return False
    return all(abs(a - b) <= 1 for a, b in zip(percent(shown), percent(printed), strict=True))


def test_the_examples_are_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(CONSOLE) == 4
    for command, shown in CONSOLE:
        result = CliRunner().invoke(app, shlex.split(command), terminal_width=100)
        assert result.exit_code == 0, result.output
        printed = iter(result.output.splitlines())
        wanted = [line for line in shown.splitlines() if line != "..."]
        missing = [line for line in wanted if not any(is_like(line, other) for other in printed)]
        assert missing == [], command
