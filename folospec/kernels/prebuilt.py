"""Chooses among the libraries of a wheel: one for each instruction set of `targets`.

A wheel for one platform has them in `FOLDER`, made by setup.py. A source checkout and a wheel for
any platform have none. The name of a file says what it is for and which sources it was made from,
so that the library of an older version is never taken.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from folospec.kernels import targets
from folospec.kernels.private import check_as_safe_as

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "libraries"


def find(sources: Path, target: str | None = None) -> Path | None:
    """Return the best library that this machine runs; None if there is none.

    Args:
        sources: the folder that it must have been made from.
        target: the name of the only target that will do; None: any.
    """
    if not FOLDER.is_dir():
        return None
    digest = digest_of(sources)
    for each in targets.local_targets():
        path = FOLDER / library_name(each.name, digest)
        if target in (None, each.name) and each.runs_here and path.is_file():
            try:
                check_as_safe_as(path, Path(__file__))
            except PermissionError as error:
                logger.warning("the prebuilt CPU kernels are left out: %s", error)
                return None
            return path
    return None


def is_prebuilt(library: Path) -> bool:
    """Whether a library is one of those that came with the package."""
    return library.parent == FOLDER


def library_name(target: str, digest: str) -> str:
    """What the library for a target is called."""
    return f"{target}-{digest[:16]}.so"


def digest_of(sources: Path) -> str:
    """A number, in hexadecimal digits, that changes with the sources."""
    digest = hashlib.sha256()
    for source in sorted(sources.iterdir()):
        if source.suffix in (".h", ".cpp"):
            digest.update(source.read_bytes())
    return digest.hexdigest()
