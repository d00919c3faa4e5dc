"""Names the lines of text files under git that end in blanks, and the files that do not end in
exactly one newline. Files that a tool writes are left out.

    python .ci/whitespace.py [FOLDER]
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

WRITTEN_BY_TOOLS = ("docs/pictures", "docs/plots", "folospec/demo_models", "benchmarks/results")


def faults(text: str) -> Iterator[str]:
    """Yield each fault of a text with the line where it is."""
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if line != line.rstrip():
            yield f"{number}: blanks at the end of the line"
    if text and (lines[-1] or lines[-2:] == ["", ""]):
        yield f"{len(lines)}: the file does not end in exactly one newline"


def texts(root: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and the content of every text file under git."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
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
