"""Draws the rows of length.py and calibration.py, for docs/acceptance.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

COLORS = {0.0: "#33608c", 0.8: "#e08a3c"}
INK, MUTED = "#222222", "#999999"
LEAST_SHARE = 0.01
"""Of the nodes, for a bin to be drawn."""

Row = dict[str, Any]


def acceptance(rows: Sequence[Row]) -> Figure:
    """Tokens per target pass of every contestant, one panel per task, a bar per temperature; the
    mark is where the ideal copier would be."""
    rows = [row for row in rows if "error" not in row]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    figure = Figure(figsize=(3.1 * len(tasks) + 1.6, 0.34 * len(names) + 1.4))
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        for row in (row for row in rows if row["task"] == task):
            low = row["temperature"] == 0
            y = names.index(row["contestant"]) + (-0.19 if low else 0.19)
            color = COLORS[row["temperature"]]
            panel.barh(y, 1 / row["target_passes_per_token"], 0.36, color=color)
            if "ceiling_target_passes_per_token" in row:
                ceiling = 1 / row["ceiling_target_passes_per_token"]
                panel.plot([ceiling] * 2, [y - 0.18, y + 0.18], color=INK, linewidth=1.5)
        panel.set_title(task, fontsize=10)
        panel.set_xlabel("tokens per target pass", fontsize=9)
        panel.axvline(1, color=MUTED, linewidth=0.8)
        _plain_frame(panel)
    panels[0].set_yticks(range(len(names)), names, fontsize=9)
    panels[0].invert_yaxis()
    _name_temperatures(figure)
    figure.tight_layout(rect=(0, 0.3 / figure.get_figheight(), 1, 1))
    return figure


def positions(rows: Sequence[Row]) -> Figure:
    """The share of drafts that were accepted up to each position, one panel per contestant and a
    line per task, at temperature 0."""
    rows = [row for row in rows if "error" not in row and row["temperature"] == 0]
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    longest = max(len(row["acceptance_rate_per_pos"]) for row in rows)
    figure, panels = _grid(names)
    colors = dict(zip(tasks, ("#33608c", "#e08a3c", "#5a9a68", "#8c5a8c"), strict=False))
    for row in rows:
        shares = row["acceptance_rate_per_pos"]
        panel = panels[names.index(row["contestant"])]
        panel.plot(range(1, len(shares) + 1), shares, color=colors[row["task"]])
    panels[0].set_xlim(0.5, longest + 0.5)
    panels[0].set_ylim(0, 1.03)
    panels[0].xaxis.set_major_locator(MaxNLocator(4, integer=True))
    figure.supxlabel("draft position", y=0.4 / figure.get_figheight(), fontsize=9)
    figure.supylabel("accepted up to it", fontsize=9)
    lines = [Line2D([], [], color=color, label=task) for task, color in colors.items()]
    figure.legend(handles=lines, loc="lower center", ncols=len(tasks), fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.3 / figure.get_figheight(), 1, 1))
    return figure


def reliability(rows: Sequence[Row]) -> Figure:
    """Confidence against what was accepted, one panel per contestant, without the bins that have
    fewer than a hundredth of the nodes; the numbers count all nodes."""
    rows = [row for row in rows if row["num_nodes"]]
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    figure, panels = _grid(names)
    for row in rows:
        panel = panels[names.index(row["contestant"])]
        color = COLORS[row["temperature"]]
        bins = [b for b in row["bins"] if b["num_nodes"] >= LEAST_SHARE * row["num_nodes"]]
        x, y = [b["confidence"] for b in bins], [b["accepted"] for b in bins]
        panel.plot(x, y, "o-", ms=3, linewidth=1, color=color)
        place = 0.92 if row["temperature"] == 0 else 0.82
        panel.text(0.04, place, f"{row['num_nodes']} nodes", color=color, fontsize=8)
    for panel in panels[: len(names)]:
        panel.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8)
    panels[0].set_xlim(0, 1.02)
    panels[0].set_ylim(0, 1.02)
    panels[0].set_xticks((0, 0.5, 1))
    figure.supxlabel("confidence", y=0.4 / figure.get_figheight(), fontsize=9)
    figure.supylabel("accepted", fontsize=9)
    _name_temperatures(figure)
    figure.tight_layout(rect=(0, 0.3 / figure.get_figheight(), 1, 1))
    return figure


def _grid(names: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """A panel for each name, four in a row, with the same axes."""
    columns = min(4, max(1, len(names)))
    lines = max(1, math.ceil(len(names) / columns))
    figure = Figure(figsize=(2.4 * columns + 0.4, 2.0 * lines + 0.8))
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    panels = list(grid.flat)
    for panel, name in zip(panels, names, strict=False):
        panel.set_title(name, fontsize=9)
        _plain_frame(panel)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    lowest = panels[max(0, len(names) - columns) : len(names)]
    for panel in panels:
        panel.tick_params(bottom=panel in lowest, labelbottom=panel in lowest)
        panel.tick_params(left=panel in panels[::columns])
    panels[0].set_yticks((0, 0.5, 1))
    return figure, panels


def _plain_frame(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)


def _name_temperatures(figure: Figure) -> None:
    patches = [Patch(color=c, label=f"temperature {t:g}") for t, c in COLORS.items()]
    figure.legend(handles=patches, loc="lower center", fontsize=9, frameon=False, ncols=2)
