"""The version is the same in every file that has it, and a release that disagrees is refused."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
release = runpy.run_path(str(ROOT / ".ci" / "release.py"))


def test_the_version_is_the_same_everywhere() -> None:
    assert release["faults"](ROOT) == []


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Version 1.2.3 of a project, released."""
    (tmp_path / "folospec").mkdir()
    (tmp_path / "folospec" / "__init__.py").write_text('__version__ = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text("## [Unreleased]\n\n## [1.2.3] - 2026-01-31\n")
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 1.2.3\n")
    return tmp_path


def test_a_release_that_agrees_passes(project: Path) -> None:
    assert release["faults"](project, "v1.2.3") == []


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("folospec/__init__.py", "1.2.3", "1.2.4", "the tag is 'v1.2.3'"),
        ("CHANGELOG.md", "[1.2.3]", "[1.2.4]", "describes '1.2.4' first"),
        ("CHANGELOG.md", "2026-01-31", "unreleased", "with 'unreleased', not with a day"),
        ("CITATION.cff", "1.2.3", "1.2.2", "cites '1.2.2'"),
    ],
)
def test_a_release_that_disagrees_is_refused(
    project: Path, file: str, old: str, new: str, words: str
) -> None:
    path = project / file
    path.write_text(path.read_text().replace(old, new))
    assert words in "\n".join(release["faults"](project, "v1.2.3"))
