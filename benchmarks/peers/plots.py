"""Draws the rows of compare.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
PLAIN_ALPHA, INK = 0.45, "#222222"
TASKS, TEMPERATURE = ("completion", "code"), 0.0
"""The same kind of text, for the bundled models and for a chat model."""

Row = dict[str, Any]


def _line(row: Row) -> tuple[str, str, str]:
    return row["checkpoint"], row["dtype"], row["provenance"]["cpu"]


def rates(
    rows: Sequence[Row], tasks: Sequence[str] = TASKS, temperature: float = TEMPERATURE
) -> Figure:
    """Tokens per second of every contestant at the tasks and the temperature: a line of panels per
    checkpoint, type and processor, a panel per batch size. Plain decoding is pale; the black line
    is the limit of plain decoding.

    Raises:
        ValueError: there is no row of the tasks at the temperature.
    """
    rows = [r for r in rows if r["task"] in tasks and r["temperature"] == temperature]
    if not rows:
        wanted = " or ".join(tasks)
        raise ValueError(f"there must be rows of {wanted} at temperature {temperature:g}, got none")
    lines = list(dict.fromkeys(map(_line, rows)))
    batches = sorted({row["batch"] for row in rows})
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    height = 0.2 * len(names) + 0.8
    figure = Figure(figsize=(3.2 * len(batches) + 1.8, height * len(lines) + 0.6))
    panels = figure.subplots(len(lines), len(batches), sharey=True, squeeze=False)
    for line, kind in zip(panels, lines, strict=True):
        for panel, batch in zip(line, batches, strict=True):
            own = [row for row in rows if (_line(row), row["batch"]) == (kind, batch)]
            panel.set_visible(bool(own) or panel is line[0])
            for row in own:
                if "error" not in row:
                    panel.barh(
                        names.index(row["contestant"]),
                        row["tokens_per_second"],
                        color=COLORS[row["peer"]],
                        alpha=1.0 if row["speculative"] else PLAIN_ALPHA,
                    )
                panel.axvline(row["limit_tokens_per_second"], color=INK, linewidth=1)
            checkpoint, dtype, cpu = kind
            panel.set_title(f"{checkpoint}, {dtype}, batch {batch}\n{cpu}", fontsize=8)
            panel.tick_params(labelsize=8)
            for side in ("top", "right"):
                panel.spines[side].set_visible(False)
        line[0].set_yticks(range(len(names)), names, fontsize=8)
    panels[0][0].invert_yaxis()
    for panel in panels[-1]:
        panel.set_xlabel("tokens per second", fontsize=8)
    keys = [Patch(color=color, label=peer) for peer, color in COLORS.items()]
    figure.legend(handles=keys, loc="lower center", ncol=len(keys), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.4 / figure.get_figheight(), 1, 1))
    return figure
