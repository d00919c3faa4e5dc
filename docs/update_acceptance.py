"""Write the results of the acceptance benchmarks into docs/acceptance.md and draw its plots.

python -m benchmarks.acceptance.length --out acceptance.jsonl
python -m benchmarks.acceptance.calibration --out calibration.jsonl
python -m benchmarks.acceptance.coupling --out coupling.jsonl
python docs/update_acceptance.py acceptance.jsonl calibration.jsonl coupling.jsonl [chat.jsonl]

A section is written anew if there are rows of its benchmark; the others stay.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))
from page_sections import fill  # noqa: E402 - the page's folder is known only now

PAGE = DOCS / "acceptance.md"
PLOTS = DOCS / "plots"
ROOT = DOCS.parent
BUNDLED, CHAT = "folospec-demo", "acceptance of a chat model"

Row = dict[str, Any]


def acceptance_section(rows: Sequence[Row]) -> str:
    """A table for every task, the plots, and what was measured on what."""
    return (
        _tables(rows)
        + "![Tokens per target pass](plots/acceptance.svg)\n\n"
        + "![Acceptance by position at temperature 0](plots/positions.svg)\n\n"
        + _items(rows[0])
    )


def chat_section(rows: Sequence[Row]) -> str:
    """The same for a chat model, without plots."""
    return _tables(rows) + _items(rows[0])


def _tables(rows: Sequence[Row]) -> str:
    tables = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        tables.append(f"**{task}**\n\n{_task_table(own)}{_task_note(own)}\n")
    return "".join(tables)


def _items(row: Row) -> str:
    dtypes = f"acceptance in {row['dtype']}, costs in {row['timed_dtype']}"
    return _setting(row, f"{row['num_items']} items of each task; {dtypes}")


def _task_table(rows: Sequence[Row]) -> str:
    copied = any("share_of_ceiling" in row for row in rows)
    headers = ["", "T", "budget", "acceptance length", "passes per token"]
    headers += ["ideal copier: length", "passes per token", "share of it"] if copied else []
    headers += ["draft cost", "verification cost", "tokens as plain"]
    lines = [headers, ["---", *["---:"] * (len(headers) - 2), "---"]]
    for row in rows:
        head = [row["contestant"], f"{row['temperature']:g}"]
        if "error" in row:
            lines.append([*head, f"failed: {row['error']}", *[""] * (len(headers) - 3)])
            continue
        cells = [str(row["budget"]), _number(row["acceptance_length"])]
        cells.append(_number(row["target_passes_per_token"], 3))
        if copied:
            cells.append(_number(row.get("ceiling_acceptance_length")))
            cells.append(_number(row.get("ceiling_target_passes_per_token"), 3))
            cells.append(_number(row.get("share_of_ceiling")))
        cells += [_number(row["draft_cost"], 3), _number(row["verification_cost"])]
        differing = len(row["first_differences"])
        same = row["tokens_equal_to_plain"]
        cells.append("equal" if same else f"{differing} of {row['num_items']} items differ")
        lines.append([*head, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _task_note(rows: Sequence[Row]) -> str:
    measured = [row for row in rows if "error" not in row]
    shares = {row["temperature"]: row["share_reproduced"] for row in measured}
    if not shares or None in shares.values():
        return ""
    said = ", ".join(f"{share:.0%} at temperature {t:g}" for t, share in sorted(shares.items()))
    return f"\nOf the edit's tokens the target reproduces {said}.\n"


def calibration_section(rows: Sequence[Row]) -> str:
    lines = [
        "| | T | nodes | accepted | mean confidence | calibration error | Brier score "
        "| Brier score of the mean |\n|---|---:|---:|---:|---:|---:|---:|---:|\n"
    ]
    names = ("mean_accepted", "mean_confidence", "calibration_error", "brier_score")
    for row in rows:
        values = [row.get(name) for name in (*names, "brier_score_of_mean")]
        cells = [row["contestant"], f"{row['temperature']:g}", str(row["num_nodes"])]
        lines.append(f"| {' | '.join([*cells, *(_number(value, 3) for value in values)])} |\n")
    size = f"{rows[0]['num_items']} prompts, {rows[0]['max_tokens']} tokens each"
    return (
        "".join(lines)
        + "\n![Confidence against acceptance](plots/calibration.svg)\n\n"
        + _setting(rows[0], f"{size}; {rows[0]['dtype']}")
    )


def coupling_section(rows: Sequence[Row]) -> str:
    lines = [
        "| children | rule | T | verified drafts | acceptance length (95 %) | coupled / this "
        "|\n|---|---|---:|---:|---:|---:|\n"
    ]
    for row in rows:
        ratio = ""
        if "coupled_ratio" in row:
            low, high = row["coupled_ratio_interval"]
            ratio = f"{row['coupled_ratio']:.3f} ({low:.3f} to {high:.3f})"
        low, high = row["interval"]
        cells = [
            row["contestant"],
            row["settings"]["speculative"]["acceptance"],
            f"{row['temperature']:g}",
            str(row["num_drafts"]),
            f"{row['acceptance_length']:.3f} ({low:.3f} to {high:.3f})",
            ratio,
        ]
        lines.append(f"| {' | '.join(cells)} |\n")
    first = rows[0]
    size = (
        f"tree of {first['shape']} children, depth {first['depth']}; {first['num_prompts']} prompts"
        f", {first['max_tokens']} tokens each, repetitions: {first['repetitions']}, seeds "
        f"{first['seeds']}; {first['resamples']} resamples of the prompts; {first['dtype']}"
    )
    return "".join(lines) + "\n" + _setting(first, size)


def _setting(row: Row, what: str) -> str:
    """Model, hardware, versions, commit and command: what a number has to name."""
    source = row["provenance"]
    machine = source["gpu"] or f"{source['cpu']}, cores: {source['cores']}"
    changed = " with uncommitted changes" if source["git_uncommitted_changes"] else ""
    return (
        f"`{row['model']}`, {what}. {machine}, torch threads: {source['torch_threads']}, torch "
        f"{source['torch']}, Python {source['python']}, commit {str(source['git_commit'])[:10]}"
        f"{changed}. Command: `{source['command']}`.\n"
    )


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


SECTIONS: dict[str, Callable[[Sequence[Row]], str]] = {
    "acceptance": acceptance_section,
    CHAT: chat_section,
    "calibration": calibration_section,
    "coupling": coupling_section,
}


def updated(page: str, rows: Sequence[Row]) -> str:
    """Return the page with the sections filled in that there are rows for; see `fill`. What was
    measured with another model than the bundled one has a section of its own."""
    return fill(page, [_of_section(row) for row in rows], SECTIONS, Path(__file__).name)


def _of_section(row: Row) -> Row:
    is_chat = row.get("benchmark") == "acceptance" and row["model"] != BUNDLED
    return {**row, "benchmark": CHAT} if is_chat else row


def draw(rows: Sequence[Row], folder: Path) -> None:
    sys.path.insert(0, str(ROOT))
    from benchmarks.acceptance import plots as acceptance_plots

    accepted = [row for row in map(_of_section, rows) if row.get("benchmark") == "acceptance"]
    calibrated = [row for row in rows if row.get("benchmark") == "calibration"]
    if accepted:
        acceptance_plots.save(acceptance_plots.acceptance(accepted), folder / "acceptance.svg")
        acceptance_plots.save(acceptance_plots.positions(accepted), folder / "positions.svg")
    if calibrated:
        acceptance_plots.save(acceptance_plots.reliability(calibrated), folder / "calibration.svg")


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python docs/update_acceptance.py RESULTS.jsonl ...")
    lines = [line for name in sys.argv[1:] for line in Path(name).read_text().splitlines()]
    rows = [json.loads(line) for line in lines if line]
    PAGE.write_text(updated(PAGE.read_text(), rows))
    draw(rows, PLOTS)


if __name__ == "__main__":
    main()
