"""README.md: folospec next to transformers."""

from __future__ import annotations

from collections.abc import Sequence

from docs.tables.markdown import LEFT, Column, Row, number, setting, table
from docs.tables.sections import Section


def _tokens(row: Row) -> str:
    if "tokens_equal_to_plain" not in row:
        return ""
    if row["tokens_equal_to_plain"]:
        return "equal"
    return f"{row['num_differing_prompts']} of {row['num_prompts']} prompts differ"


COLUMNS = (
    Column("batch", "{batch}"),
    Column("", "{contestant}", LEFT),
    Column("tokens/s", "{tokens_per_second:.0f}"),
    Column("x transformers generate", number("ratio_to_transformers_generate")),
    Column("x folospec plain", number("ratio_to_folospec_plain")),
    Column("acceptance length", number("acceptance_length")),
    Column("tokens as plain", _tokens, LEFT),
)
SETTING = (
    "Generated tokens per second, medians of {rounds} rounds of one run; ratios are of the same "
    "run. `{model}`, {dtype}, greedy, {max_tokens} tokens for each prompt, up to {drafts} draft "
    "tokens per step. {machine}, torch threads: {torch_threads}, torch {torch}, transformers "
    "{transformers}, commit {revision}. `generate_batch` is timed without the start of its thread. "
    "Acceptance length is 1 + accepted / drafts."
)


def text(rows: Sequence[Row]) -> str:
    """The table, and what it was measured on."""
    configs = [row["settings"].get("speculative") for row in rows]
    drafts = sorted({config["num_speculative_tokens"] for config in configs if config})
    measured = setting(rows[0], SETTING, drafts=", ".join(map(str, drafts)))
    return f"{table(COLUMNS, rows, compact=True)}\n{measured}\n"


SECTIONS = (Section("throughput", "README.md", text),)
