"""A library that came with the package is used before a compiler is asked, if it was made from
these sources, for what is asked for, and nobody else can change it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from folospec.kernels import build, prebuilt, targets
from folospec.kernels.build import SOURCES, BuildError
from folospec.kernels.private import check_as_safe_as
from folospec.kernels.targets import Target

BEST, GOOD, PLAIN = (
    Target("best", frozenset({"much"})),
    Target("good", frozenset({"some"})),
    Target("plain", frozenset()),
)


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A package with libraries for three targets, on a machine that runs the last two, without a
    compiler."""
    folder = tmp_path / "kernels" / "libraries"
    folder.mkdir(parents=True)
    module = folder.parent / "prebuilt.py"
    module.touch()
    for target in (BEST, GOOD, PLAIN):
        library(folder, target).write_text(target.name)
    monkeypatch.setattr(prebuilt, "FOLDER", folder)
    monkeypatch.setattr(prebuilt, "__file__", str(module))
    monkeypatch.setattr(targets, "local_targets", lambda: (BEST, GOOD, PLAIN))
    monkeypatch.setattr(targets, "cpu_flags", lambda: frozenset({"some"}))
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    for name in ("FOLOSPEC_KERNELS_TARGET", "FOLOSPEC_KERNELS_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    return folder


def library(folder: Path, target: Target, sources: Path = SOURCES) -> Path:
    return folder / prebuilt.library_name(target.name, prebuilt.digest_of(sources))


def test_the_best_that_the_machine_runs_is_taken(package, monkeypatch):
    assert build.find() == library(package, GOOD)
    monkeypatch.setattr(targets, "cpu_flags", lambda: frozenset({"some", "much"}))
    assert build.find() == library(package, BEST)
    monkeypatch.setattr(targets, "cpu_flags", lambda: frozenset())
    assert build.find() == library(package, PLAIN)


def test_one_that_is_missing_is_passed_over(package):
    library(package, GOOD).unlink()
    assert build.find() == library(package, PLAIN)


def test_a_target_by_name_is_taken_if_it_is_there(package, monkeypatch):
    assert build.find("plain") == library(package, PLAIN)
    monkeypatch.setenv("FOLOSPEC_KERNELS_TARGET", "plain")
    assert build.find() == library(package, PLAIN)
    assert build.find("good") == library(package, GOOD)


def test_a_target_that_the_processor_does_not_run_is_refused(package):
    with pytest.raises(BuildError, match="this processor does not run best, it lacks much"):
        build.find("best")


@pytest.mark.parametrize(
    ("name", "value"),
    [("FOLOSPEC_KERNELS_TARGET", "native"), ("FOLOSPEC_KERNELS_FLAGS", "-O1 -g")],
)
def test_what_only_a_compiler_gives_is_left_to_one(package, name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(BuildError, match="there is no C"):
        build.find()


def test_without_libraries_a_compiler_is_asked(package, monkeypatch):
    monkeypatch.setattr(prebuilt, "FOLDER", package / "elsewhere")
    with pytest.raises(BuildError, match="there is no C"):
        build.find()


def test_libraries_of_other_sources_are_not_taken(package, tmp_path):
    """Such as those of an older version, or of sources that somebody has edited."""
    edited = tmp_path / "edited"
    edited.mkdir()
    for source in SOURCES.iterdir():
        (edited / source.name).write_bytes(source.read_bytes())
    assert build.find(sources=edited) == library(package, GOOD)
    (edited / "vec.h").write_text("// nothing")
    with pytest.raises(BuildError, match="there is no C"):
        build.find(sources=edited)


def test_only_a_library_of_the_package_is_prebuilt(package):
    assert prebuilt.is_prebuilt(build.find())
    assert not prebuilt.is_prebuilt(package.parent / "plain.so")


@pytest.mark.parametrize("open_to", [0o020, 0o002])
@pytest.mark.parametrize("is_folder", [True, False])
def test_one_that_others_can_change_is_left_out_and_they_are_told(
    package, open_to, is_folder, caplog
):
    path = package if is_folder else library(package, GOOD)
    path.chmod(path.stat().st_mode | open_to)
    with pytest.raises(BuildError, match="there is no C"):
        build.find()
    [record] = caplog.records
    assert record.getMessage().startswith("the prebuilt CPU kernels are left out: ")
    assert f"{path} (mode " in record.getMessage()


def test_one_that_is_as_open_as_the_package_is_taken(package):
    """Some systems install everything writable for the user's group."""
    for path in (package.parent, package.parent / "prebuilt.py", package, library(package, GOOD)):
        path.chmod(path.stat().st_mode | 0o020)
    assert build.find() == library(package, GOOD)


def test_one_of_another_owner_than_the_package_is_refused(package, monkeypatch):
    path, module = library(package, GOOD), package.parent / "prebuilt.py"
    owned = {path: 1001, package: 1000}
    known = Path.stat

    def pretend(self: Path, **options: bool) -> os.stat_result:
        fields = list(known(self, **options))
        fields[4] = owned.get(self, 1000)
        return os.stat_result(fields)

    monkeypatch.setattr(Path, "stat", pretend)
    monkeypatch.setattr(os, "geteuid", lambda: 1002)
    with pytest.raises(PermissionError, match="belongs to user id 1001, .* to 1000"):
        check_as_safe_as(path, module)
    for owner in (0, 1000, 1002):  # root, whoever has installed the package, and the user
        owned[path] = owner
        check_as_safe_as(path, module)


def test_a_link_to_elsewhere_is_refused(package, tmp_path):
    path = library(package, GOOD)
    (tmp_path / "other.so").touch()
    path.unlink()
    path.symlink_to(tmp_path / "other.so")
    with pytest.raises(PermissionError, match="is not below the folder of"):
        check_as_safe_as(path, package.parent / "prebuilt.py")
