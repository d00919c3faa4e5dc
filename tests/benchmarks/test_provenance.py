"""What is not known of a run is not claimed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks.lib import provenance


def test_where_there_is_no_git_nothing_is_said_of_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    found = provenance.provenance([str(tmp_path / "script.py")])
    assert found["git_commit"] is found["git_uncommitted_changes"] is None


@pytest.mark.parametrize(
    ("script", "command"),
    [
        ("benchmarks/engine/throughput.py", "python -m benchmarks.engine.throughput --rounds 1"),
        ("gpu_check/__main__.py", "python -m gpu_check --rounds 1"),
    ],
)
def test_the_command_is_one_that_runs_from_the_root(script: str, command: str) -> None:
    path = provenance.ROOT / script
    assert path.is_file()
    assert provenance.provenance([str(path), "--rounds", "1"])["command"] == command


@pytest.mark.parametrize(("text", "changed"), [("one", False), ("other", True)])
def test_changes_of_tracked_files_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, changed: bool
) -> None:
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    tracked = tmp_path / "tracked"
    tracked.write_text("one")
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init"], ["add", "tracked"], [*author, "commit", "-m", "first"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)
    tracked.write_text(text)
    assert (
        provenance.provenance([str(tmp_path / "script.py")])["git_uncommitted_changes"] is changed
    )


@pytest.mark.parametrize(
    ("info", "name"),
    [
        (
            "model name : AMD EPYC\ncpu family : 25\nmodel : 1\nflags : sse avx2\n",
            "AMD EPYC (family 25, model 1, AVX2)",
        ),
        (
            "cpu family : 6\nmodel : 143\nmodel name : Xeon\nflags : avx2 avx512f\n",
            "Xeon (family 6, model 143, AVX-512)",
        ),
        ("model name : Cortex-A72\nFeatures : asimd\n", "Cortex-A72"),
    ],
)
def test_processors_of_one_name_are_told_apart(
    info: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(info)
    monkeypatch.setattr(provenance, "Path", lambda _: path)
    assert provenance._cpu_name() == name
