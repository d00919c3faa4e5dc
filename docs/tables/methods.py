"""docs/methods/*.md: the acceptance of each method, next to its description.

A page has a part for every table, and one for what it was measured on:

    <!-- measured: ngram; ngram tree -->        contestants of benchmarks/lib/drafters.py
    <!-- measured: setting -->                  each part ends with <!-- end of measured -->
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence

from docs.tables.acceptance import is_bundled
from docs.tables.markdown import LEFT, RIGHT, Row, markdown, setting
from docs.tables.sections import Section

NOT_MEASURED = "Not measured yet.\n"
_PART = re.compile(
    r"(?P<begin>^<!-- measured: (?P<names>[^>]+) -->\n).*?(?P<end>^<!-- end of measured -->\n)",
    re.MULTILINE | re.DOTALL,
)
SETTING = (
    "By task: acceptance length, 1 + accepted / drafts, and in brackets the target's passes per "
    "token. `budget`: most draft tokens per step. `draft` and `verify`: time to draft, and time of "
    "the target's pass over root and draft, in plain passes; medians of the tasks. More is said in "
    "[acceptance.md](../acceptance.md).\n\n"
    "`{model}`, {num_items} items of each task; acceptance in {dtype} with {settings[batch]} "
    "requests at a time, times in {timed_dtype} with one. The tokens were compared with plain "
    "decoding's in {runs} runs: {equal}. {machine}, torch threads: {torch_threads}, torch {torch}, "
    "commit {revision}."
)


class EngineComponents(Section):
    """A section in parts: each marker names what stands below it."""

    def filled(self, page: str, rows: Sequence[Row]) -> str:
        def part(found: re.Match[str]) -> str:
            return found["begin"] + self.text(rows, found["names"].split("; ")) + found["end"]

        return _PART.sub(part, page)


def text(rows: Sequence[Row], names: Sequence[str]) -> str:
    """A line for each of these contestants and each temperature, or what was measured on what."""
    if names == ["setting"]:
        different = sum(not row.get("tokens_equal_to_plain", True) for row in rows)
        equal = f"other ones in {different} of them" if different else "the same in all of them"
        return setting(rows[0], SETTING, runs=len(rows), equal=equal)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = []
    for name in names:
        own = [row for row in rows if row["contestant"] == name]
        for temperature in sorted({row["temperature"] for row in own}):
            lines.append(_line([r for r in own if r["temperature"] == temperature], tasks))
    if not lines:
        return NOT_MEASURED
    headers = ["", "budget", "T", *(task.replace("_", ", ") for task in tasks), "draft", "verify"]
    return markdown(headers, [LEFT, *[RIGHT] * (len(headers) - 1)], lines)


def _line(rows: Sequence[Row], tasks: Sequence[str]) -> list[str]:
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


def _cost(rows: Sequence[Row], name: str) -> str:
    costs = [row[name] for row in rows if row.get(name) is not None]
    return f"{statistics.median(costs):.2f}" if costs else ""


SECTIONS = (EngineComponents("acceptance", "docs/methods/*.md", text, takes=is_bundled),)
