"""docs/planner.md: `speculative="auto"` against plain decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from docs.tables.markdown import LEFT, Column, Row, instructions, model_name, setting, table
from docs.tables.sections import Section, by, run_of


def _workload(row: Row) -> str:
    return f"{row['workload'].partition(' at ')[0]}, T {row['temperature']:g}"


def _bound(row: Row) -> str:
    return "too few pairs" if row["bound"] is None else f"{row['bound']:.3f}"


def _length(row: Row) -> str:
    counts = row["auto_counts"]
    drafts = counts["num_drafts"]
    return f"{1 + counts['num_accepted_tokens'] / drafts:.2f}" if drafts else "no drafts"


def _tokens(row: Row) -> str:
    differ = row["num_differing_pairs"]
    return f"{differ} pairs differ" if differ else "equal"


COLUMNS = (
    Column("", "{contestant}", LEFT),
    Column("", _workload, LEFT),
    Column("batch", "{batch}"),
    Column("plain time over its time", "{ratio:.3f}"),
    Column("95 %", "{ratio_low:.3f} to {ratio_high:.3f}"),
    Column("bound", _bound),
    Column("", "{verdict}", LEFT),
    Column("acceptance length", _length),
    Column("tokens", _tokens, LEFT),
)
SETTING = (
    "{pairs} pairs of at least {prompts_per_run} prompts, {max_tokens} new tokens each; {clock} "
    "time; bounds are for {num_cells} cells. {cpu}, torch threads: {torch_threads}, torch {torch}, "
    "commit {revision}."
)


def text(rows: Sequence[Row]) -> str:
    """A table for every run, and what it was: several runs may each have a model of its own."""
    parts = []
    for own in by(run_of, rows).values():
        dtype = "" if own[0]["dtype"] == "auto" else f", {own[0]['dtype']}"
        built = instructions(own[0]["provenance"].get("kernels_target"))
        title = f"**{model_name(own[0]['model'])}{dtype}{built}**"
        measured = setting(own[0], SETTING)
        parts.append(f"{title}\n\n{table(COLUMNS, own, compact=True)}\n{measured}\n")
    return "\n".join(parts)


def _table_of(row: Row) -> tuple[Any, ...]:
    source, names = row["provenance"], ("model", "dtype", "workload", "temperature", "batch")
    return source["cpu"], source.get("kernels_target"), *(row[name] for name in names)


SECTIONS = (Section("never_slower", "docs/planner.md", text, table_of=_table_of),)
