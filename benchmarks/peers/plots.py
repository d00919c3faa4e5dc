"""Draws the rows of compare.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

COLORS = {
    "folospec": "#33608c",
    "transformers": "#8c8c8c",
    "vllm": "#e08a3c",
    "openvino": "#6a9f58",
    "llama_cpp": "#b0577b",
    "llama_cpp_q4_1": "#d9a3bc",
}
COLUMNS = 3
PLAIN_ALPHA, INK = 0.45, "#222222"
TASKS, TEMPERATURE = ("completion", "code"), 0.0
"""The same kind of text, for the bundled models and for a chat model."""

Row = dict[str, Any]


def rates(
    rows: Sequence[Row], tasks: Sequence[str] = TASKS, temperature: float = TEMPERATURE
) -> Figure:
    """Tokens per second of every contestant at the tasks and the temperature: a panel per
    checkpoint, type, batch size and processor. Plain decoding is pale; the black line is the limit
    of plain decoding.

    Raises:
        ValueError: there is no row of the tasks at the temperature.
    """
    rows = [r for r in rows if r["task"] in tasks and r["temperature"] == temperature]
    if not rows:
        wanted = " or ".join(tasks)
        raise ValueError(f"there must be rows of {wanted} at temperature {temperature:g}, got none")
    kinds = list(dict.fromkeys(map(_kind, rows)))
    parts = [[row for row in rows if _kind(row) == kind] for kind in kinds]
    lines = -(-len(parts) // COLUMNS)
    height = 0.19 * max(map(len, parts)) + 0.9
    figure = Figure(figsize=(4.2 * min(len(parts), COLUMNS), height * lines + 0.4))
    panels = list(figure.subplots(lines, min(len(parts), COLUMNS), squeeze=False).flat)
    for panel, kind, own in zip(panels, kinds, parts, strict=False):
        _draw(panel, own)
        checkpoint, dtype, batch, cpu = kind
        panel.set_title(f"{checkpoint}, {dtype}, batch {batch}\n{cpu}", fontsize=8)
    for panel in panels[len(parts) :]:
        panel.set_visible(False)
    keys = [Patch(color=color, label=peer) for peer, color in COLORS.items()]
    figure.legend(handles=keys, loc="lower center", ncol=len(keys), fontsize=8, frameon=False)
    figure.supxlabel("tokens per second", y=0.3 / figure.get_figheight(), fontsize=9)
    figure.tight_layout(rect=(0, 0.3 / figure.get_figheight(), 1, 1))
    return figure


def _kind(row: Row) -> tuple[str, str, int, str]:
    return row["checkpoint"], row["dtype"], row["batch"], row["provenance"]["cpu"]


def _draw(panel: Axes, rows: Sequence[Row]) -> None:
    for place, row in enumerate(rows):
        if "error" not in row:
            alpha = 1.0 if row["speculative"] else PLAIN_ALPHA
            rate = row["tokens_per_second"]
            panel.barh(place, rate, color=COLORS[row["peer"]], alpha=alpha)
    for limit in dict.fromkeys(row["limit_tokens_per_second"] for row in rows):
        panel.axvline(limit, color=INK, linewidth=1)
    panel.set_yticks(range(len(rows)), [row["contestant"] for row in rows])
    panel.invert_yaxis()
    panel.tick_params(labelsize=8)
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right"]].set_visible(False)
