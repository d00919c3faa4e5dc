"""Write the results of the GPU check into docs/gpu.md.

python -m gpu_check --out gpu_check.jsonl
python docs/update_gpu.py gpu_check.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]
from page_sections import fill, read_rows  # noqa: E402

from gpu_check.goals import find  # noqa: E402 - their folders are known only now
from gpu_check.report import Sheet, sheets  # noqa: E402

PAGE = DOCS / "gpu.md"
CHANGES = {True: " with uncommitted changes", False: "", None: " changes not known"}

Row = dict[str, Any]


def section(rows: Sequence[Row]) -> str:
    """What it was run on, the verdicts, then the other tables.

    Raises:
        ValueError: the rows are not of a GPU; on a CPU the check tries only itself.
    """
    source = rows[0]["provenance"]
    if not str(source["device"]).startswith("cuda"):
        raise ValueError(f"the rows must be of a GPU, got device={source['device']!r}")
    *tables, goals = sheets(rows)
    parts = [_setting(source), _short(rows), *map(_markdown, [goals, *tables])]
    return "".join(parts)


def _setting(source: Row) -> str:
    """Hardware, versions, commit and command: what a figure has to name."""
    changed = CHANGES[source["git_uncommitted_changes"]]
    return (
        f"{source['gpu']}, compute capability {source['compute_capability']}, driver "
        f"{source['driver']}, CUDA {source['cuda']}, torch {source['torch']}, triton "
        f"{source['triton']}, transformers {source['transformers']}, Python {source['python']}, "
        f"{source['cpu']}, cores: {source['cores']}, commit {str(source['git_commit'])[:10]}"
        f"{changed}, {source['time']}. Command: `{source['command']}`.\n\n"
    )


def _short(rows: Sequence[Row]) -> str:
    ends = find(rows, kind="end")
    short = [f"{row['section']} {row['part']}" for row in ends if row["end"] != "complete"]
    return f"Not complete: {', '.join(short)}.\n\n" if short else ""


def _markdown(sheet: Sheet) -> str:
    lines = [sheet.header, ("---",) * len(sheet.header), *sheet.lines]
    cells = [[cell.replace("|", r"\|").replace("\n", " ") for cell in line] for line in lines]
    table = "".join(f"| {' | '.join(line)} |\n" for line in cells)
    return f"### {sheet.title}\n{table}\n"


def updated(page: str, rows: Sequence[Row]) -> str:
    """Return the page with the section filled in; see `fill`."""
    return fill(page, rows, {"gpu_check": section}, Path(__file__).name)


def main() -> None:
    rows = read_rows(sys.argv)
    PAGE.write_text(updated(PAGE.read_text(), rows))


if __name__ == "__main__":
    main()
