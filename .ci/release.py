"""Checks that the version is the same in the package, the changelog and the citation; and with a
tag, that the tag is this version and that the changelog dates it.

    python .ci/release.py [v0.2.0]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def find(pattern: str, path: Path) -> str:
    """Return what the pattern's group matches first in a file; "" if it matches nowhere."""
    found = re.search(pattern, path.read_text("utf-8"), re.MULTILINE)
    return found[1] if found else ""


def faults(root: Path, tag: str = "") -> list[str]:
    """Return what does not agree with the version of the package."""
    version = find(r'^__version__ = "(.+)"$', root / "folospec/__init__.py")
    latest = find(r"^## \[(\d.*?)\]", root / "CHANGELOG.md")
    date = find(rf"^## \[{re.escape(version)}\] - (.+)$", root / "CHANGELOG.md")
    cited = find(r"^version: (.+)$", root / "CITATION.cff")
    found = []
    if latest != version:
        found.append(f"CHANGELOG.md describes {latest!r} first, the package is {version!r}")
    if cited != version:
        found.append(f"CITATION.cff cites {cited!r}, the package is {version!r}")
    if tag and tag != f"v{version}":
        found.append(f"the tag is {tag!r}, the package is {version!r}")
    if tag and not re.fullmatch(r"\d{4}-\d{2}-\d{2}", date):
        found.append(f"CHANGELOG.md dates {version!r} with {date!r}, not with a day")
    return found


if __name__ == "__main__":
    wrong = faults(ROOT, *sys.argv[1:2])
    print("\n".join(wrong) or "the version is the same everywhere")
    sys.exit(bool(wrong))
