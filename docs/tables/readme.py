"""README.md: `"auto"` next to plain decoding and the fastest peer, from the newest runs."""

from __future__ import annotations

from collections.abc import Sequence

from docs.tables.markdown import CHANGES, LEFT, RIGHT, Row, markdown
from docs.tables.rounds import rate, ratio
from docs.tables.sections import Section, run_of

MODELS = {"smollm2": "SmolLM2-135M-Instruct", "160m": "the demo model grown to 160M"}
CELLS = (("smollm2", "code"), ("smollm2", "chat"), ("160m", "completion"))
"""Checkpoint and task of a line: in bfloat16, at temperature 0 and batch 1."""
NOT_COMPARED = ("llama_cpp_q4_1",)
"""Peers that run other weights; the benchmark has them for information."""
HEADERS = (
    "model, task",
    "plain",
    '`"auto"`',
    "fastest peer",
    "auto / plain",
    "auto / fastest peer",
)


def text(rows: Sequence[Row]) -> str:
    """A line for every cell, and what each was measured on."""
    cells = [[row for row in newest(rows) if _cell(row) == cell] for cell in CELLS]
    table = markdown(HEADERS, (LEFT, *[RIGHT] * 5), map(_line, cells), compact=True)
    return f"{table}\n{_explained(cells)}\n"


def newest(rows: Sequence[Row]) -> list[Row]:
    """The rows of the newest run of every cell.

    Raises:
        ValueError: a cell was never measured.
    """
    found: list[Row] = []
    for cell in CELLS:
        own = [row for row in rows if _shows(row) and _cell(row) == cell]
        if not own:
            raise ValueError(f"there must be rows of {cell}, in bfloat16, greedy, at batch 1")
        run = run_of(max(own, key=lambda row: row["provenance"]["time"]))
        found += [row for row in own if run_of(row) == run]
    return found


def _shows(row: Row) -> bool:
    if row.get("benchmark") != "peers" or _cell(row) not in CELLS:
        return False
    return (row["dtype"], row["temperature"], row["batch"]) == ("bfloat16", 0, 1)


def _cell(row: Row) -> tuple[str, str]:
    return row["checkpoint"], row["task"]


def _line(rows: Sequence[Row]) -> list[str]:
    ran = {row["contestant"]: row for row in rows if "error" not in row}
    plain, auto = ran["folospec plain"], ran["folospec auto"]
    peers = [row for row in ran.values() if row["peer"] not in ("folospec", *NOT_COMPARED)]
    fastest = max(peers, key=rate)
    if len({row["group"] for row in (plain, auto, fastest)}) != 1:
        raise ValueError(f"{_cell(plain)}: what is compared must have run in turns, in one group")
    return [
        f"{MODELS[plain['checkpoint']]}, {plain['task']}",
        f"{rate(plain):.1f}",
        f"{rate(auto):.1f}",
        f"{rate(fastest):.1f} ({fastest['contestant']})",
        str(ratio(auto, plain)),
        str(ratio(auto, fastest)),
    ]


def _explained(cells: Sequence[Sequence[Row]]) -> str:
    """What the numbers are, and the machine, versions and commit of each run."""
    settings: dict[str, str] = {}
    for row in (rows[0] for rows in cells):
        source = row["provenance"]
        commit = f"{str(source['git_commit'])[:10]}{CHANGES[source['git_uncommitted_changes']]}"
        text = (
            f"{source['cpu']}, threads: {row['threads']}, torch {source['torch']}, commit "
            f"{commit}, {row['rounds']} rounds of "
            f"{row['num_prompts']} prompts with {row['max_tokens']} new tokens each"
        )
        settings[text] = MODELS[row["checkpoint"]]
    return (
        "Tokens per second: new tokens of all rounds over their seconds, prompts included. A ratio "
        "is the quotient of two of them; in parentheses are the smallest and the largest of a "
        "single round. bfloat16, greedy, batch 1. "
        f"{'; '.join(f'{model}: {text}' for text, model in settings.items())}.\n"
    )


SECTIONS = (
    Section(
        "peers",
        "README.md",
        text,
        takes=_shows,
        table_of=lambda row: (_cell(row), run_of(row)),
    ),
)
