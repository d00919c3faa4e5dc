"""Write the results of benchmarks/engine/micro.py into docs/kernels.md.

python -m benchmarks.engine.micro --out micro.jsonl
python docs/update_kernels.py micro.jsonl

Several runs may be given, one for each processor, instruction set and kind of case.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))
from page_sections import fill, read_rows, run_of  # noqa: E402 - the page's folder is known only now

PAGE = DOCS / "kernels.md"
HEADER = (
    "| | case | format | native ms | torch ms | torch over native | limit ms | share of it |\n"
    "|---|---|---|---:|---:|---:|---:|---:|\n"
)

Row = dict[str, Any]


def section(rows: Sequence[Row]) -> str:
    """A table for every run, with a line for every case, and what it was measured on."""
    tables = []
    for run in dict.fromkeys(map(run_of, rows)):
        own = [row for row in rows if run_of(row) == run]
        title = f"**{own[0]['provenance']['cpu']}, {_instructions(own[0])}**\n\n"
        tables.append(f"{title}{HEADER}{''.join(map(_line, own))}\n{_setting(own[0])}")
    return "\n".join(tables)


def _instructions(row: Row) -> str:
    """What the kernels, and torch with them, were held to."""
    target = row["provenance"].get("kernels_target")
    return f"instructions of {target}" if target else "all of its instructions"


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
    return fill(page, rows, {"micro": section}, Path(__file__).name, table_of=_table)


def _table(row: Row) -> Any:
    return row["provenance"]["cpu"], row["op"], _instructions(row)


def main() -> None:
    rows = read_rows(sys.argv)
    PAGE.write_text(updated(PAGE.read_text(), rows))


if __name__ == "__main__":
    main()
