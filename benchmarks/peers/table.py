"""The rows of compare.py as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

Row = dict[str, Any]


def rate_table(rows: Sequence[Row], title: str) -> Table:
    table = Table(
        title=f"{title}: generated tokens per second",
        caption="x: speed relative to folospec plain, and to the fastest peer of all modes. "
        "limit: share of what the machine could do without speculation. same: completions equal "
        "to folospec plain's. excess: nats per token by which samples are too surprising.",
    )
    for header in (
        "dtype",
        "task",
        "T",
        "batch",
        "contestant",
        "median",
        "range",
        "x plain",
        "x peer",
        "limit",
        "same",
        "excess",
    ):
        left = header in ("dtype", "task", "contestant")
        table.add_column(header, justify="left" if left else "right", no_wrap=left)
    for row in rows:
        cell = [row["dtype"], row["task"], f"{row['temperature']:g}", str(row["batch"])]
        if "error" in row:
            table.add_row(*cell, row["contestant"], f"[red]{row['error'][:40]}[/red]")
            continue
        low, high = row["tokens_per_second_range"]
        table.add_row(
            *cell,
            row["contestant"],
            f"{row['tokens_per_second']:.1f}",
            f"{low:.0f}-{high:.0f}",
            _number(row["ratio_to_folospec_plain"]),
            _number(row["ratio_to_fastest_peer"]),
            _number(row["share_of_limit"]),
            _number(row.get("same_completions")),
            _number(row.get("excess_surprise")),
        )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
