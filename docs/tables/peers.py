"""docs/peers.md: folospec next to other engines, and what `"auto"` reaches of what it could."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from docs.tables.markdown import (
    LEFT,
    Column,
    Row,
    instructions,
    model_name,
    number,
    setting,
    table,
)
from docs.tables.sections import Section, by, run_of

PAGE = "docs/peers.md"
SETTING = (
    "{cpu}, threads: {threads}; read bandwidth {bandwidth:.1f} GB/s, peak {peaks}. {rounds} "
    "rounds. {packages}. Commit {revision}."
)
BOUND = (
    "Row curve of the first: {curve}. {cpu}, threads: {threads}, {rounds} rounds, torch {torch}, "
    "commit {revision}."
)


def _precision(row: Row) -> str:
    """What it calculates in; one word where all is the same."""
    parts = list(dict.fromkeys(row["precision"].values()))
    return parts[0] if len(parts) == 1 else " / ".join(row["precision"].values())


def _same(row: Row) -> str:
    same = row.get("same_completions")
    return "" if same is None else f"{same:.0%}"


def _excess(row: Row) -> str:
    excess = row.get("excess_surprise")
    return "" if excess is None else f"{excess:.2f} ± {row['excess_surprise_error']:.2f}"


COLUMNS = (
    Column("", "{contestant}", LEFT),
    Column("weights / activations / KV", _precision, LEFT),
    Column("tokens/s", "{tokens_per_second:.1f}"),
    Column("x plain", number("ratio_to_folospec_plain")),
    Column("x fastest peer", number("ratio_to_fastest_peer")),
    Column("x fastest plain peer", number("ratio_to_fastest_plain_peer")),
    Column("share of the limit", number("share_of_limit")),
    Column("tokens as folospec plain", _same),
    Column("excess surprise", _excess),
)


def text(rows: Sequence[Row]) -> str:
    """A table for every checkpoint, type, task, temperature and batch size, and what each run
    was."""
    parts = ["![Tokens per second](plots/peers.svg)\n\n"]
    for own in by(run_of, rows).values():
        for cell, part in by(_cell, own).items():
            checkpoint, dtype, task, temperature, batch, target = cell
            what = f"{checkpoint}, {dtype}, {task}, temperature {temperature:g}, batch {batch}"
            title = f"**{what}{instructions(target)}** ({_limit(part[0])})"
            parts.append(f"{title}\n\n{table(COLUMNS, part)}\n")
        parts.append(f"{_setting(own)}\n")
    return "".join(parts)


def _cell(row: Row) -> tuple[Any, ...]:
    keys = ("checkpoint", "dtype", "task", "temperature", "batch", "target")
    return tuple(row[key] for key in keys)


def _limit(row: Row) -> str:
    share = row.get("share_past_end")
    past = f", {share:.0%} of the outputs go on behind their end" if share else ""
    return (
        f"a step reads {row['step_bytes'] / 1e6:.0f} MB, {row['step_operations'] / 1e9:.2f} GFLOP; "
        f"limit {1000 * row['step_limit_seconds']:.2f} ms, "
        f"{row['limit_tokens_per_second']:.0f} tokens/s with the prompts; {row['max_tokens']} new "
        f"tokens of each{past}"
    )


def _setting(rows: Sequence[Row]) -> str:
    machine = rows[0]["machine"]
    peaks = machine["operations_per_second"].items()
    versions = {
        f"{row['peer']}: {package}": version
        for row in rows
        for package, version in row["versions"].items()
    }
    return setting(
        rows[0],
        SETTING,
        bandwidth=machine["read_bytes_per_second"] / 1e9,
        peaks=", ".join(f"{dtype} {value / 1e9:.0f} GFLOP/s" for dtype, value in peaks),
        packages="; ".join(f"{name} {version}" for name, version in versions.items()),
    )


def _rule(row: Row) -> str:
    limit = row["best_limit"]
    return f"at most {limit}, chance at least {row['best_floor']:g}" if limit else "no drafts"


BOUND_COLUMNS = (
    Column("", "{task}", LEFT),
    Column("T", "{temperature:g}"),
    *(
        Column(f"{n}, tokens/s", f"{{{n}_tokens_per_second:.1f}}")
        for n in ("plain", "auto", "bound")
    ),
    *(Column(f"{n} / plain", f"{{{n}_ratio:.2f}}") for n in ("auto", "bound", "foresight")),
    Column("auto / bound", "{share_of_bound:.2f}"),
    Column("best rule", _rule, LEFT),
    Column("acceptance length", number("acceptance_length")),
    Column("time of the prompts", "{prompt_share:.0%}"),
)


def bound_text(rows: Sequence[Row]) -> str:
    """A table for every run: what auto reaches, next to what could be reached."""
    parts = []
    for own in by(run_of, rows).values():
        row = own[0]
        target = instructions(row["provenance"].get("kernels_target"))
        title = f"**{model_name(row['model'])}, {row['dtype']}, batch 1{target}**"
        curve = ", ".join(f"{count}: {cost:.2f}" for count, cost in row["row_curve"].items())
        measured = setting(row, BOUND, curve=curve)
        parts.append(f"{title}\n\n{table(BOUND_COLUMNS, own, compact=True)}\n{measured}\n")
    return "\n".join(parts)


def _table_of(row: Row) -> tuple[Any, ...]:
    return row["provenance"]["cpu"], *_cell(row)


def _bound_table_of(row: Row) -> tuple[Any, ...]:
    source, names = row["provenance"], ("model", "dtype", "task", "temperature")
    return source["cpu"], *(row[name] for name in names), source.get("kernels_target")


SECTIONS = (
    Section(
        "peers",
        PAGE,
        text,
        table_of=_table_of,
        plots={"peers.svg": "benchmarks.peers.plots:rates"},
    ),
    Section("bound", PAGE, bound_text, table_of=_bound_table_of),
)
