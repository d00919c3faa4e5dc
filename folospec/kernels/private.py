"""Keeps folders and files that only the user can write.

A library is code that runs with the user's rights, so it is loaded only from where nobody else can
put one.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_ROOT, _UNMAPPED = 0, 65534
"""Root owns the folders near the top; inside a container root may have no user id."""
_ADVICE = "or set FOLOSPEC_CACHE_DIR to a folder of your own"


def make_private(folder: Path) -> None:
    """Make a folder, and the missing ones above it, that only the user can enter.

    Raises:
        OSError: it cannot be made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder")


def check_private(path: Path) -> None:
    """Check that a file or folder belongs to the user and that nobody else can change or replace
    it. Links are followed first.

    Raises:
        PermissionError: it belongs to somebody else, others may write to it, or somebody else may
            replace it through a folder above it. The message says what to do.
        OSError: it is not there.
    """
    path, user = path.resolve(strict=True), os.geteuid()
    found = path.stat()
    if found.st_uid != user:
        raise PermissionError(
            f"{path} belongs to user id {found.st_uid}, not to {user}, which runs this: "
            f"give it to {user} (chown), {_ADVICE}"
        )
    if found.st_mode & _WRITABLE_BY_OTHERS:
        raise PermissionError(
            f"others may write to {path} (mode {stat.S_IMODE(found.st_mode):o}): "
            f"chmod go-w it, {_ADVICE}"
        )
    for folder in path.parents:
        _check_above(folder, folder.stat(), user)


def check_as_safe_as(path: Path, other: Path) -> None:
    """Check that nobody can change a file who cannot change another one, which runs already. They
    are one folder apart: `other` is beside the folder of `path`. Links are followed first.

    Raises:
        PermissionError: the file or its folder belongs to somebody else, or is open to more users.
            The message says which.
        OSError: one of them is not there.
    """
    path, other = path.resolve(strict=True), other.resolve(strict=True)
    if path.parent.parent != other.parent:
        raise PermissionError(f"{path} is not below the folder of {other}")
    for mine, theirs in ((path, other), (path.parent, other.parent)):
        found, known = mine.stat(), theirs.stat()
        if found.st_uid not in (known.st_uid, os.geteuid(), _ROOT):
            raise PermissionError(
                f"{mine} belongs to user id {found.st_uid}, {theirs} to {known.st_uid}"
            )
        open_to = found.st_mode & _WRITABLE_BY_OTHERS
        is_same_group = found.st_gid == known.st_gid or not open_to & stat.S_IWGRP
        if open_to & ~known.st_mode or not is_same_group:
            raise PermissionError(
                f"{mine} (mode {stat.S_IMODE(found.st_mode):o}) may be written by users who may "
                f"not write {theirs} (mode {stat.S_IMODE(known.st_mode):o})"
            )


def _check_above(folder: Path, found: os.stat_result, user: int) -> None:
    """Refuse a folder in which somebody else may rename what is below it."""
    if found.st_uid not in (user, _ROOT, _UNMAPPED):
        raise PermissionError(
            f"{folder} belongs to user id {found.st_uid}, not to {user}, which runs this: "
            f"change its owner, {_ADVICE}"
        )
    # In a sticky folder, such as /tmp, only owners rename. Many systems give every user a group.
    is_own_group = found.st_gid == os.getegid()
    others = stat.S_IWOTH if is_own_group else _WRITABLE_BY_OTHERS
    if found.st_mode & others and not found.st_mode & stat.S_ISVTX:
        raise PermissionError(
            f"others may write to {folder} (mode {stat.S_IMODE(found.st_mode):o}): "
            f"chmod go-w it, {_ADVICE}"
        )
