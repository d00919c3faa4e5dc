"""The README's picture shows what the command prints, and refers to nothing outside of itself."""

import html
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PICTURE = (DOCS / "pictures" / "steps.svg").read_text()


@pytest.fixture(scope="module")
def script() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(DOCS / "draw_steps.py")))


def lines_of(svg: str) -> list[str]:
    """The texts of a picture by line, without what depends on the machine: times and confidence."""
    lines: dict[str, str] = {}
    for y, text in re.findall(r'<text class="steps-r\d+"[^>]* y="([\d.]+)"[^>]*>(.*?)</text>', svg):
        lines[y] = lines.get(y, "") + html.unescape(text).replace("\xa0", " ")
    shown = [re.sub(r"\d+\.\d ms", "? ms", line).rstrip() for line in lines.values()]
    return [re.sub(r" +\d+%", " ?%", line) for line in shown]


def test_the_picture_shows_what_the_command_prints(script: SimpleNamespace) -> None:
    assert lines_of(script.drawn()) == lines_of(PICTURE), "run python docs/draw_steps.py"


def test_the_picture_shows_a_tree_and_every_verdict() -> None:
    text = "\n".join(lines_of(PICTURE))
    assert "$ folospec generate 'class Stack:'" in text
    tokens = re.findall(r"(\d+) tokens?  \? ms", text)
    assert (len(tokens), sum(map(int, tokens))) == (4, 11), "the README says so"
    for mark in ("+'", "-'", "~'", "='", "`-- ", " accepted ", "? ms", "?%"):
        assert mark in text


def test_the_picture_is_small_and_stands_alone(script: SimpleNamespace) -> None:
    assert len(PICTURE) < 100_000
    assert set(re.findall(r"\w+://[^\"')\s]+", PICTURE)) == {"http://www.w3.org/2000/svg"}
    font = "@font-face {\n src: url(https://a.b/c);\n}\n"
    assert script.without_links(f"<style>\n{font}.r1 {{}}</style>") == "<style>\n.r1 {}</style>"
