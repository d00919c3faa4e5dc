"""The project is written in the words of its field: its old dialect stays out.

Each word below has a name that a reader of vLLM, SGLang or transformers knows already: a law is a
distribution, a walk the verification of a tree, taps are auxiliary hidden states.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("folospec", "tests", "benchmarks", "gpu_check", "examples", "training", "docs")
STEMS = re.compile(
    r"laws?|judge[sd]?|judging|judgements?|walks?|walked|twins?|taps?|tapped|purses?|moody|liars?|beliefs?"
)
NAMES = {
    "Asking",
    "Telling",
    "Observed",
    "Offer",
    "Growth",
    "Spot",
    "Trials",
    "PlanRow",
    "DraftRow",
    "LogprobsTaker",
    "Parts",
    "Increment",
    "Increments",
    "Sent",
    "RunAhead",
    "run_ahead",
    "goes_ahead",
    "row_at_a_time",
    "load_parts",
    "close_graphs",
    "captures",
    "has_fixed_shape",
    "num_top_logits",
    "stays_whole",
    "has_money",
    "earn",
    "pay",
    "lag",
    "lags",
    "view_of",
    "stated",
}
PROSE = re.compile(r"\b(laws?|judgements?|purse|walks|twins|taps|moody)\b", re.IGNORECASE)
FREE = {"ast.walk", "os.walk", "Path.walk"}


def parts_of(name):
    """The words of an identifier: "pack_law" and "ChainLaw" both have "law"."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_").split("_")


def identifiers(tree):
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Attribute):
            if f"{ast.unparse(node.value)}.{node.attr}" not in FREE:
                yield line, node.attr
        elif isinstance(node, ast.Name):
            yield line, node.id
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield line, node.name
        elif isinstance(node, (ast.arg, ast.keyword)) and node.arg:
            yield line, node.arg
        elif isinstance(node, ast.alias):
            yield from ((line, part) for part in [*node.name.split("."), node.asname or ""])


def wrong_identifiers(source):
    return [
        f"line {line}: {name}"
        for line, name in identifiers(ast.parse(source))
        if name in NAMES or any(STEMS.fullmatch(part) for part in parts_of(name))
    ]


def prose_of(source):
    """Comments and strings, line by line, without what stands in backticks."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            for offset, text in enumerate(token.string.splitlines()):
                yield token.start[0] + offset, re.sub(r"`[^`]*`", "", text)


def wrong_prose(lines):
    return [f"line {number}: {text.strip()}" for number, text in lines if PROSE.search(text)]


def sources():
    found = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(found) > 500
    return found


def test_no_identifier_is_of_the_dialect():
    found = {
        str(path.relative_to(ROOT)): wrong
        for path in sources()
        if path != Path(__file__) and (wrong := wrong_identifiers(path.read_text()))
    }
    assert found == {}


def test_no_comment_or_docstring_is_of_the_dialect():
    found = {
        str(path.relative_to(ROOT)): wrong
        for path in sources()
        if path != Path(__file__) and (wrong := wrong_prose(prose_of(path.read_text())))
    }
    assert found == {}


def test_no_page_is_of_the_dialect():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")]
    found = {}
    for page in pages:
        text = re.sub(r"`[^`\n]*`", "", page.read_text())
        if wrong := wrong_prose(enumerate(text.splitlines(), 1)):
            found[str(page.relative_to(ROOT))] = wrong
    assert len(pages) > 20
    assert found == {}


@pytest.mark.parametrize(
    "source",
    ["pack_law = 1", "class ChainLaw: ...", "def f(taps): ...", "x.walk()", "f(row_at_a_time=1)"],
)
def test_an_identifier_of_the_dialect_is_found(source):
    assert wrong_identifiers(source)


@pytest.mark.parametrize("source", ["import ast\nast.walk(x)", "flaw = lawn = 1", "replace(x)"])
def test_other_identifiers_are_free(source):
    assert wrong_identifiers(source) == []


@pytest.mark.parametrize("source", ["# the law of a row\n", '"""It walks and taps."""\n'])
def test_prose_of_the_dialect_is_found(source):
    assert wrong_prose(prose_of(source))
