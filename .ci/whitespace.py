"""Names the lines of text files that end in blanks, and the files that do not end in exactly one
newline: of those under git, or where git does not answer, of the folders below. Files that a tool
writes are left out.

    python .ci/whitespace.py [FOLDER]
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDERS = (
    *(".ci", ".github", "benchmarks", "docs", "examples", "folospec", "gpu_check", "tests"),
    "training",
)
WRITTEN_BY_TOOLS = ("docs/pictures", "docs/plots", "folospec/demo_models", "benchmarks/results")


def faults(text: str) -> Iterator[str]:
    """Yield each fault of a text with the line where it is."""
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if line != line.rstrip():
            yield f"{number}: blanks at the end of the line"
    if text and (lines[-1] or lines[-2:] == ["", ""]):
        yield f"{len(lines)}: the file does not end in exactly one newline"


def names(root: Path) -> list[str]:
    """The files to look at, below the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, no repository, another's repository
        found = [
            *root.glob("*.*"),
            *(path for name in FOLDERS for path in (root / name).rglob("*")),
        ]
        return [p.relative_to(root).as_posix() for p in found if "__pycache__" not in p.parts]
    return list(filter(None, listed.stdout.split("\0")))


def texts(root: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and the content of every text file."""
    for name in names(root):
        path = root / name
        if name.startswith(WRITTEN_BY_TOOLS) or path.is_symlink() or not path.is_file():
            continue
        content = path.read_bytes()
        if b"\0" not in content:
            yield name, content.decode("utf-8")


def main(root: Path) -> int:
    found = [f"{name}:{fault}" for name, text in texts(root) for fault in faults(text)]
    print("\n".join(found), end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".")))
