"""Write the results of benchmarks/throughput.py into the table of the README.

python benchmarks/throughput.py --out rows.jsonl
python docs/update_readme.py rows.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- throughput: written by docs/update_readme.py -->\n"
END = "<!-- end of throughput -->\n"
HEADER = (
    "| batch | | tokens/s | x transformers generate | x folospec plain | acceptance length "
    "| tokens as plain |\n|---:|---|---:|---:|---:|---:|---|\n"
)

Row = dict[str, Any]


def section(rows: list[Row]) -> str:
    """Return the table, and what it was measured on.

    Raises:
        ValueError: there are no rows of the throughput benchmark, or they come from several runs.
    """
    rows = [row for row in rows if row.get("benchmark") == "throughput"]
    runs = {(row["provenance"]["command"], row["provenance"]["git_commit"]) for row in rows}
    if len(runs) != 1:
        raise ValueError(f"the rows must come from one run of throughput.py, got {sorted(runs)}")
    return HEADER + "".join(map(_line, rows)) + "\n" + _setting(rows) + "\n"


def _line(row: Row) -> str:
    if "error" in row:
        return f"| {row['batch']} | {row['contestant']} | failed: {row['error']} | | | | |\n"
    ratios = (row.get("ratio_to_transformers_generate"), row.get("ratio_to_folospec_plain"))
    cells = [
        str(row["batch"]),
        row["contestant"],
        f"{row['tokens_per_second']:.0f}",
        *(f"{ratio:.2f}" if ratio else "" for ratio in ratios),
        f"{row['acceptance_length']:.2f}" if row.get("acceptance_length") else "",
        _tokens(row),
    ]
    return f"| {' | '.join(cells)} |\n"


def _tokens(row: Row) -> str:
    if "tokens_equal_to_plain" not in row:
        return ""
    if row["tokens_equal_to_plain"]:
        return "equal"
    return f"{row['num_differing_prompts']} of {row['num_prompts']} prompts differ"


def _setting(rows: list[Row]) -> str:
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
        f"Generated tokens per second, medians of {row['rounds']} rounds of one run; ratios are of "
        f"the same run. `{row['model']}`, {row['dtype']}, greedy, {row['max_tokens']} tokens for "
        f"each prompt, up to {', '.join(map(str, sorted(drafts)))} draft tokens per step. "
        f"{machine}, torch threads: {source['torch_threads']}, torch {source['torch']}, "
        f"transformers {source['transformers']}, commit {commit}{changed}. "
        "`generate_batch` is timed without the start of its thread. "
        f"Acceptance length is 1 + accepted / drafts. Command: `{source['command']}`.\n"
    )


def updated(readme: str, rows: list[Row]) -> str:
    """Return the README with its section filled in."""
    before, found, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (found and end):
        raise ValueError(f"the README must have the lines {BEGIN!r} and {END!r}")
    return before + BEGIN + section(rows) + END + after


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/update_readme.py RESULTS.jsonl")
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines() if line]
    README.write_text(updated(README.read_text(), rows))


if __name__ == "__main__":
    main()
