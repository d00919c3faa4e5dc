"""What is printed fits the terminal: the help 80 columns, tables 60, with no cell cut off."""

from __future__ import annotations

import pytest
from rich.console import Console
from typer.main import get_command

from folospec.cli.batch import Totals
from folospec.cli.main import app
from folospec.cli.render import Measurement, rate_table, summary_lines
from folospec.cli.runner import Counts


def check(text, width):
    assert text.strip()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text


@pytest.mark.parametrize("command", ["generate", "demo", "info", "steps"])
def test_the_help_fits_80_columns(folospec, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    result = folospec(command, "--help")
    assert result.exit_code == 0
    check(result.stdout, 80)


@pytest.mark.parametrize("width", [40, 60, 79, 80, 120])
@pytest.mark.parametrize("command", ["generate", "demo", "info", "steps"])
def test_the_help_has_every_option_whole(folospec, monkeypatch, command, width):
    monkeypatch.setenv("COLUMNS", str(width))
    result = folospec(command, "--help")
    names = [n for option in get_command(app).commands[command].params for n in option.opts]
    assert [name for name in names if name.startswith("--") and name not in result.stdout] == []
    assert "…" not in result.stdout
    assert ("╭" in result.stdout) == (width >= 80)


@pytest.mark.parametrize("width", [60, 80])
def test_info_fits(folospec, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    result = folospec("info")
    assert result.exit_code == 0
    check(result.stdout, width)


@pytest.mark.parametrize("width", [60, 80])
def test_the_table_of_rates_fits(width):
    counts = Counts(12345, 1234, 12345, 10000)
    rows = [Measurement(name, 123456, 12.3, counts, True) for name in ("plain", "draft_model")]
    if width == 80:
        rows.append(Measurement("suffix,draft_model,ngram", 123456, 12.3, counts, True))
    console = Console(width=width)
    with console.capture() as capture:
        console.print(rate_table(rows, width))
    check(capture.get(), width)


def test_the_summary_fits_80_columns():
    counts = Counts(123456, 1234567, 9999999, 8888888)
    totals = Totals(1000000, 1000, 128, 12345678, 9876.5, True, counts)
    check("\n".join(summary_lines(totals, 1000000)), 80)


@pytest.mark.parametrize("width", [60, 80])
def test_steps_are_not_cut_off(folospec, target, tmp_path, monkeypatch, width):
    """A draft is one line, however long; the terminal wraps it."""
    monkeypatch.setenv("COLUMNS", str(width))
    trace = tmp_path / "trace"
    draft = ("--speculative", '{"method": "ngram", "prompt_lookup_min": 1}')
    options = ("--model", target, "--max-tokens", "40", "--trace", trace)
    assert folospec("generate", "w1 w2 w1", *options, *draft).exit_code == 0
    shown = folospec("steps", trace).stdout
    assert "…" not in shown
    assert shown.count("step ") >= 10
