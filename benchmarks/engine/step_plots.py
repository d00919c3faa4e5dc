"""Draws the rows of step_cost.py, for docs/overheads.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.engine.step_parts import HOST_PARTS

COLORS = ("#33608c", "#7fa8cc", "#5a9e6f", "#e08a3c", "#b5523b", "#8c6bb1", "#999999")

Row = dict[str, Any]


def label(row: Row) -> str:
    how = "greedy" if row["temperature"] == 0 else f"T {row['temperature']:g}"
    drafts = f", {row['drafts']} drafts" if row["drafts"] else ""
    return f"{how}{drafts}, {row['sampling']}"


def host_time(rows: Sequence[Row]) -> Figure:
    """A panel for every batch size, a bar for every setting, cut into the parts of the step. A bar
    that leaves the panel says how long it is."""
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    tallest = max(sum(row["batch"] == batch for row in rows) for batch in batches)
    figure = Figure(figsize=(5.4 * len(batches), 0.32 * tallest + 1.5))
    panels = figure.subplots(1, len(batches), squeeze=False)[0]
    for panel, batch in zip(panels, batches, strict=True):
        own = [row for row in rows if row["batch"] == batch]
        # Parts are medians of their own: together they are about the median of the whole.
        lengths = [sum(row[f"{part}_ms"] for part in HOST_PARTS) for row in own]
        width = 1.15 * max(n for n, row in zip(lengths, own, strict=True) if _is_shown(row, own))
        for place, (row, length) in enumerate(zip(own, lengths, strict=True)):
            left = 0.0
            for part, color in zip(HOST_PARTS, COLORS, strict=True):
                value = row[f"{part}_ms"]
                panel.barh(place, value, 0.7, left=left, color=color, label=part)
                left += value
            at = min(length, width)
            panel.text(at, place, f" {row['host_ms']:.2f}", va="center", fontsize=8)
        panel.set_yticks(range(len(own)), [label(row) for row in own], fontsize=8)
        panel.invert_yaxis()
        panel.set_xlim(0, width)
        panel.set_title(f"batch {batch}", fontsize=10)
        panel.set_xlabel("host time of a step, ms", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    handles = panels[0].get_legend_handles_labels()[0][: len(HOST_PARTS)]
    style = {"loc": "upper center", "ncols": len(handles), "fontsize": 8, "frameon": False}
    figure.legend(handles, HOST_PARTS, **style)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    return figure


def _is_shown(row: Row, rows: Sequence[Row]) -> bool:
    """Native bars are shown whole; where there are none, all are."""
    return row["sampling"] == "native" or all(r["sampling"] != "native" for r in rows)


def step_cost(rows: Sequence[Row]) -> Figure:
    """Time of a step over its rows, the model's share below the whole, for chains and batches: a
    panel for every model and type."""
    models = list(dict.fromkeys((row["model"], row["dtype"]) for row in rows))
    figure = Figure(figsize=(4.2 * len(models) + 1.0, 3.4))
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for panel, model in zip(panels, models, strict=True):
        _draw_cost(panel, [row for row in rows if (row["model"], row["dtype"]) == model])
        panel.set_title(f"{Path(model[0]).name}, {model[1]}", fontsize=9)
    panels[0].set_ylabel("ms", fontsize=9)
    panels[0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    return figure


def _draw_cost(panel: Axes, rows: Sequence[Row]) -> None:
    for (shape, marker), color in zip((("chain", "o"), ("batch", "s")), COLORS[::3], strict=False):
        own = [row for row in rows if row["shape"] == shape]
        at = [row["rows"] for row in own]
        name = "one sequence, a chain" if shape == "chain" else "sequences of one row"
        panel.plot(at, [r["total_ms"] for r in own], marker=marker, color=color, label=name)
        panel.plot(at, [r["model_ms"] for r in own], color=color, linestyle=":", linewidth=1)
    panel.set_xscale("log", base=2)
    panel.set_xticks([row["rows"] for row in rows if row["shape"] == "chain"])
    panel.xaxis.set_major_formatter("{x:.0f}")
    panel.set_ylim(bottom=0)
    panel.set_xlabel("rows of the step (dotted: the model alone)", fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)
