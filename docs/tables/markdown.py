"""Tables in Markdown, and the line below one that says what it was measured on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

LEFT, RIGHT = "---", "---:"
CHANGES = {True: " with uncommitted changes", False: "", None: " changes not known"}
NATIVE = (None, "native")


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table, such as `Column("T", "{temperature:g}")`."""

    header: str
    cell: str | Callable[[Row], str]
    """A template of a row's fields, or a function of the row."""
    rule: str = RIGHT

    def of(self, row: Row) -> str:
        return self.cell.format_map(row) if isinstance(self.cell, str) else self.cell(row)


def table(columns: Sequence[Column], rows: Iterable[Row], *, compact: bool = False) -> str:
    """A line for every row. One with an error has its first two cells and the error."""
    headers, rules = [c.header for c in columns], [c.rule for c in columns]
    return markdown(headers, rules, (_cells(columns, row) for row in rows), compact=compact)


def _cells(columns: Sequence[Column], row: Row) -> list[str]:
    if "error" not in row:
        return [column.of(row) for column in columns]
    error = f"failed: {row['error']}".replace("|", "/")
    return [*(column.of(row) for column in columns[:2]), error, *[""] * (len(columns) - 3)]


def markdown(
    headers: Sequence[str],
    rules: Sequence[str],
    lines: Iterable[Sequence[str]],
    *,
    compact: bool = False,
) -> str:
    """A table of these cells; where it is compact its header has no space that can be left out."""
    if compact:
        head = "".join(f"| {header}".rstrip() + " " for header in headers)
        head = f"{head}|\n|{'|'.join(rules)}|\n"
    else:
        head = "".join(f"| {' | '.join(cells)} |\n" for cells in (headers, rules))
    return head + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def number(name: str, digits: int = 2) -> Callable[[Row], str]:
    """A cell with a number; empty where a row has none."""

    def cell(row: Row) -> str:
        value = row.get(name)
        return "" if value is None else f"{value:.{digits}f}"

    return cell


def setting(row: Row, template: str, **facts: Any) -> str:
    """A line that says what a run was: fields of a row, of its provenance, and more facts, in a
    template; `{machine}` and `{revision}` are put together here. The command comes last."""
    source = row["provenance"]
    revision = f"{str(source['git_commit'])[:10]}{CHANGES[source['git_uncommitted_changes']]}"
    machine = source.get("gpu") or f"{source['cpu']}, cores: {source.get('cores')}"
    known = {**row, **source, "machine": machine, "revision": revision, **facts}
    return f"{template.format_map(known)} Command: `{source['command']}`.\n"


def instructions(target: str | None) -> str:
    """What a title says of the instructions that a run was held to."""
    return "" if target in NATIVE else f", instructions of {target}"


def model_name(model: str) -> str:
    """The name of a checkpoint's folder, with its parent's where it only says a type."""
    path = Path(model)
    return f"{path.parent.name} {path.name}" if path.name in ("bf16", "fp32") else path.name
