"""docs/kernels.md: the native kernels next to torch and to the machine's limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from docs.tables.markdown import LEFT, Column, Row, setting, table
from docs.tables.sections import Section, by, run_of

COLUMNS = (
    Column("", "{op}", LEFT),
    Column("case", "{case}", LEFT),
    Column("format", "{format}", LEFT),
    Column("native ms", "{native_ms:.3f}"),
    Column("torch ms", "{torch_ms:.3f}"),
    Column("torch over native", "{speedup:.2f}"),
    Column("limit ms", "{limit_ms:.3f}"),
    Column("share of it", "{of_limit:.2f}"),
)
SETTING = (
    "Medians. {cpu}, torch threads: {torch_threads}, read bandwidth {bandwidth_gb_per_s} GB/s, "
    "peak {peaks}, torch {torch}, commit {revision}."
)


def text(rows: Sequence[Row]) -> str:
    """A table for every run: one for each processor, instruction set and kind of case."""
    tables = []
    for own in by(run_of, rows).values():
        source = own[0]["provenance"]
        title = f"**{source['cpu']}, {_instructions(own[0])}**\n\n"
        peaks = [f"{kind} {peak} GFLOP/s" for kind, peak in source["peak_gflop_per_s"].items()]
        measured = setting(own[0], SETTING, peaks=", ".join(peaks))
        tables.append(f"{title}{table(COLUMNS, own, compact=True)}\n{measured}")
    return "\n".join(tables)


def _instructions(row: Row) -> str:
    """What the kernels, and torch with them, were held to."""
    target = row["provenance"].get("kernels_target")
    return f"instructions of {target}" if target else "all of its instructions"


def _table_of(row: Row) -> Any:
    return row["provenance"]["cpu"], row["op"], _instructions(row)


SECTIONS = (Section("micro", "docs/kernels.md", text, table_of=_table_of),)
