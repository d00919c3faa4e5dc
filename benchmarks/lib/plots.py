"""Saves the plots of the pages: small, and the same file for the same rows."""

from __future__ import annotations

import io
import re
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

STYLE = {
    "svg.hashsalt": "folospec",
    "svg.fonttype": "none",  # text stays text
    "font.sans-serif": ["DejaVu Sans"],  # every text names its fonts
}
_DECIMALS = re.compile(r"-?\d+\.\d{3,}")


def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG, its coordinates to a hundredth of a point."""
    text = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(
            text, format="svg", metadata={"Date": None}, facecolor="white", bbox_inches="tight"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_DECIMALS.sub(lambda found: f"{float(found[0]):.2f}", text.getvalue()))
