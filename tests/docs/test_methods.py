"""docs/methods says what the code does: every drafter, every option with its default, and snippets
that run."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lib.drafters import CONTESTANTS
from folospec import LLM, SpeculativeConfig
from folospec.spec import drafters
from folospec.spec.drafters.base import DrafterContext, check_drafter, known_drafters

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {path.stem: path.read_text() for path in sorted((DOCS / "methods").glob("*.md"))}
SECTIONS = {
    name: section
    for page in PAGES.values()
    for name, section in re.findall(r"^## `(\w+)`\n(.*?)(?=^## |\Z)", page, re.M | re.S)
}
BUNDLED = sorted(
    path.stem
    for path in Path(drafters.__file__).parent.glob("*.py")
    if path.stem in known_drafters()
)
PARTS = ("**Rule.**", "- **State**", "- **Rolls back**", "- **Exact**", "**Limits.**", "```python")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```\n", page, re.M | re.S)


def options_of(section: str) -> dict[str, Any]:
    """The options of a section's tables, with their defaults; those of all drafters with a model
    where it refers to them."""
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", section, re.M)
    options = {name: ast.literal_eval(default) for name, default in rows}
    if "](draft_model.md#drafting-options)" in section:
        shared = PAGES["draft_model"].split("### Drafting options\n")[1].split("\n### ")[0]
        options |= options_of(shared)
    return options


@pytest.fixture(scope="module")
def defaults() -> dict[str, dict[str, Any]]:
    """What the code has: the options each drafter reads, and its number of draft tokens."""
    found: dict[str, dict[str, Any]] = {}
    real = DrafterContext.read_options

    def recording(self: DrafterContext, options: Any, *names: Any) -> dict[str, Any]:
        found[self.config.method] = dict(options)
        return real(self, options, *names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DrafterContext, "read_options", recording)
        for name in BUNDLED:
            (drafter,) = LLM("folospec-demo", speculative=name).engine.components.drafters
            found[name]["num_speculative_tokens"] = drafter.num_speculative_tokens
    return found


def test_every_drafter_has_a_section_and_a_line_in_the_index() -> None:
    assert sorted(SECTIONS) == BUNDLED
    assert sorted(re.findall(r"^\| \[`(\w+)`\]", PAGES["README"], re.M)) == BUNDLED


@pytest.mark.parametrize("name", BUNDLED)
def test_every_option_is_named_with_its_default(name: str, defaults: dict[str, Any]) -> None:
    assert options_of(SECTIONS[name]) == defaults[name]


def test_an_option_that_is_missing_or_wrong_is_noticed(defaults: dict[str, Any]) -> None:
    section = SECTIONS["ngram"]
    assert options_of(section) == defaults["ngram"]
    missing = re.sub(r"^\| `num_matches` .*\n", "", section, flags=re.M)
    wrong = section.replace("| `prompt_lookup_max` | `4` |", "| `prompt_lookup_max` | `5` |")
    for changed in (missing, wrong):
        assert changed != section
        assert options_of(changed) != defaults["ngram"]


@pytest.mark.parametrize("name", BUNDLED)
def test_a_section_says_how_it_works_and_where_it_falls_short(name: str) -> None:
    assert [part for part in PARTS if part not in SECTIONS[name]] == []
    assert re.search(r"\n```\n.+?\n```\n", SECTIONS[name], re.S), "the idea is not drawn"


@pytest.mark.parametrize("page", PAGES)
def test_python_runs_and_drafts(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed: list[Any] = []
    namespace = {"__name__": page, "print": lambda *values: printed.extend(values)}
    code = blocks(PAGES[page], "python")
    for block in code:
        exec(compile(block, f"{page}.md", "exec"), namespace)
    lengths = [value for value in printed if isinstance(value, float)]
    assert len(lengths) >= len(code) - 1  # the first block makes the names
    assert all(length > 1 for length in lengths), lengths


def test_json_is_what_the_engine_takes() -> None:
    found = [json.loads(block) for page in PAGES.values() for block in blocks(page, "json")]
    assert found
    for value in found:
        config = SpeculativeConfig.of(value)
        assert config is not None
        for drafter in config.drafters:
            check_drafter(drafter.method)


def test_every_contestant_of_the_benchmark_has_its_place() -> None:
    parts = re.findall(r"^<!-- measured: ([^>]+) -->$", "\n".join(PAGES.values()), re.M)
    named = {name for part in parts for name in part.split("; ")} - {"setting"}
    assert named == set(CONTESTANTS)


def test_links_lead_somewhere() -> None:
    pages = [*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"]
    anchors = {path: anchors_of(path.read_text()) for path in pages}
    broken = []
    for page in pages:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" in target:
                continue
            file, _, anchor = target.partition("#")
            path = (page.parent / file).resolve() if file else page
            if not path.exists() or (anchor and anchor not in anchors[path]):
                broken.append(f"{page.name}: {target}")
    assert broken == []


def test_tests_that_are_named_exist() -> None:
    named = {
        path
        for page in DOCS.rglob("*.md")
        for path in re.findall(r"`(tests/[\w/]+\.py)`", page.read_text())
    }
    assert named
    assert [path for path in sorted(named) if not (ROOT / path).is_file()] == []


def anchors_of(text: str) -> set[str]:
    """The anchors that headings get."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
