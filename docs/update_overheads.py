"""Write the results of benchmarks/engine/step_cost.py into docs/overheads.md and draw its plots.

python -m benchmarks.engine.step_cost --host --out host_time.jsonl
python -m benchmarks.engine.step_cost --out step_cost.jsonl
python -m benchmarks.engine.planner_overhead --out planner_overhead.jsonl
python docs/update_overheads.py host_time.jsonl step_cost.jsonl planner_overhead.jsonl

A section is written anew if there are rows of its benchmark; the others stay.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))
from page_sections import fill, read_rows  # noqa: E402 - the page's folder is known only now

PAGE = DOCS / "overheads.md"
PLOTS = DOCS / "plots"
ROOT = DOCS.parent
PARTS = ("schedule", "propose", "metadata", "sample", "commit", "output", "rest")

Row = dict[str, Any]


def host_section(rows: Sequence[Row]) -> str:
    """Host time in ms for every setting, and its parts."""
    lines = [["batch", "T", "top_p", "drafts", "tokens a step", "drawn by", "**host**", *PARTS]]
    lines.append(["---:"] * 5 + ["---"] + ["---:"] * (1 + len(PARTS)))
    for row in rows:
        settings = [str(row["batch"]), f"{row['temperature']:g}", f"{row.get('top_p', 1):g}"]
        settings += [str(row["drafts"]), f"{row['tokens_per_step']:.2f}", row["sampling"]]
        times = [f"{row[f'{part}_ms']:.3f}" for part in PARTS]
        lines.append([*settings, f"**{row['host_ms']:.2f}**", *times])
    steps = ", ".join(str(n) for n in sorted({row["steps"] for row in rows}))
    picture = "![Host time of a step, by parts](plots/host_time.svg)\n\n"
    return _table(lines) + picture + _setting(rows[0], f"vocabulary 4096, steps: {steps}")


def cost_section(rows: Sequence[Row]) -> str:
    """Time of a step in ms for every number of rows, the model's and the rest: a table for every
    model and type."""
    parts = ["![Time of a step by its rows](plots/step_cost.svg)\n\n"]
    for model in dict.fromkeys(map(model_of, rows)):
        own = [row for row in rows if model_of(row) == model]
        parts.append(f"**{', '.join(model)}**\n\n{_cost_table(own)}")
        what = f"context {own[0]['context']}, {own[0]['dtype']}, steps: {own[0]['steps']}, "
        what += f"read bandwidth {own[0]['read_gb_per_second']:.1f} GB/s"
        parts.append(_setting(own[0], what) + "\n")
    return "".join(parts)


def _cost_table(rows: Sequence[Row]) -> str:
    lines = [["", "rows", "step", "of one row", "model", "host", "limit", "share of it"]]
    lines.append(["---", *["---:"] * 7])
    for row in rows:
        times = [f"{row[f'{part}_ms']:.2f}" for part in ("total", "model", "host")]
        cells = [row["shape"], str(row["rows"]), times[0], f"{row['ratio_to_first']:.2f}"]
        limit = [f"{row['limit_ms']:.2f}", f"{row['share_of_limit']:.2f}"]
        lines.append([*cells, *times[1:], *limit])
    return _table(lines)


def planner_section(rows: Sequence[Row]) -> str:
    """CPU time in microseconds of every call, by the kind of step: a table for every setting."""
    parts = []
    for setting in dict.fromkeys((row["temperature"], row["batch"]) for row in rows):
        own = [row for row in rows if (row["temperature"], row["batch"]) == setting]
        parts.append(f"**T {setting[0]:g}, batch {setting[1]}**\n\n{_planner_table(own)}")
    source = rows[0]["provenance"]
    changed = " with uncommitted changes" if source["git_uncommitted_changes"] else ""
    parts.append(
        f"`{rows[0]['model']}`; means without the slowest twentieth, in microseconds of CPU time. "
        f"{source['cpu']}, torch threads: 1, load at the start: {source['load_average'][0]:.1f}, "
        f"torch {source['torch']}, Python {source['python']}, commit "
        f"{str(source['git_commit'])[:10]}{changed}. Command: `{source['command']}`.\n"
    )
    return "".join(parts)


def _planner_table(rows: Sequence[Row]) -> str:
    """The calls in which a step that rests differs most from a plain one come first."""
    by_kind = {row["kind"]: row["calls_us"] for row in rows}
    plain, resting = by_kind.get("plain", {}), by_kind.get("resting", {})
    names = sorted(
        {name for calls in by_kind.values() for name in calls},
        key=lambda name: (-abs(resting.get(name, 0.0) - plain.get(name, 0.0)), name),
    )
    lines = [["call", *(f"{row['kind']} ({row['steps']})" for row in rows)]]
    lines.append(["---", *["---:"] * len(rows)])
    lines.append(["**all**", *(f"**{row['total_us']:.0f}**" for row in rows)])
    for name in names:
        found = [row["calls_us"].get(name) for row in rows]
        if max(value or 0.0 for value in found) >= 1.0:
            cells = ("" if value is None else f"{value:.1f}" for value in found)
            lines.append([f"`{name}`", *cells])
    return _table(lines)


def model_of(row: Row) -> tuple[str, str]:
    """What one table is about."""
    return Path(row["model"]).name, row.get("dtype", "")


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def _setting(row: Row, what: str) -> str:
    """Model, hardware, versions, commit and command: what a number has to name."""
    source = row["provenance"]
    changed = " with uncommitted changes" if source["git_uncommitted_changes"] else ""
    return (
        f"`{row['model']}`, {what}; medians, in milliseconds. {source['cpu']}, cores: "
        f"{source['cores']}, torch threads: {source['torch_threads']}, load at the start: "
        f"{source['load_average'][0]:.1f}, torch {source['torch']}, Python {source['python']}, "
        f"commit {str(source['git_commit'])[:10]}{changed}. Command: `{source['command']}`.\n"
    )


SECTIONS: dict[str, Callable[[Sequence[Row]], str]] = {
    "host_time": host_section,
    "step_cost": cost_section,
    "planner_overhead": planner_section,
}


def updated(page: str, rows: Sequence[Row]) -> str:
    """Return the page with the sections filled in that there are rows for; see `fill`."""
    return fill(page, rows, SECTIONS, Path(__file__).name, table_of=model_of)


def draw(rows: Sequence[Row], folder: Path) -> None:
    sys.path.insert(0, str(ROOT))
    from benchmarks.acceptance.plots import save
    from benchmarks.engine import step_plots

    for name, plot in (("host_time", step_plots.host_time), ("step_cost", step_plots.step_cost)):
        own = [row for row in rows if row.get("benchmark") == name]
        if own:
            save(plot(own), folder / f"{name}.svg")


def main() -> None:
    rows = read_rows(sys.argv)
    PAGE.write_text(updated(PAGE.read_text(), rows))
    draw(rows, PLOTS)


if __name__ == "__main__":
    main()
