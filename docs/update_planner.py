"""Write the results of benchmarks/engine/never_slower.py into docs/planner.md.

python -m benchmarks.engine.never_slower --out never_slower.jsonl
python docs/update_planner.py never_slower.jsonl

Several runs may be given, each of a model of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))
from page_sections import fill, model_name, read_rows, run_of  # noqa: E402 - the page's folder is known only now

PAGE = DOCS / "planner.md"
HEADER = (
    "| | | batch | plain time over its time | 95 % | bound | | acceptance length | tokens |\n"
    "|---|---|---:|---:|---:|---:|---|---:|---|\n"
)

Row = dict[str, Any]


def section(rows: Sequence[Row]) -> str:
    """A table for every run, and what it was."""
    parts = []
    for run in dict.fromkeys(map(run_of, rows)):
        own = [row for row in rows if run_of(row) == run]
        dtype = "" if own[0]["dtype"] == "auto" else f", {own[0]['dtype']}"
        target = own[0]["provenance"].get("kernels_target")
        built = f", instructions of {target}" if target else ""
        title = f"**{model_name(own[0]['model'])}{dtype}{built}**"
        parts.append(f"{title}\n\n{HEADER}{''.join(map(_line, own))}\n{_setting(own[0])}\n")
    return "\n".join(parts)


def _line(row: Row) -> str:
    counts = row["auto_counts"]
    drafts = counts["num_drafts"]
    length = f"{1 + counts['num_accepted_tokens'] / drafts:.2f}" if drafts else "no drafts"
    differ = row["num_differing_pairs"]
    cells = [
        row["contestant"],
        f"{row['workload'].partition(' at ')[0]}, T {row['temperature']:g}",
        str(row["batch"]),
        f"{row['ratio']:.3f}",
        f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}",
        "too few pairs" if row["bound"] is None else f"{row['bound']:.3f}",
        row["verdict"],
        length,
        f"{differ} pairs differ" if differ else "equal",
    ]
    return f"| {' | '.join(cells)} |\n"


def _setting(row: Row) -> str:
    source = row["provenance"]
    changed = " with uncommitted changes" if source["git_uncommitted_changes"] else ""
    return (
        f"{row['pairs']} pairs of at least {row['prompts_per_run']} prompts, {row['max_tokens']} "
        f"new tokens each; {row['clock']} time; bounds are for {row['num_cells']} cells. "
        f"{source['cpu']}, torch threads: {source['torch_threads']}, torch "
        f"{source['torch']}, commit {str(source['git_commit'])[:10]}{changed}. Command: "
        f"`{source['command']}`.\n"
    )


def _cell(row: Row) -> tuple[Any, ...]:
    source, names = row["provenance"], ("model", "dtype", "workload", "temperature", "batch")
    return source["cpu"], source.get("kernels_target"), *(row[name] for name in names)


def updated(page: str, rows: Sequence[Row]) -> str:
    """Return the page with the section filled in; see `fill`."""
    return fill(page, rows, {"never_slower": section}, Path(__file__).name, table_of=_cell)


def main() -> None:
    rows = read_rows(sys.argv)
    PAGE.write_text(updated(PAGE.read_text(), rows))


if __name__ == "__main__":
    main()
