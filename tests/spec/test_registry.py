"""Drafters are known by name in their own files and in the registry, and nowhere else."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

import folospec.spec.drafters  # noqa: F401 - registers
from folospec import LLM
from folospec.spec.drafters import base
from folospec.spec.drafters.base import Drafter, known_drafters, register_drafter

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


def test_a_factory_that_is_none_is_refused_when_it_is_registered() -> None:
    for name, factory in (("five", 5), ("", RepeatDrafter), ("auto", RepeatDrafter)):
        with pytest.raises(ValueError, match="drafter"):
            register_drafter(name, factory)
    assert not {"five", "", "auto"} & set(known_drafters())


class RepeatDrafter(Drafter):
    def propose(self, requests: Any) -> Any:
        return [None] * len(requests)


class WithoutContext(RepeatDrafter):
    def __init__(self) -> None: ...


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        (object, {}, "drafter 'own' cannot be made of its context: TypeError"),
        (WithoutContext, {}, "drafter 'own' cannot be made of its context: TypeError"),
        (RepeatDrafter, {"depht": 3}, "unknown option of the own drafter 'depht'; known: none"),
    ],
)
def test_what_cannot_be_a_drafter_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch, factory: Any, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(base, "_REGISTRY", {})
    register_drafter("own", factory)
    with pytest.raises(ValueError, match=message):
        LLM("folospec-demo", speculative={"method": "own", **options}, num_blocks=16)


def test_an_unknown_method_is_answered_with_the_nearest_and_with_auto() -> None:
    with pytest.raises(ValueError, match=r"one of auto, .* got 'ngrm'; did you mean 'ngram'\?"):
        base.check_drafter("ngrm")
