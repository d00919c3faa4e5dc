"""Write the table of the README from the newest runs of its cells.

python docs/update_readme.py benchmarks/results/peers.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))
from page_sections import fill, read_rows, run_of  # noqa: E402 - the page's folder is known only now
from rounds import rate, ratio  # noqa: E402

README = DOCS.parent / "README.md"
MODELS = {"smollm2": "SmolLM2-135M-Instruct", "160m": "the demo model grown to 160M"}
CELLS = (("smollm2", "code"), ("smollm2", "chat"), ("160m", "completion"))
"""Checkpoint and task of a line: in bfloat16, at temperature 0 and batch 1."""
NOT_COMPARED = ("llama_cpp_q4_1",)
"""Peers that run other weights: `benchmarks/peers.py` has them for information."""
HEADER = (
    '| model, task | plain | `"auto"` | fastest peer | auto / plain | auto / fastest peer |\n'
    "|---|---:|---:|---:|---:|---:|\n"
)

Row = dict[str, Any]


def section(rows: Sequence[Row]) -> str:
    """A line for every cell, and what each was measured on."""
    cells = [[row for row in rows if _cell(row) == cell] for cell in CELLS]
    lines = "".join(map(_line, cells))
    return f"{HEADER}{lines}\n{_explained(cells)}\n"


def newest(rows: Sequence[Row]) -> list[Row]:
    """The rows of the newest run of every cell.

    Raises:
        ValueError: a cell was never measured.
    """
    found: list[Row] = []
    for cell in CELLS:
        own = [row for row in rows if row.get("benchmark") == "peers" and _is_of(row, cell)]
        if not own:
            raise ValueError(f"there must be rows of {cell}, in bfloat16, greedy, at batch 1")
        run = run_of(max(own, key=lambda row: row["provenance"]["time"]))
        found += [row for row in own if run_of(row) == run]
    return found


def _is_of(row: Row, cell: tuple[str, str]) -> bool:
    setting = row["dtype"], row["temperature"], row["batch"]
    return _cell(row) == cell and setting == ("bfloat16", 0, 1)


def _cell(row: Row) -> tuple[str, str]:
    return row["checkpoint"], row["task"]


def _line(rows: Sequence[Row]) -> str:
    ran = {row["contestant"]: row for row in rows if "error" not in row}
    plain, auto = ran["folospec plain"], ran["folospec auto"]
    peers = [row for row in ran.values() if row["peer"] not in ("folospec", *NOT_COMPARED)]
    fastest = max(peers, key=rate)
    if len({row["group"] for row in (plain, auto, fastest)}) != 1:
        raise ValueError(f"{_cell(plain)}: what is compared must have run in turns, in one group")
    numbers = [
        f"{rate(plain):.1f}",
        f"{rate(auto):.1f}",
        f"{rate(fastest):.1f} ({fastest['contestant']})",
        str(ratio(auto, plain)),
        str(ratio(auto, fastest)),
    ]
    what = f"{MODELS[plain['checkpoint']]}, {plain['task']}"
    return f"| {' | '.join([what, *numbers])} |\n"


def _explained(cells: Sequence[Sequence[Row]]) -> str:
    """What the numbers are, and the machine, versions and commit of each run."""
    settings: dict[str, str] = {}
    for row in (rows[0] for rows in cells):
        source = row["provenance"]
        changed = " with uncommitted changes" if source["git_uncommitted_changes"] else ""
        text = (
            f"{source['cpu']}, threads: {row['threads']}, torch {source['torch']}, commit "
            f"{str(source['git_commit'])[:10]}{changed}, {row['rounds']} rounds of "
            f"{row['num_prompts']} prompts with {row['max_tokens']} new tokens each"
        )
        settings[text] = MODELS[row["checkpoint"]]
    return (
        "Tokens per second: new tokens of all rounds over their seconds, prompts included. A ratio "
        "is the quotient of two of them; in parentheses are the smallest and the largest of a "
        "single round. bfloat16, greedy, batch 1. "
        f"{'; '.join(f'{model}: {text}' for text, model in settings.items())}.\n"
    )


def updated(readme: str, rows: Sequence[Row]) -> str:
    """Return the README with its table filled in; see `fill`."""
    return fill(readme, newest(rows), {"peers": section}, Path(__file__).name, table_of=_cell)


def main() -> None:
    README.write_text(updated(README.read_text(), read_rows(sys.argv)))


if __name__ == "__main__":
    main()
