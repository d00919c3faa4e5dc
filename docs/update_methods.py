"""Write the results of benchmarks/acceptance/length.py into the pages of docs/methods.

    python -m benchmarks.acceptance.length --out rows.jsonl
    python docs/update_methods.py rows.jsonl

A page has a part for every table, and one for what it was measured on:

    <!-- measured: ngram; ngram tree -->        contestants of benchmarks/lib/drafters.py
    <!-- measured: setting -->                  each part ends with <!-- end of measured -->
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

PAGES = Path(__file__).with_name("methods")
NOT_MEASURED = "Not measured yet.\n"
_PART = re.compile(
    r"(?P<begin>^<!-- measured: (?P<names>[^>]+) -->\n).*?(?P<end>^<!-- end of measured -->\n)",
    re.MULTILINE | re.DOTALL,
)

Row = dict[str, Any]


def updated(page: str, rows: list[Row]) -> str:
    """Return a page with its parts filled in.

    Raises:
        ValueError: there are no rows of the acceptance benchmark, or they come from several runs.
    """
    rows = [row for row in rows if row.get("benchmark") == "acceptance"]
    runs = {(row["provenance"]["command"], row["provenance"]["git_commit"]) for row in rows}
    if len(runs) != 1:
        raise ValueError(f"the rows must come from one run of acceptance.py, got {sorted(runs)}")

    def filled(part: re.Match[str]) -> str:
        names = part["names"].split("; ")
        body = setting(rows) if names == ["setting"] else table(rows, names)
        return part["begin"] + body + part["end"]

    return _PART.sub(filled, page)


def table(rows: list[Row], names: list[str]) -> str:
    """A line for each of these contestants and each temperature."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = []
    for name in names:
        own = [row for row in rows if row["contestant"] == name]
        for temperature in sorted({row["temperature"] for row in own}):
            lines.append(_line([r for r in own if r["temperature"] == temperature], tasks))
    if not lines:
        return NOT_MEASURED
    head = ["", "budget", "T", *(task.replace("_", ", ") for task in tasks), "draft", "verify"]
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *lines))


def _line(rows: list[Row], tasks: list[str]) -> list[str]:
    """The cells of one contestant at one temperature."""
    by_task = {row["task"]: row for row in rows}
    budget = next((str(row["budget"]) for row in rows if "budget" in row), "")
    return [
        rows[0]["contestant"],
        budget,
        f"{rows[0]['temperature']:g}",
        *(_acceptance(by_task.get(task)) for task in tasks),
        *(_cost(rows, name) for name in ("draft_cost", "verification_cost")),
    ]


def _acceptance(row: Row | None) -> str:
    if row is None:
        return ""
    if "error" in row:
        return f"failed: {row['error']}"
    length, passes = row["acceptance_length"], row["target_passes_per_token"]
    differs = "" if row["tokens_equal_to_plain"] else ", other tokens"
    if length is None:
        return f"no draft{differs}"
    return f"{length:.2f} ({passes:.2f}){differs}"


def _cost(rows: list[Row], name: str) -> str:
    costs = [row[name] for row in rows if row.get(name) is not None]
    return f"{statistics.median(costs):.2f}" if costs else ""


def setting(rows: list[Row]) -> str:
    """What the numbers mean, and hardware, model, dtype, batch, commit and command."""
    row, source = rows[0], rows[0]["provenance"]
    machine = source["gpu"] or f"{source['cpu']}, cores: {source['cores']}"
    changed = " with uncommitted changes" if source["git_uncommitted_changes"] else ""
    different = sum(not row.get("tokens_equal_to_plain", True) for row in rows)
    equal = "the same in all of them" if not different else f"other ones in {different} of them"
    return (
        "By task: acceptance length, 1 + accepted / drafts, and in brackets the target's passes "
        "per token. `budget`: most draft tokens per step. `draft` and `verify`: time to draft, and "
        "time of the target's pass over root and draft, in plain passes; medians of the tasks. "
        "More is said in [acceptance.md](../acceptance.md).\n\n"
        f"`{row['model']}`, {row['num_items']} items of each task; acceptance in {row['dtype']} "
        f"with {row['settings']['batch']} requests at a time, times in {row['timed_dtype']} with "
        f"one. The tokens were compared with plain decoding's in {len(rows)} runs: {equal}. "
        f"{machine}, torch threads: {source['torch_threads']}, torch {source['torch']}, commit "
        f"{str(source['git_commit'])[:10]}{changed}. Command: `{source['command']}`.\n"
    )


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/update_methods.py RESULTS.jsonl")
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines() if line]
    for page in sorted(PAGES.glob("*.md")):
        page.write_text(updated(page.read_text(), rows))


if __name__ == "__main__":
    main()
