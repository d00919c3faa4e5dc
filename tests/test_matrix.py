"""The runner of the matrix: what it counts as green, and that its rows set what they say."""

from __future__ import annotations

import json
from pathlib import Path

import matrix
import pytest
from matrix import Row

PASSING = "def test_it(): assert True"


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A suite of one file, which a test writes."""
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setattr(matrix, "processor_flags", lambda: {"avx2"})
    # The other plugins take much longer to load than these tests to run.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p xdist.plugin")
    return tmp_path / "test_one.py"


def outcomes(suite: Path, *rows: Row, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    monkeypatch.setattr(matrix, "ROWS", rows)
    out = suite.parent / "rows.jsonl"
    code = matrix.main(["--tests", str(suite), "--workers", "0", "--out", str(out)])
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert code == int(any(row["outcome"] == "failed" for row in found))
    return found


def test_a_row_with_a_failure_is_red_and_names_it(suite: Path, monkeypatch: pytest.MonkeyPatch):
    suite.write_text("def test_it(): assert False")
    [row] = outcomes(suite, Row("as it is"), monkeypatch=monkeypatch)
    assert (row["outcome"], row["failed"]) == ("failed", 1)
    assert "test_one.py::test_it" in row["failures"][0]


@pytest.mark.parametrize("text", ["", "import pytest; pytest.skip(allow_module_level=True)"])
def test_a_row_that_ran_nothing_is_red(suite: Path, monkeypatch: pytest.MonkeyPatch, text: str):
    suite.write_text(text)
    [row] = outcomes(suite, Row("as it is"), monkeypatch=monkeypatch)
    assert (row["outcome"], row["passed"]) == ("failed", 0)


def test_a_row_for_another_processor_is_skipped_and_counted(
    suite: Path, monkeypatch: pytest.MonkeyPatch
):
    suite.write_text(PASSING)
    rows = (Row("wide", flags=("avx2", "avx512f")), Row("as it is"))
    found = outcomes(suite, *rows, monkeypatch=monkeypatch)
    assert [row["outcome"] for row in found] == ["skipped: no avx512f", "passed"]
    assert found[1]["passed"] == 1


def test_a_row_sets_its_environment_and_hides_compilers(
    suite: Path, monkeypatch: pytest.MonkeyPatch
):
    suite.write_text(
        "import os, shutil\n"
        "def test_it():\n"
        "    assert os.environ['SOME_SETTING'] == 'on'\n"
        "    assert shutil.which('ls')\n"
        "    assert not any(map(shutil.which, ('c++', 'g++', 'clang++', 'cc', 'gcc')))\n"
    )
    setting = {"SOME_SETTING": "on"}
    rows = (Row("bare", setting, has_compiler=False), Row("with compilers", setting))
    bare, usual = outcomes(suite, *rows, monkeypatch=monkeypatch)
    assert bare["outcome"] == "passed"
    assert usual["outcome"] == ("failed" if matrix.shutil.which("cc") else "passed")


def test_rows_run_together_under_all_their_settings():
    rows = [
        Row("a", {"A": "1"}, ("avx2", "fma")),
        Row("b", {"B": "2"}, ("fma",), has_compiler=False),
        Row("c", is_loaded=True),
    ]
    expected = Row("a + b + c", {"A": "1", "B": "2"}, ("avx2", "fma"), False, True)
    assert matrix.together(rows) == expected
    with pytest.raises(ValueError, match="'A'"):
        matrix.together([rows[0], Row("d", {"A": "3"})])


def test_rows_that_contradict_each_other_are_refused(suite: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(matrix, "ROWS", (Row("x 1", {"X": "1"}), Row("x 2", {"X": "2"})))
    with pytest.raises(SystemExit):
        matrix.main(["--together", "--only", "x", "--tests", str(suite)])


def test_every_row_has_a_name_of_its_own():
    assert len({row.name for row in matrix.ROWS}) == len(matrix.ROWS)
