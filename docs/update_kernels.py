"""Write the results of benchmarks/micro.py into docs/kernels.md.

python benchmarks/micro.py --out micro.jsonl
python docs/update_kernels.py micro.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))
from page_sections import fill, read_rows  # noqa: E402 - the page's folder is known only now

PAGE = DOCS / "kernels.md"
HEADER = (
    "| | case | format | native ms | torch ms | torch over native | limit ms | share of it |\n"
    "|---|---|---|---:|---:|---:|---:|---:|\n"
)

Row = dict[str, Any]


def section(rows: Sequence[Row]) -> str:
    """A line for every case, and what they were measured on."""
    return HEADER + "".join(map(_line, rows)) + "\n" + _setting(rows[0])


def _line(row: Row) -> str:
    cells = [row["op"], row["case"], row["format"]]
    cells += [f"{row[name]:.3f}" for name in ("native_ms", "torch_ms")]
    cells += [f"{row['speedup']:.2f}", f"{row['limit_ms']:.3f}", f"{row['of_limit']:.2f}"]
    return f"| {' | '.join(cells)} |\n"


def _setting(row: Row) -> str:
    source = row["provenance"]
    changed = " with uncommitted changes" if source["git_uncommitted_changes"] else ""
    peaks = ", ".join(f"{kind} {peak} GFLOP/s" for kind, peak in source["peak_gflop_per_s"].items())
    return (
        f"Medians. {source['cpu']}, torch threads: {source['torch_threads']}, read bandwidth "
        f"{source['bandwidth_gb_per_s']} GB/s, peak {peaks}, torch {source['torch']}, commit "
        f"{str(source['git_commit'])[:10]}{changed}. Command: `{source['command']}`.\n"
    )


def updated(page: str, rows: Sequence[Row]) -> str:
    """Return the page with the section filled in; see `fill`."""
    return fill(page, rows, {"micro": section}, Path(__file__).name)


def main() -> None:
    rows = read_rows(sys.argv)
    PAGE.write_text(updated(PAGE.read_text(), rows))


if __name__ == "__main__":
    main()
