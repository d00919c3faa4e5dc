"""The README's Python runs as it is written, what it names is there, and it stays short."""

import re
from pathlib import Path

from page_code import printed_by, python_blocks

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = python_blocks(README)


def test_quick_start_has_eight_lines() -> None:
    assert len([line for line in BLOCKS[0].splitlines() if line]) == 8


def test_quick_start_gives_the_same_tokens() -> None:
    lines = printed_by(BLOCKS, "README.md")[0].splitlines()
    assert len(lines) == 4
    assert lines[1::2] == ["('equal:', True)"] * 2
    assert all("RequestMetrics(" in line for line in lines[::2])


def test_what_the_readme_names_is_there() -> None:
    paths = re.findall(r"\]\(([\w/.]+)(?:#[\w-]+)?\)|`((?:tests|docs|examples)/[\w/.]+)`", README)
    missing = {a or b for a, b in paths if not (ROOT / (a or b)).exists()}
    assert len(paths) > 10
    assert missing == set()


def test_every_package_is_in_the_file_tree() -> None:
    packages = [p.name for p in (ROOT / "folospec").iterdir() if (p / "__init__.py").exists()]
    assert [name for name in packages if f"\n  {name}/ " not in README] == []


def test_every_bundled_drafter_is_in_the_table() -> None:
    folder = ROOT / "folospec" / "spec" / "drafters"
    names = {path.stem for path in folder.glob("*.py")} - {"__init__", "base", "model_drafter"}
    table = README.split("## Drafters\n")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", table, re.M))))
    assert named == names | {"auto"}


def test_the_readme_fits_a_few_screens() -> None:
    assert len(README.splitlines()) <= 150
