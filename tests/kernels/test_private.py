"""A library is loaded only from a folder and a file that are the user's own and that nobody else
can write to."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from folospec.kernels import build, private
from folospec.kernels.private import check_private, make_private

MINE, THEIRS = 1000, 1001
GROUP = 2000


@pytest.fixture
def owned(monkeypatch) -> dict[str, tuple[int, int, int]]:
    """The owner, group and mode that files are pretended to have, by path. Others are root's, as
    they are outside of a user's home."""
    known: dict[str, tuple[int, int, int]] = {}

    def pretend(path: Path, **options: bool) -> SimpleNamespace:
        uid, gid, mode = known.get(str(path), (0, 0, 0o755))
        return SimpleNamespace(st_uid=uid, st_gid=gid, st_mode=mode)

    monkeypatch.setattr(private.Path, "stat", pretend)
    monkeypatch.setattr(private.Path, "resolve", lambda path, strict: path)
    monkeypatch.setattr(private.os, "geteuid", lambda: MINE)
    monkeypatch.setattr(private.os, "getegid", lambda: MINE)
    return known


@pytest.mark.parametrize(
    "folders",
    [
        {"/h": (MINE, MINE, 0o755), "/h/k": (MINE, MINE, 0o755)},
        {"/h": (MINE, MINE, 0o700), "/h/k": (MINE, GROUP, 0o700)},
        {"/h": (MINE, MINE, 0o775), "/h/k": (MINE, MINE, 0o700)},  # a group of the user's own
        {"/h": (0, 0, 0o1777), "/h/k": (MINE, MINE, 0o700)},  # as /tmp
        {"/h": (65534, 65534, 0o755), "/h/k": (MINE, MINE, 0o700)},  # root, seen from a container
    ],
)
def test_a_folder_of_the_users_own_is_taken(owned, folders):
    owned.update(folders)
    check_private(Path("/h/k"))


@pytest.mark.parametrize(
    ("folders", "reason"),
    [
        ({"/h/k": (THEIRS, MINE, 0o700)}, "/h/k belongs to user id 1001, not to 1000"),
        ({"/h/k": (0, 0, 0o755)}, "/h/k belongs to user id 0, not to 1000"),
        ({"/h/k": (MINE, MINE, 0o770)}, r"write to /h/k \(mode 770\): chmod go-w it, or set FOLO"),
        ({"/h/k": (MINE, MINE, 0o1777)}, r"others may write to /h/k \(mode 1777\)"),
        ({"/h": (MINE, GROUP, 0o775)}, r"others may write to /h \(mode 775\)"),
        ({"/h": (MINE, MINE, 0o757)}, r"others may write to /h \(mode 757\)"),
        ({"/": (0, 0, 0o777)}, r"others may write to / \(mode 777\)"),
        ({"/h": (THEIRS, MINE, 0o755)}, "/h belongs to user id 1001.*or set FOLOSPEC_CACHE_DIR"),
    ],
)
def test_a_folder_that_somebody_else_can_change_is_refused(owned, folders, reason):
    owned.update({"/h": (MINE, MINE, 0o755), "/h/k": (MINE, MINE, 0o700), **folders})
    with pytest.raises(PermissionError, match=reason):
        check_private(Path("/h/k"))


def test_a_link_is_as_good_as_what_it_leads_to(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o700)
    link = tmp_path / "link"
    link.symlink_to(shared)
    check_private(link)
    shared.chmod(0o777)
    with pytest.raises(PermissionError, match=f"write to {shared}"):
        check_private(link)
    link.unlink()
    with pytest.raises(FileNotFoundError):
        check_private(link)


def test_folders_are_made_for_the_user_alone(tmp_path):
    before = os.umask(0)
    try:
        make_private(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700
    make_private(tmp_path / "a" / "b")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache in which a compiler has put a library."""
    program = tmp_path / "c++"
    program.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit\nfor last; do :; done\necho > $last'
    )
    program.chmod(0o700)
    monkeypatch.setenv("CXX", str(program))
    monkeypatch.setenv("FOLOSPEC_CACHE_DIR", str(tmp_path / "cache"))
    build._fingerprint.cache_clear()
    build.build()
    return tmp_path / "cache"


@pytest.mark.parametrize("shared", [".", "kernels", "library"])
def test_a_cache_that_others_can_write_to_is_refused(cache, shared):
    library = build.build()
    assert stat.S_IMODE(library.stat().st_mode) == 0o700
    path = library if shared == "library" else cache / shared
    path.chmod(0o777)
    with pytest.raises(build.BuildError, match=rf"cannot be kept in .*others may write to {path}"):
        build.build()
    path.chmod(0o700)
    assert build.build() == library
