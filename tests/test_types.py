"""The types of the package: every function has them, and mypy, run on a user's script, takes what
the documentation shows and reports what is wrong."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
QUICK_START = re.findall(r"^```python\n(.*?)^```\n", README, re.MULTILINE | re.DOTALL)[0]
RIGHT = f"""
{QUICK_START}
draft_model = {{"method": "draft_model", "model": "folospec-demo-draft"}}
drafters = ["suffix", draft_model]
LLM("folospec-demo", speculative=drafters)
LLM("folospec-demo", speculative=["suffix", "draft_model"])
merged = {{"drafters": drafters, "merge": True}}
llm = LLM("folospec-demo", speculative=merged)
LLM("folospec-demo", speculative={{**draft_model, "num_speculative_tokens": 12}})
texts: list[str] = [output.outputs[0].text for output in llm.generate([[1, 2], [3]])]
with LLM("folospec-demo", speculative=None, dtype="float64") as engine:
    for increment in engine.stream("text"):
        print(increment.text, increment.token_ids)
"""
WRONG = """\
from folospec import LLM, SamplingParams

LLM("folospec-demo", speculative=5)
LLM("folospec-demo").generate(["text"], "temperature=0")
number: int = LLM("folospec-demo").generate("text")[0].outputs[0].text
LLM("folospec-demo").generat("text")
SamplingParams(temperature="high")
"""
WRONG_LINES = {3: "arg-type", 4: "arg-type", 5: "assignment", 6: "attr-defined", 7: "arg-type"}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, str]]:
    """What mypy reports of the scripts and the examples: by name, the code of the error by line.

    The package is on the path as an installed one is: without py.typed mypy would not read it.
    """
    pytest.importorskip("mypy")
    folder = tmp_path_factory.mktemp("user")
    scripts = {"right.py": RIGHT, "wrong.py": WRONG}
    scripts |= {f"example_{path.name}": path.read_text() for path in EXAMPLES}
    for name, text in scripts.items():
        (folder / name).write_text(text)
    command = [sys.executable, "-m", "mypy", "--config-file=", "--no-error-summary"]
    done = subprocess.run(
        [*command, *scripts],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    found: dict[str, dict[int, str]] = {name: {} for name in scripts}
    for line in done.stdout.splitlines():
        match = re.fullmatch(r"(\w+\.py):(\d+): error: .*\[([\w-]+)\]", line)
        if match is None:
            assert re.fullmatch(r"\w+\.py:\d+: note: .*", line), line
        else:
            found[match[1]][int(match[2])] = match[3]
    assert not done.stderr
    return found


@pytest.mark.slow
def test_mypy_takes_the_quick_start_lists_and_mappings(reports: dict[str, dict[int, str]]) -> None:
    assert reports["right.py"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_mypy_takes_the_examples(reports: dict[str, dict[int, str]], example: Path) -> None:
    assert reports[f"example_{example.name}"] == {}


@pytest.mark.slow
def test_mypy_reports_what_is_wrong_in_a_users_script(reports: dict[str, dict[int, str]]) -> None:
    assert reports["wrong.py"] == WRONG_LINES


def untyped(source: str) -> Iterator[str]:
    """The names of functions without types, apart from kernels of Triton."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue
        arguments = node.args
        given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        given += filter(None, (arguments.vararg, arguments.kwarg))
        missing = [a.arg for a in given if a.annotation is None and a.arg not in ("self", "cls")]
        if missing or node.returns is None:
            yield node.name


def test_every_function_of_the_package_has_types() -> None:
    """mypy checks it too, but leaves out modules in which kernels of Triton are."""
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / "folospec").rglob("*.py")
        for name in untyped(path.read_text())
    }
    assert found == set()


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("def f(a): return a", ["f"]),
        ("def f(a: int): return a", ["f"]),
        ("def f(*rest) -> None: ...", ["f"]),
        ("class A:\n    def f(self) -> None: ...", []),
        ("@triton.jit\ndef f(a): return a", []),
    ],
)
def test_a_function_without_types_is_found(source: str, names: list[str]) -> None:
    assert list(untyped(source)) == names
