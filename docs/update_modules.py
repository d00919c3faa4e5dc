"""Write the table of modules of docs/architecture.md from the first lines of their docstrings.

python docs/update_modules.py
"""

from __future__ import annotations

import ast
from pathlib import Path

PAGE = Path(__file__).with_name("architecture.md")
PACKAGE = Path(__file__).parents[1] / "folospec"
BEGIN = "<!-- modules: written by docs/update_modules.py -->\n"
END = "<!-- end of modules -->\n"


def module_paths(package: Path = PACKAGE) -> list[Path]:
    """The modules below the command: those of the package itself, then its packages in order, each
    led by its `__init__.py`."""
    paths = [path for path in package.rglob("*.py") if path.parent.name != "cli"]
    own = [path for path in paths if path.parent == package and not path.stem.startswith("__")]
    return sorted(own) + sorted(
        (path for path in paths if path.parent != package),
        key=lambda path: (path.parent.parts, path.stem != "__init__", path.stem),
    )


def summary(path: Path) -> str:
    """The first line of a module's docstring.

    Raises:
        ValueError: there is none, or it is not one sentence on a line of its own.
    """
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    first, _, rest = docstring.partition("\n")
    if not first.endswith(".") or (rest and not rest.startswith("\n")):
        raise ValueError(f"the docstring of {path} must begin with a line that is a sentence")
    return first


def table(package: Path = PACKAGE) -> str:
    """A row for every module, and one for every package in front of its modules."""
    lines = ["| module | what it does |\n|---|---|\n"]
    for path in module_paths(package):
        name = path.relative_to(package).with_suffix("").as_posix()
        shown = f"**{name.removesuffix('__init__')}**" if path.stem == "__init__" else f"`{name}`"
        lines.append(f"| {shown} | {summary(path)} |\n")
    return "".join(lines)


def updated(page: str, package: Path = PACKAGE) -> str:
    """Return the page with its table filled in.

    Raises:
        ValueError: the page lacks a marker, or a module the first line of a docstring.
    """
    before, found, rest = page.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"the page must have the lines {BEGIN!r} and {END!r}")
    return before + BEGIN + table(package) + END + after


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
