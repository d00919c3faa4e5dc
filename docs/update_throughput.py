"""Write the results of benchmarks/throughput.py into docs/peers.md.

python benchmarks/throughput.py --out throughput.jsonl
python docs/update_throughput.py throughput.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))
from page_sections import fill, read_rows  # noqa: E402 - the page's folder is known only now
from rounds import rate, ratio  # noqa: E402

PAGE = DOCS / "peers.md"
HEADER = (
    "| batch | | tokens/s | x transformers generate | x folospec plain | acceptance length "
    "| tokens as plain |\n|---:|---|---:|---:|---:|---:|---|\n"
)

Row = dict[str, Any]


def section(rows: Sequence[Row]) -> str:
    """The table, and what it was measured on."""
    return HEADER + "".join(_line(row, rows) for row in rows) + "\n" + _setting(rows) + "\n"


def _line(row: Row, rows: Sequence[Row]) -> str:
    if "error" in row:
        return f"| {row['batch']} | {row['contestant']} | failed: {row['error']} | | | | |\n"
    cells = [
        str(row["batch"]),
        row["contestant"],
        f"{rate(row):.0f}",
        *(_ratio(row, rows, name) for name in ("transformers generate", "folospec plain")),
        f"{row['acceptance_length']:.2f}" if row.get("acceptance_length") else "",
        _tokens(row),
    ]
    return f"| {' | '.join(cells)} |\n"


def _ratio(row: Row, rows: Sequence[Row], name: str) -> str:
    """To another contestant at the same batch size; nothing where that failed."""
    if row["contestant"] == name:
        return "1.00"
    others = [r for r in rows if (r["batch"], r["contestant"]) == (row["batch"], name)]
    return str(ratio(row, others[0])) if others and "error" not in others[0] else ""


def _tokens(row: Row) -> str:
    if "tokens_equal_to_plain" not in row:
        return ""
    if row["tokens_equal_to_plain"]:
        return "equal"
    return f"{row['num_differing_prompts']} of {row['num_prompts']} prompts differ"


def _setting(rows: Sequence[Row]) -> str:
    """Hardware, model, dtype, draft settings, commit and command: what a number has to name."""
    row, source = rows[0], rows[0]["provenance"]
    drafts = {
        config["num_speculative_tokens"]
        for r in rows
        if (config := r["settings"].get("speculative"))
    }
    machine = source["gpu"] or f"{source['cpu']}, cores: {source['cores']}"
    commit = str(source["git_commit"])[:10]
    changed = " with uncommitted changes" if source["git_uncommitted_changes"] else ""
    return (
        f"Generated tokens of {row['rounds']} rounds over their seconds. A ratio is the quotient "
        "of two of these numbers; in parentheses are the smallest and the largest of a single "
        "round. "
        f"`{row['model']}`, {row['dtype']}, greedy, {row['max_tokens']} tokens for "
        f"each prompt, up to {', '.join(map(str, sorted(drafts)))} draft tokens per step. "
        f"{machine}, torch threads: {source['torch_threads']}, torch {source['torch']}, "
        f"transformers {source['transformers']}, commit {commit}{changed}. "
        "`generate_batch` is timed without the start of its thread. "
        f"Acceptance length is 1 + accepted / drafts. Command: `{source['command']}`.\n"
    )


def updated(page: str, rows: Sequence[Row]) -> str:
    """Return the page with its section filled in; see `fill`."""
    return fill(page, rows, {"throughput": section}, Path(__file__).name)


def main() -> None:
    PAGE.write_text(updated(PAGE.read_text(), read_rows(sys.argv)))


if __name__ == "__main__":
    main()
