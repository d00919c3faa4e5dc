"""docs/overheads.md: where the time of a step goes, what it costs by its rows, and the planner."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from docs.tables.markdown import LEFT, RIGHT, Column, Row, markdown, setting, table
from docs.tables.sections import Section, by

PAGE, PLOTS = "docs/overheads.md", "benchmarks.engine.step_plots"
PARTS = ("schedule", "propose", "metadata", "sample", "commit", "output", "rest")
SETTING = (
    "; medians, in milliseconds. {cpu}, cores: {cores}, torch threads: {torch_threads}, load at "
    "the start: {load_average[0]:.1f}, torch {torch}, Python {python}, commit {revision}."
)
HOST = "`{model}`, vocabulary 4096, steps: {steps_of_all}" + SETTING
COST = (
    "`{model}`, context {context}, {dtype}, steps: {steps}, read bandwidth "
    "{read_gb_per_second:.1f} GB/s" + SETTING
)
PLANNER = (
    "`{model}`; means without the slowest twentieth, in microseconds of CPU time. {cpu}, torch "
    "threads: 1, load at the start: {load_average[0]:.1f}, torch {torch}, Python {python}, "
    "commit {revision}."
)
HOST_COLUMNS = (
    Column("batch", "{batch}"),
    Column("T", "{temperature:g}"),
    Column("top_p", lambda row: f"{row.get('top_p', 1):g}"),
    Column("drafts", "{drafts}"),
    Column("tokens a step", "{tokens_per_step:.2f}"),
    Column("drawn by", "{sampling}", LEFT),
    Column("**host**", "**{host_ms:.2f}**"),
    *(Column(part, f"{{{part}_ms:.3f}}") for part in PARTS),
)
COST_COLUMNS = (
    Column("", "{shape}", LEFT),
    Column("rows", "{rows}"),
    Column("step", "{total_ms:.2f}"),
    Column("of one row", "{ratio_to_first:.2f}"),
    Column("model", "{model_ms:.2f}"),
    Column("host", "{host_ms:.2f}"),
    Column("limit", "{limit_ms:.2f}"),
    Column("share of it", "{share_of_limit:.2f}"),
)


def host_text(rows: Sequence[Row]) -> str:
    """Host time in ms for every setting, and its parts."""
    steps = ", ".join(str(n) for n in sorted({row["steps"] for row in rows}))
    picture = "![Host time of a step, by parts](plots/host_time.svg)"
    measured = setting(rows[0], HOST, steps_of_all=steps)
    return f"{table(HOST_COLUMNS, rows)}\n{picture}\n\n{measured}"


def cost_text(rows: Sequence[Row]) -> str:
    """Time of a step in ms for every number of rows, the model's and the rest: a table for every
    model and type."""
    parts = ["![Time of a step by its rows](plots/step_cost.svg)\n\n"]
    for model, own in by(_table_of, rows).items():
        title = f"**{', '.join(model)}**"
        parts.append(f"{title}\n\n{table(COST_COLUMNS, own)}\n{setting(own[0], COST)}\n")
    return "".join(parts)


def planner_text(rows: Sequence[Row]) -> str:
    """CPU time in microseconds of every call, by the kind of step: a table for every setting."""
    parts = [
        f"**T {temperature:g}, batch {batch}**\n\n{_planner_table(own)}\n"
        for (temperature, batch), own in by(
            lambda row: (row["temperature"], row["batch"]), rows
        ).items()
    ]
    return "".join([*parts, setting(rows[0], PLANNER)])


def _planner_table(rows: Sequence[Row]) -> str:
    """The calls in which a step that rests differs most from a plain one come first."""
    by_kind = {row["kind"]: row["calls_us"] for row in rows}
    plain, resting = by_kind.get("plain", {}), by_kind.get("resting", {})
    names = sorted(
        {name for calls in by_kind.values() for name in calls},
        key=lambda name: (-abs(resting.get(name, 0.0) - plain.get(name, 0.0)), name),
    )
    lines = [["**all**", *(f"**{row['total_us']:.0f}**" for row in rows)]]
    for name in names:
        found = [row["calls_us"].get(name) for row in rows]
        if max(value or 0.0 for value in found) >= 1.0:
            cells = ("" if value is None else f"{value:.1f}" for value in found)
            lines.append([f"`{name}`", *cells])
    headers = ["call", *(f"{row['kind']} ({row['steps']})" for row in rows)]
    return markdown(headers, [LEFT, *[RIGHT] * len(rows)], lines)


def _table_of(row: Row) -> tuple[str, str]:
    return Path(row["model"]).name, row.get("dtype", "")


SECTIONS = (
    Section(
        "host_time",
        PAGE,
        host_text,
        table_of=_table_of,
        plots={"host_time.svg": f"{PLOTS}:host_time"},
    ),
    Section(
        "step_cost",
        PAGE,
        cost_text,
        table_of=_table_of,
        plots={"step_cost.svg": f"{PLOTS}:step_cost"},
    ),
    Section("planner_overhead", PAGE, planner_text, table_of=_table_of),
)
