"""Write the results of benchmarks/peers/compare.py and benchmarks/acceptance/bound.py into
docs/peers.md, and draw the plot of the first.

python -m benchmarks.peers.compare --out peers.jsonl
python -m benchmarks.acceptance.bound --out bound.jsonl
python docs/update_peers.py peers.jsonl bound.jsonl

Several runs may be given, each with a part of the table. What is compared must come from one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))
from page_sections import fill, model_name, read_rows, run_of  # noqa: E402 - the page's folder is known only now

PAGE = DOCS / "peers.md"
PLOT = DOCS / "plots" / "peers.svg"
ROOT = DOCS.parent
HEADERS = (
    ("", "---"),
    ("weights / activations / KV", "---"),
    ("tokens/s", "---:"),
    ("x plain", "---:"),
    ("x fastest peer", "---:"),
    ("x fastest plain peer", "---:"),
    ("share of the limit", "---:"),
    ("tokens as folospec plain", "---:"),
    ("excess surprise", "---:"),
)

BOUND_HEADER = (
    "| | T | plain, tokens/s | auto, tokens/s | bound, tokens/s | auto / plain | bound / plain "
    "| foresight / plain | auto / bound | best rule | acceptance length | time of the prompts |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|---:|---:|\n"
)

Row = dict[str, Any]


def section(rows: Sequence[Row]) -> str:
    """A table for every checkpoint, type, task, temperature and batch size, and what each run
    was."""
    parts = ["![Tokens per second](plots/peers.svg)\n\n"]
    for run in dict.fromkeys(map(run_of, rows)):
        own = [row for row in rows if run_of(row) == run]
        for cell in dict.fromkeys(map(_cell, own)):
            part = [row for row in own if _cell(row) == cell]
            checkpoint, dtype, task, temperature, batch, target = cell
            what = f"{checkpoint}, {dtype}, {task}, temperature {temperature:g}, batch {batch}"
            title = f"**{what}{_instructions(target)}**"
            parts.append(f"{title} ({_limit(part[0])})\n\n{_table(part)}\n")
        parts.append(f"{_setting(own)}\n")
    return "".join(parts)


def _cell(row: Row) -> tuple[Any, ...]:
    keys = ("checkpoint", "dtype", "task", "temperature", "batch", "target")
    return tuple(row[key] for key in keys)


def _instructions(target: str | None) -> str:
    return "" if target in (None, "native") else f", instructions of {target}"


def _limit(row: Row) -> str:
    return (
        f"a step reads {row['step_bytes'] / 1e6:.0f} MB, {row['step_operations'] / 1e9:.2f} GFLOP; "
        f"limit {1000 * row['step_limit_seconds']:.2f} ms, "
        f"{row['limit_tokens_per_second']:.0f} tokens/s with the prompts; {row['max_tokens']} new "
        f"tokens of each{_past_end(row)}"
    )


def _past_end(row: Row) -> str:
    share = row.get("share_past_end")
    return f", {share:.0%} of the outputs go on behind their end" if share else ""


def _table(rows: Sequence[Row]) -> str:
    lines = [[header for header, _ in HEADERS], [rule for _, rule in HEADERS]]
    for row in rows:
        if "error" in row:
            blank = [""] * (len(HEADERS) - 3)
            error = f"failed: {row['error']}".replace("|", "/")
            lines.append([row["contestant"], _precision(row), error, *blank])
            continue
        same, excess = row.get("same_completions"), row.get("excess_surprise")
        lines.append(
            [
                row["contestant"],
                _precision(row),
                f"{row['tokens_per_second']:.1f}",
                _number(row["ratio_to_folospec_plain"]),
                _number(row["ratio_to_fastest_peer"]),
                _number(row["ratio_to_fastest_plain_peer"]),
                _number(row["share_of_limit"]),
                "" if same is None else f"{same:.0%}",
                "" if excess is None else f"{excess:.2f} ± {row['excess_surprise_error']:.2f}",
            ]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def bound_section(rows: Sequence[Row]) -> str:
    """A table for every run: what auto reaches, next to what could be reached."""
    parts = []
    for run in dict.fromkeys(map(run_of, rows)):
        own = [row for row in rows if run_of(row) == run]
        target = _instructions(own[0]["provenance"].get("kernels_target"))
        title = f"**{model_name(own[0]['model'])}, {own[0]['dtype']}, batch 1{target}**"
        lines = "".join(map(_bound_line, own))
        parts.append(f"{title}\n\n{BOUND_HEADER}{lines}\n{_bound_setting(own[0])}\n")
    return "\n".join(parts)


def _bound_line(row: Row) -> str:
    limit, floor = row["best_limit"], row["best_floor"]
    rule = f"at most {limit}, chance at least {floor:g}" if limit else "no drafts"
    rates = [f"{row[f'{name}_tokens_per_second']:.1f}" for name in ("plain", "auto", "bound")]
    ratios = [row[f"{name}_ratio"] for name in ("auto", "bound", "foresight")]
    cells = [
        row["task"],
        f"{row['temperature']:g}",
        *rates,
        *(f"{ratio:.2f}" for ratio in (*ratios, row["share_of_bound"])),
        rule,
        _number(row["acceptance_length"]),
        f"{row['prompt_share']:.0%}",
    ]
    return f"| {' | '.join(cells)} |\n"


def _bound_setting(row: Row) -> str:
    source = row["provenance"]
    changed = " with uncommitted changes" if source["git_uncommitted_changes"] else ""
    curve = ", ".join(f"{rows}: {cost:.2f}" for rows, cost in row["row_curve"].items())
    return (
        f"Row curve of the first: {curve}. {source['cpu']}, threads: {row['threads']}, "
        f"{row['rounds']} rounds, torch {source['torch']}, commit "
        f"{str(source['git_commit'])[:10]}{changed}. Command: `{source['command']}`.\n"
    )


def _precision(row: Row) -> str:
    """What it calculates in; one word where all is the same."""
    parts = list(dict.fromkeys(row["precision"].values()))
    return parts[0] if len(parts) == 1 else " / ".join(row["precision"].values())


def _setting(rows: Sequence[Row]) -> str:
    """Machine, versions, limits and command: what a number has to name."""
    row = rows[0]
    source, machine = row["provenance"], row["machine"]
    versions: dict[str, str] = {}
    for other in rows:
        for package, version in other["versions"].items():
            versions[f"{other['peer']}: {package}"] = version
    peaks = ", ".join(
        f"{dtype} {value / 1e9:.0f} GFLOP/s"
        for dtype, value in machine["operations_per_second"].items()
    )
    changed = " with uncommitted changes" if source["git_uncommitted_changes"] else ""
    return (
        f"{source['cpu']}, threads: {row['threads']}; read bandwidth "
        f"{machine['read_bytes_per_second'] / 1e9:.1f} GB/s, peak {peaks}. {row['rounds']} rounds. "
        f"{'; '.join(f'{k} {v}' for k, v in versions.items())}. "
        f"Commit {str(source['git_commit'])[:10]}{changed}. Command: `{source['command']}`.\n"
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def updated(page: str, rows: Sequence[Row]) -> str:
    """Return the page with its sections filled in; see `fill`."""
    sections = {"peers": section, "bound": bound_section}
    return fill(page, rows, sections, Path(__file__).name, table_of=_table_key)


def _table_key(row: Row) -> tuple[Any, ...]:
    """What the rows of a table have in common, the processor among it."""
    source = row["provenance"]
    if row["benchmark"] == "bound":
        own = row["model"], row["dtype"], row["task"], row["temperature"]
        return source["cpu"], *own, source.get("kernels_target")
    return source["cpu"], *_cell(row)


def draw(rows: Sequence[Row], path: Path) -> None:
    sys.path.insert(0, str(ROOT))
    from benchmarks.peers import plots as peers_plots

    peers_plots.save(peers_plots.rates(rows), path)


def main() -> None:
    rows = read_rows(sys.argv)
    PAGE.write_text(updated(PAGE.read_text(), rows))
    compared = [row for row in rows if row["benchmark"] == "peers"]
    if compared:
        draw(compared, PLOT)


if __name__ == "__main__":
    main()
