"""docs/acceptance.md: how much of the drafts is accepted, at what cost, and confidence."""

from __future__ import annotations

from collections.abc import Sequence

from docs.tables.markdown import LEFT, Column, Row, number, setting, table
from docs.tables.sections import Section, by

PAGE, PLOTS = "docs/acceptance.md", "benchmarks.acceptance.plots"
BUNDLED = "folospec-demo"
SETTING = (
    "{machine}, torch threads: {torch_threads}, torch {torch}, Python {python}, commit {revision}."
)
ITEMS = "`{model}`, {num_items} items of each task; acceptance in {dtype}, costs in {timed_dtype}. "
PROMPTS = "`{model}`, {num_items} prompts, {max_tokens} tokens each; {dtype}. "
TREES = (
    "`{model}`, tree of {shape} children, depth {depth}; {num_prompts} prompts, {max_tokens} "
    "tokens each, repetitions: {repetitions}, seeds {seeds}; {resamples} resamples of the prompts; "
    "{dtype}. "
)


def is_bundled(row: Row) -> bool:
    """Whether a row is of the acceptance of the bundled model."""
    return row.get("benchmark") == "acceptance" and row["model"] == BUNDLED


def is_of_another(row: Row) -> bool:
    return row.get("benchmark") == "acceptance" and row["model"] != BUNDLED


def _tokens(row: Row) -> str:
    if row["tokens_equal_to_plain"]:
        return "equal"
    return f"{len(row['first_differences'])} of {row['num_items']} items differ"


HEAD = (
    Column("", "{contestant}", LEFT),
    Column("T", "{temperature:g}"),
    Column("budget", "{budget}"),
    Column("acceptance length", number("acceptance_length")),
    Column("passes per token", number("target_passes_per_token", 3)),
)
COPIER = (
    Column("ideal copier: length", number("ceiling_acceptance_length")),
    Column("passes per token", number("ceiling_target_passes_per_token", 3)),
    Column("share of it", number("share_of_ceiling")),
)
COSTS = (
    Column("draft cost", number("draft_cost", 3)),
    Column("verification cost", number("verification_cost")),
    Column("tokens as plain", _tokens, LEFT),
)


def acceptance_text(rows: Sequence[Row]) -> str:
    """A table for every task, the plots, and what was measured on what."""
    return (
        _tables(rows)
        + "![Tokens per target pass](plots/acceptance.svg)\n\n"
        + "![Acceptance by position at temperature 0](plots/positions.svg)\n\n"
        + setting(rows[0], ITEMS + SETTING)
    )


def chat_text(rows: Sequence[Row]) -> str:
    """The same for a chat model, without plots."""
    return _tables(rows) + setting(rows[0], ITEMS + SETTING)


def _tables(rows: Sequence[Row]) -> str:
    return "".join(
        f"**{task}**\n\n{_task_table(own)}{_task_note(own)}\n"
        for task, own in by(lambda row: row["task"], rows).items()
    )


def _task_table(rows: Sequence[Row]) -> str:
    copier = COPIER if any("share_of_ceiling" in row for row in rows) else ()
    return table((*HEAD, *copier, *COSTS), rows)


def _task_note(rows: Sequence[Row]) -> str:
    measured = [row for row in rows if "error" not in row]
    shares = {row["temperature"]: row["share_reproduced"] for row in measured}
    if not shares or None in shares.values():
        return ""
    said = ", ".join(f"{share:.0%} at temperature {t:g}" for t, share in sorted(shares.items()))
    return f"\nOf the edit's tokens the target reproduces {said}.\n"


CALIBRATION = (
    *HEAD[:2],
    Column("nodes", "{num_nodes}"),
    Column("accepted", number("mean_accepted", 3)),
    Column("mean confidence", number("mean_confidence", 3)),
    Column("calibration error", number("calibration_error", 3)),
    Column("Brier score", number("brier_score", 3)),
    Column("Brier score of the mean", number("brier_score_of_mean", 3)),
)


def calibration_text(rows: Sequence[Row]) -> str:
    return (
        table(CALIBRATION, rows, compact=True)
        + "\n![Confidence against acceptance](plots/calibration.svg)\n\n"
        + setting(rows[0], PROMPTS + SETTING)
    )


def _ratio(row: Row) -> str:
    if "coupled_ratio" not in row:
        return ""
    low, high = row["coupled_ratio_interval"]
    return f"{row['coupled_ratio']:.3f} ({low:.3f} to {high:.3f})"


COUPLING = (
    Column("children", "{contestant}", LEFT),
    Column("rule", "{settings[speculative][acceptance]}", LEFT),
    Column("T", "{temperature:g}"),
    Column("verified drafts", "{num_drafts}"),
    Column(
        "acceptance length (95 %)",
        "{acceptance_length:.3f} ({interval[0]:.3f} to {interval[1]:.3f})",
    ),
    Column("coupled / this", _ratio),
)


def coupling_text(rows: Sequence[Row]) -> str:
    return table(COUPLING, rows, compact=True) + "\n" + setting(rows[0], TREES + SETTING)


SECTIONS = (
    Section(
        "acceptance",
        PAGE,
        acceptance_text,
        takes=is_bundled,
        plots={"acceptance.svg": f"{PLOTS}:acceptance", "positions.svg": f"{PLOTS}:positions"},
    ),
    Section("acceptance of a chat model", PAGE, chat_text, takes=is_of_another),
    Section(
        "calibration", PAGE, calibration_text, plots={"calibration.svg": f"{PLOTS}:reliability"}
    ),
    Section("coupling", PAGE, coupling_text),
)
