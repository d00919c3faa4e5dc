"""A terminal shows what loads and what was loaded; a pipe gets neither."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from folospec import LLMEngine
from folospec.cli import runner, startup


@pytest.mark.parametrize("is_terminal", [True, False])
def test_only_a_terminal_shows_what_loads(monkeypatch, target, is_terminal):
    written = io.StringIO()
    shown = Console(file=written, force_terminal=is_terminal, width=80)
    monkeypatch.setattr(startup, "console", lambda stderr: shown)
    engine = runner.make_engine(target, num_blocks=8)
    assert isinstance(engine, LLMEngine)
    lines = written.getvalue()
    assert ("loading" in lines) is is_terminal
    assert ("float32 on cpu" in lines) is is_terminal
    assert ("attention" in lines) is is_terminal


def test_what_was_loaded_is_named(target):
    engine = runner.make_engine(target, num_blocks=8, attention_backend="torch", device="cpu")
    assert startup.describe("tiny", engine) == "tiny: float32 on cpu, torch attention"
