"""Saves the plots of the pages: the same rows, the same file."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

STYLE = {"svg.hashsalt": "folospec", "svg.fonttype": "none"}  # text stays text


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure.savefig(path, metadata={"Date": None}, facecolor="white", bbox_inches="tight")
