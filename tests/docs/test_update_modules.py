"""The table of modules is what their docstrings say, and every module has a row."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()


@pytest.fixture(scope="module")
def script() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "update_modules.py")))


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package `top` with a module, an inner package, and a command."""
    files = {
        "top/__init__.py": '"""Is the package itself."""\n',
        "top/alone.py": '"""Stands alone.\n\nAnd says more.\n"""\n',
        "top/inner/__init__.py": '"""Holds one module."""\n',
        "top/inner/first.py": '"""Comes first."""\nx = 1\n',
        "top/cli/main.py": "",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "top"


def test_the_page_has_the_docstrings_as_they_are(script: SimpleNamespace) -> None:
    assert script.updated(PAGE) == PAGE, "run python docs/update_modules.py"


def test_every_module_below_the_command_has_a_row(script: SimpleNamespace) -> None:
    modules = {
        path.relative_to(script.PACKAGE).with_suffix("").as_posix()
        for path in script.PACKAGE.rglob("*.py")
        if path.stem not in ("__init__", "__main__") and path.parent.name != "cli"
    }
    assert len(modules) > 100
    assert [name for name in sorted(modules) if f"\n| `{name}` | " not in PAGE] == []


def test_rows_are_first_lines_and_packages_lead_their_modules(
    script: SimpleNamespace, package: Path
) -> None:
    assert script.table(package).splitlines()[2:] == [
        "| `alone` | Stands alone. |",
        "| **inner/** | Holds one module. |",
        "| `inner/first` | Comes first. |",
    ]


@pytest.mark.parametrize(
    "text", ["", '"""No sentence"""\n', '"""A sentence. And half of\nanother."""\n']
)
def test_a_module_without_a_sentence_on_its_first_line_is_refused(
    script: SimpleNamespace, package: Path, text: str
) -> None:
    (package / "alone.py").write_text(text)
    with pytest.raises(ValueError, match=r"alone\.py must begin with a line"):
        script.table(package)


def test_a_changed_docstring_changes_the_page(script: SimpleNamespace, package: Path) -> None:
    page = script.updated(f"# Top\n{script.BEGIN}{script.END}The end\n", package)
    (package / "inner" / "first.py").write_text('"""Comes last."""\n')
    changed = script.updated(page, package)
    assert changed == page.replace("Comes first", "Comes last") != page


def test_a_page_without_its_markers_is_refused(script: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="must have the lines"):
        script.updated("# Architecture\n")
