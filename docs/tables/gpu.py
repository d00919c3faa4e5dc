"""docs/gpu.md: what the check measured on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

from docs.tables.markdown import LEFT, Row, markdown, setting
from docs.tables.sections import Section
from gpu_check.goals import find
from gpu_check.report import Sheet, sheets

SETTING = (
    "{gpu}, compute capability {compute_capability}, driver {driver}, CUDA {cuda}, torch {torch}, "
    "triton {triton}, transformers {transformers}, Python {python}, {cpu}, cores: {cores}, "
    "commit {revision}, {time}."
)


def text(rows: Sequence[Row]) -> str:
    """What it was run on, the verdicts, then the other tables.

    Raises:
        ValueError: the rows are not of a GPU; on a CPU the check tries only itself.
    """
    source = rows[0]["provenance"]
    if not str(source["device"]).startswith("cuda"):
        raise ValueError(f"the rows must be of a GPU, got device={source['device']!r}")
    *tables, goals = sheets(rows)
    return "".join([setting(rows[0], SETTING), "\n", _short(rows), *map(_sheet, [goals, *tables])])


def _short(rows: Sequence[Row]) -> str:
    ends = find(rows, kind="end")
    short = [f"{row['section']} {row['part']}" for row in ends if row["end"] != "complete"]
    return f"Not complete: {', '.join(short)}.\n\n" if short else ""


def _sheet(sheet: Sheet) -> str:
    lines = [[cell.replace("|", r"\|").replace("\n", " ") for cell in line] for line in sheet.lines]
    return f"### {sheet.title}\n{markdown(sheet.header, [LEFT] * len(sheet.header), lines)}\n"


SECTIONS = (Section("gpu_check", "docs/gpu.md", text),)
