"""Write the rows of benchmarks into the pages that show them, and draw their plots.

    python -m benchmarks.peers.compare --out peers.jsonl
    python -m docs.update peers.jsonl                    # docs/peers.md, docs/plots/peers.svg
    python -m docs.update benchmarks/results/*.jsonl     # everything that is measured

The rows say which benchmark they are of, and with it their page. A section is written anew if there
are rows of it; the others stay. Several runs may be given, each with tables of its own: the rows of
one table must come from one run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name

from docs.tables import (
    acceptance,
    gpu,
    kernels,
    methods,
    models,
    overheads,
    peers,
    planner,
    readme,
    throughput,
)
from docs.tables.sections import Row, Section

ROOT = Path(__file__).resolve().parents[1]
PLOTS = ROOT / "docs" / "plots"
SECTIONS: tuple[Section, ...] = (
    *readme.SECTIONS,
    *acceptance.SECTIONS,
    *methods.SECTIONS,
    *kernels.SECTIONS,
    *overheads.SECTIONS,
    *peers.SECTIONS,
    *throughput.SECTIONS,
    *planner.SECTIONS,
    *models.SECTIONS,
    *gpu.SECTIONS,
)


def updated(page: str, rows: Sequence[Row], path: str) -> str:
    """Return a page with the sections filled in that there are rows for.

    Args:
        page: its text.
        path: as the sections name it, such as "docs/peers.md" or "docs/methods/*.md".

    Raises:
        ValueError: there are no rows, those of a table come from several runs, or the page lacks a
            marker.
    """
    sections = [section for section in SECTIONS if section.page == path]
    found = [(section, section.rows_of(rows)) for section in sections]
    if not any(own for _, own in found):
        names = ", ".join(section.name for section in sections)
        raise ValueError(f"there must be rows of {names}, got none")
    for section, own in found:
        if own:
            page = section.filled(page, own)
    return page


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Draw the plots of the sections that there are rows for."""
    for section in SECTIONS:
        own = section.rows_of(rows)
        if own and section.plots:
            from benchmarks.lib.plots import save

            for name, function in section.plots.items():
                save(resolve_name(function)(own), folder / name)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="JSON lines that benchmarks wrote")
    args = parser.parse_args(argv)
    lines = [line for path in args.results for line in path.read_text().splitlines()]
    rows = [json.loads(line) for line in lines if line]
    used = [section for section in SECTIONS if section.rows_of(rows)]
    if not used:
        parser.error("no page shows rows of these benchmarks")
    for pattern in dict.fromkeys(section.page for section in used):
        for path in sorted(ROOT.glob(pattern)):
            path.write_text(updated(path.read_text(), rows, pattern))
            print(path.relative_to(ROOT), file=sys.stderr)
    others = [row for row in rows if not any(section.shows(row) for section in SECTIONS)]
    for name in dict.fromkeys(row.get("benchmark") for row in others):
        print(f"no page shows rows of {name}", file=sys.stderr)
    draw(rows, PLOTS)


if __name__ == "__main__":
    main()
