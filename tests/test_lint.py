"""Checks before a commit are those of `make lint`, jobs are make targets, and blanks at the ends of
lines are found."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][\w-]*):", MAKEFILE, re.MULTILINE))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
whitespace = runpy.run_path(str(ROOT / ".ci" / "whitespace.py"))


def lints(makefile: str) -> list[str]:
    """The parts of `make lint`."""
    assert re.search(r"^lint: \$\(LINTS\)$", makefile, re.MULTILINE)
    [names] = re.findall(r"^LINTS := (.+)$", makefile, re.MULTILINE)
    return names.split()


def hooks(config: str) -> dict[str, str]:
    """What each hook before a commit runs."""
    [repository] = yaml.safe_load(config)["repos"]
    return {hook["id"]: hook["entry"] for hook in repository["hooks"]}


def commands(workflow: Path) -> list[str]:
    jobs: dict[str, Any] = yaml.safe_load(workflow.read_text())["jobs"]
    steps = [step for job in jobs.values() for step in job.get("steps", [])]
    return [step["run"] for step in steps if "run" in step]


def test_the_hooks_before_a_commit_are_the_parts_of_make_lint() -> None:
    found = hooks((ROOT / ".pre-commit-config.yaml").read_text())
    names = [*lints(MAKEFILE), "lint-workflows"]
    assert found == {name: f"make {name}" for name in names}
    assert set(found) <= TARGETS


def test_a_check_that_only_make_lint_has_is_found() -> None:
    longer = MAKEFILE.replace("LINTS := ", "LINTS := lint-more ")
    assert set(lints(longer)) - set(hooks((ROOT / ".pre-commit-config.yaml").read_text())) == {
        "lint-more"
    }


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_every_job_runs_one_make_target(workflow: Path) -> None:
    for command in commands(workflow):
        make, target, *variables = command.split()
        assert (make, target in TARGETS) == ("make", True)
        assert all(re.match(r"[A-Z_]+=", variable) for variable in variables)


def test_the_jobs_of_a_change_are_what_the_local_check_runs() -> None:
    [checks] = re.findall(r"^make --keep-going (.+) <", (ROOT / ".ci" / "run").read_text(), re.M)
    jobs = {command.split()[1] for command in commands(ROOT / ".github" / "workflows" / "ci.yml")}
    assert jobs == {*checks.split(), "test-no-compiler", "lint-workflows"}


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", []),
        ("a\nb\n", []),
        ("a \nb\n", [1]),
        ("a\n\t\nb\n", [2]),
        ("a\nb", [2]),
        ("a\nb\n\n", [4]),
        ("a\r\n", [1]),
    ],
)
def test_blanks_at_the_ends_of_lines_and_files_are_found(text: str, lines: list[int]) -> None:
    assert [int(fault.partition(":")[0]) for fault in whitespace["faults"](text)] == lines


def test_whitespace_is_checked_in_text_files_under_git(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if shutil.which("git") is None:
        pytest.skip("there is no git")
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    for name, content in ((".gitignore", "out\n"), ("a.md", "a \n"), ("out", "a "), ("b", "\0 ")):
        (tmp_path / name).write_text(content)
    assert whitespace["main"](tmp_path) == 1
    assert capsys.readouterr().out == "a.md:1: blanks at the end of the line\n"
    (tmp_path / "a.md").write_text("a\n")
    assert whitespace["main"](tmp_path) == 0


def test_whitespace_is_checked_without_git_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    for name, content in (("docs", "a \n"), ("build", "a \n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.md").write_text(content)
    assert whitespace["main"](tmp_path) == 1
    assert capsys.readouterr().out == "docs/a.md:1: blanks at the end of the line\n"
