"""Drafters are known by name in their own files and in the registry, and nowhere else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import folospec.spec.drafters  # noqa: F401 - registers
from folospec.spec.drafters.base import known_drafters, register_drafter

PACKAGE = Path(__file__).parents[2] / "folospec"
DRAFTERS = PACKAGE / "spec" / "drafters"
BUNDLED = sorted(path.stem for path in DRAFTERS.glob("*.py"))


def names_tested_for(source: str, names: set[str]) -> list[str]:
    """Names that a comparison or a match looks for: with `==` or `in`, in a list, or as the keys of
    a table."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        sides: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.match_case):
            sides = [node.pattern]
        elif isinstance(node, ast.Dict):
            sides = [key for key in node.keys if key is not None]
        for side in sides:
            for part in ast.walk(side):
                if isinstance(part, ast.Constant) and part.value in names:
                    found.append(str(part.value))
    return found


def test_no_method_name_is_tested_for_outside_its_own_file() -> None:
    names = set(known_drafters())
    for path in PACKAGE.rglob("*.py"):
        own = {path.stem} if path.parent == DRAFTERS else set()
        found = set(names_tested_for(path.read_text(), names)) - own
        assert not found, f"{path.relative_to(PACKAGE)} tests for {sorted(found)}"


@pytest.mark.parametrize(
    "source",
    [
        'if config.method == "ngram": pass',
        'if config.method in ("suffix", "ngram"): pass',
        'match method:\n    case "ngram":\n        pass',
        'TABLE = {"ngram": 3}',
    ],
)
def test_a_name_that_is_tested_for_is_found(source: str) -> None:
    assert "ngram" in names_tested_for(source, {"ngram", "suffix"})


def test_every_file_of_a_method_is_registered_under_its_own_name() -> None:
    shared = {"__init__", "base", "model_drafter"}
    assert set(BUNDLED) - shared <= set(known_drafters())


def test_a_name_can_be_taken_once() -> None:
    with pytest.raises(ValueError, match="registered already"):
        register_drafter("ngram", lambda context: None)  # type: ignore[arg-type, return-value]
