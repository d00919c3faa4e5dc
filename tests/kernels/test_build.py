"""The kernels are built once, found again, and left out in words where they cannot be built."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from native_builds import require_native

from folospec import LLM, SamplingParams
from folospec.kernels import build, native, native_children

PRETEND = '[ "$1" = --version ] && exit\nfor last; do :; done'
"""Has no version, and knows the name of the file to write."""


def compiler(folder: Path, body: str) -> str:
    """Write a program that stands for the compiler."""
    path = folder / "fake-compiler"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def fresh(tmp_path, monkeypatch) -> Path:
    """A cache with nothing in it."""
    monkeypatch.setenv("FOLOSPEC_CACHE_DIR", str(tmp_path / "cache"))
    build._fingerprint.cache_clear()
    yield tmp_path / "cache" / "kernels"
    build._fingerprint.cache_clear()


@pytest.fixture
def pretend(fresh, monkeypatch, tmp_path) -> Path:
    """A compiler that makes small files at once, one line to its log for each."""
    log = tmp_path / "log"
    body = f'echo "$*" >> {log}\necho lib > $last'
    monkeypatch.setenv("CXX", compiler(tmp_path, f"{PRETEND}\n{body}"))
    log.touch()
    return log


@pytest.fixture
def start_anew(fresh) -> Iterator[None]:
    """The kernels are looked for again, here and after the test."""
    forget()
    yield
    forget()


def forget() -> None:
    native._loaded.cache_clear()
    native_children.load.cache_clear()


def said(caplog) -> list[str]:
    """What the library has logged."""
    return [r.getMessage() for r in caplog.records if r.name.startswith("folospec")]


def test_without_a_compiler_everything_runs_on_torch_and_says_so_once(
    start_anew, monkeypatch, caplog
):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    engines = [LLM("folospec-demo", "ngram", num_blocks=64) for _ in range(2)]
    params = SamplingParams(temperature=0, max_tokens=8)
    for llm in engines:
        [output] = llm.generate(["def f(x):"], params, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 8
        assert llm.stats()["lossless"] == "tokens"
        assert llm.stats()["native_kernels"] is None
    reason = "there is no C++ compiler (/nonexistent/c++ is not on the path)"
    assert native.why_not() == reason
    assert said(caplog) == [f"the native CPU kernels are off, slower forms run instead: {reason}"]


def test_they_can_be_left_out_and_nothing_is_said(start_anew, fresh, monkeypatch, caplog):
    monkeypatch.setenv("FOLOSPEC_KERNELS", "torch")
    assert native.load() is None
    assert native.why_not() == "FOLOSPEC_KERNELS=torch leaves them out"
    assert said(caplog) == []
    assert not fresh.exists()


def test_only_who_compiles_says_so(fresh, pretend, caplog):
    """It blocks for a while: nobody should wait without being told why."""
    build.build()
    [message] = said(caplog)
    assert re.match(r"compiling the CPU kernels with .*fake-compiler, once", message)
    assert caplog.records[0].levelname == "WARNING"  # shown where no logging is set up
    caplog.clear()
    build.build()
    assert said(caplog) == []


def test_another_wish_is_refused(monkeypatch):
    monkeypatch.setenv("FOLOSPEC_KERNELS", "cuda")
    native._loaded.cache_clear()
    try:
        for call in (native.load, native.why_not):
            with pytest.raises(ValueError, match="must be auto, torch or triton, got 'cuda'"):
                call()
    finally:
        native._loaded.cache_clear()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo 'note: x' >&2; echo 'kernels.cpp:1: error: no' >&2; exit 1", "cpp:1: error: no"),
        ("exit 3", "failed: it said nothing"),
    ],
)
def test_a_compiler_that_fails_is_quoted(fresh, tmp_path, monkeypatch, body, reason):
    monkeypatch.setenv("CXX", compiler(tmp_path, f'[ "$1" = --version ] || {{ {body}; }}'))
    with pytest.raises(build.BuildError, match=reason):
        native.Native()
    assert list(fresh.iterdir()) == []


def test_a_compiler_that_does_not_run_is_named(fresh, tmp_path, monkeypatch):
    path = tmp_path / "not-a-program"
    path.write_bytes(b"\x00\x01")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    with pytest.raises(build.BuildError, match="not-a-program does not run: "):
        build.build()


def test_a_compiler_that_never_ends_is_given_up(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler(tmp_path, "exec sleep 60"))
    monkeypatch.setattr(build, "TIMEOUT_SECONDS", 0.1)
    with pytest.raises(build.BuildError, match=r"did not end in 0\.1 s"):
        build.build()


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch, pretend):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FOLOSPEC_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match="cannot be kept in .*file/kernels"):
        build.build()


def test_what_was_built_is_found_again(fresh, pretend):
    first = build.build()
    assert build.build() == first
    num_units = len(list(build.SOURCES.glob("*.cpp")))
    assert len(pretend.read_text().splitlines()) == num_units + 1  # compiled, and linked
    assert list(fresh.iterdir()) == [first]


def test_other_flags_and_other_sources_are_built_anew(fresh, pretend, tmp_path, monkeypatch):
    (tmp_path / "sources").mkdir()
    for source in build.SOURCES.iterdir():
        (tmp_path / "sources" / source.name).write_bytes(source.read_bytes())
    same, edited = build.build(sources=tmp_path / "sources"), tmp_path / "sources" / "vec.h"
    assert same == build.build()
    edited.write_text(edited.read_text() + "\n")
    build._fingerprint.cache_clear()
    others = [build.build("x86-64"), build.build(sources=tmp_path / "sources")]
    monkeypatch.setenv("FOLOSPEC_KERNELS_FLAGS", "-O1 -g")
    others.append(build.build())
    assert len({same, *others}) == 4


def test_the_environment_names_a_target_and_flags_and_an_argument_goes_first(
    fresh, pretend, monkeypatch
):
    monkeypatch.setenv("FOLOSPEC_KERNELS_TARGET", "x86-64-v3")
    monkeypatch.setenv("FOLOSPEC_KERNELS_FLAGS", "-O1 -g")
    build.build()
    build.build("x86-64")
    targets = ["=x86-64-v3 -O1 -g -c", "=x86-64 -O1 -g -c"]
    lines = [line for line in pretend.read_text().splitlines() if " -c " in line]
    assert [sum(t in line for line in lines) for t in targets] == [len(lines) // 2] * 2


@pytest.mark.parametrize("content", [b"", b"li", b"lob\n", b"lib\nlib\n"])
def test_a_file_that_is_not_what_was_built_is_built_anew(fresh, pretend, content):
    path = build.build()
    path.write_bytes(content)
    assert build.build() == path
    assert path.read_bytes() == b"lib\n"


@pytest.fixture(scope="module")
def whole():
    """The library where it is kept: made ready before a test has a new cache to build it into."""
    return Path(require_native().library._name)


def test_a_library_cut_short_ends_no_process(whole, fresh, tmp_path, monkeypatch):
    """Control: loaded as it is, it would."""
    monkeypatch.setenv("CXX", compiler(tmp_path, f"{PRETEND}\ncp {whole} $last"))
    path = build.build()
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    load = [sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(path)!r})"]
    assert subprocess.run(load, capture_output=True, timeout=60).returncode < 0
    native.Native()
    assert path.read_bytes() == whole.read_bytes()


def test_who_waits_for_another_process_says_so(pretend, fresh, caplog):
    fcntl = pytest.importorskip("fcntl")
    build.make_private(fresh)
    descriptor = os.open(fresh, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(build.build)
        try:
            while not (said(caplog) or found.done()):
                time.sleep(0.01)
            assert not found.done()
            assert said(caplog) == ["waiting for another process that compiles the CPU kernels"]
        finally:
            os.close(descriptor)
        assert found.result().is_file()
    assert len(said(caplog)) == 2, "it compiles, since the other left nothing behind"


@pytest.mark.parametrize("can_lock", [True, False])
def test_processes_may_build_at_once(fresh, tmp_path, can_lock):
    """One of them compiles. Where files cannot be locked, all of them may."""
    log = tmp_path / "log"
    slow = compiler(tmp_path, f"{PRETEND}\nsleep 0.5\necho $last >> {log}\necho lib > $last")
    refused = "import fcntl; fcntl.flock = lambda *_: open('/nonexistent')\n"
    code = "" if can_lock else refused
    code += "from folospec.kernels import build; print(build.build())"
    environment = {**os.environ, "CXX": slow, "FOLOSPEC_CACHE_DIR": str(fresh.parent)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
        for _ in range(3)
    ]
    said = {process.communicate(timeout=60)[0] for process in processes}
    assert len(said) == 1
    assert [str(path) for path in fresh.iterdir()] == [said.pop().decode().strip()]
    made = log.read_text().split()
    assert not can_lock or len(set(made)) == len(made)


def test_the_cache_is_where_the_system_says(monkeypatch, tmp_path):
    for name in ("FOLOSPEC_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / ".cache" / "folospec"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert build.cache_folder() == tmp_path / "x" / "folospec"
    monkeypatch.setenv("FOLOSPEC_CACHE_DIR", str(tmp_path / "y"))
    assert build.cache_folder() == tmp_path / "y"


def test_the_openmp_is_torchs_own_where_there_are_several(monkeypatch):
    import torch

    own = f"{Path(torch.__file__).parent}/lib/libgomp.so.1"
    line = "7f00-7f01 r-xp 00000000 00:00 1     "
    maps = [f"{line}{path}" for path in ("/usr/lib/sklearn.libs/libgomp-a.so", "/lib/x.so", own)]
    monkeypatch.setattr(build.Path, "read_text", lambda self: "\n".join([*maps, "7f02 [heap]"]))
    assert build.find_openmp() == own
    maps[-1] = f"{line}/opt/libiomp5.so"
    assert build.find_openmp() == "/usr/lib/sklearn.libs/libgomp-a.so"
    del maps[0], maps[-1]
    with pytest.raises(build.BuildError, match="torch has loaded no OpenMP"):
        build.find_openmp()


def test_the_sources_are_part_of_the_package():
    """What `pip install` leaves on a disk has them: they are declared as data."""
    toml = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = toml.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["folospec"]
    package = Path(build.__file__).parents[1]
    declared = {path for pattern in patterns for path in package.glob(pattern)}
    sources = {path for path in build.SOURCES.iterdir() if path.suffix in (".h", ".cpp")}
    assert len(sources) > 4
    assert sources <= declared
