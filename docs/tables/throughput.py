"""docs/peers.md: folospec next to transformers, on the demo model."""

from __future__ import annotations

from collections.abc import Sequence

from docs.tables.markdown import LEFT, Column, Row, number, setting, table
from docs.tables.rounds import rate, ratio
from docs.tables.sections import Section

SETTING = (
    "Generated tokens of {rounds} rounds over their seconds. A ratio is the quotient of two of "
    "these numbers; in parentheses are the smallest and the largest of a single round. `{model}`, "
    "{dtype}, greedy, {max_tokens} tokens for each prompt, up to {drafts} draft tokens per step. "
    "{machine}, torch threads: {torch_threads}, torch {torch}, transformers {transformers}, commit "
    "{revision}. `generate_batch` is timed without the start of its thread. Acceptance length is "
    "1 + accepted / drafts."
)


def text(rows: Sequence[Row]) -> str:
    """The table, and what it was measured on."""
    columns = (
        Column("batch", "{batch}"),
        Column("", "{contestant}", LEFT),
        Column("tokens/s", lambda row: f"{rate(row):.0f}"),
        *(
            Column(f"x {name}", lambda row, name=name: _ratio(row, rows, name))
            for name in ("transformers generate", "folospec plain")
        ),
        Column("acceptance length", number("acceptance_length")),
        Column("tokens as plain", _tokens, LEFT),
    )
    configs = [row["settings"].get("speculative") for row in rows]
    drafts = sorted({config["num_speculative_tokens"] for config in configs if config})
    measured = setting(rows[0], SETTING, drafts=", ".join(map(str, drafts)))
    return f"{table(columns, rows, compact=True)}\n{measured}\n"


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


SECTIONS = (Section("throughput", "docs/peers.md", text),)
