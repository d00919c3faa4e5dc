"""docs/models.md: which causal model classes of transformers run."""

from __future__ import annotations

import re
from collections.abc import Sequence

from docs.tables.markdown import LEFT, Row, markdown, setting
from docs.tables.sections import Section

FAULTS = ("wrong", "crash")
SETTING = "transformers {transformers}, torch {torch}, float32 on {cpu}, commit {revision}."


def text(rows: Sequence[Row]) -> str:
    """Which classes run and which are refused, by reason; and what was checked.

    Raises:
        ValueError: a class is wrong or crashes: that is to be mended, not to be documented.
    """
    if faults := [row["model_type"] for row in rows if row["result"] in FAULTS]:
        raise ValueError(f"no row may be {' or '.join(FAULTS)}, got {', '.join(faults)}")
    right = [row for row in rows if row["result"] == "right"]
    parts = [f"**Right** ({len(right)}). "]
    for backend, how in (("Decoder", "By folospec's decoder"), ("TransformersModel", "The others")):
        names = sorted(row["model_type"] for row in right if row["backend"] == backend)
        parts.append(f"{how}: {_code(names)}. ")
    parts[-1] = parts[-1].rstrip() + "\n\n"
    refused = _by_reason(rows, "refused")
    parts.append(f"**Refused** ({sum(map(len, refused.values()))}):\n\n")
    lines = [(reason, _code(names)) for reason, names in refused.items()]
    parts.append(markdown(("reason", "model types"), (LEFT, LEFT), lines, compact=True))
    if unmade := _by_reason(rows, "no checkpoint"):
        names = sorted(name for group in unmade.values() for name in group)
        parts.append(f"\n**Not checked** ({len(names)}), since transformers cannot make, save and ")
        parts.append(f"load a tiny one with a varied output: {_code(names)}.\n")
    return "".join([*parts, "\n", setting(rows[0], SETTING)])


def _by_reason(rows: Sequence[Row], result: str) -> dict[str, list[str]]:
    """Model types by reason, the most frequent first, without what is of one model alone."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        if row["result"] == result:
            groups.setdefault(_general(row["reason"]), []).append(row["model_type"])
    order = sorted(groups, key=lambda reason: (-len(groups[reason]), reason))
    return {reason: sorted(groups[reason]) for reason in order}


def _general(reason: str) -> str:
    reason = re.sub(r"its forward does not run on packed rows \(\w+: (.*)\)$", r"\1", reason)
    reason = re.sub(r" \((\w+Error|'\w+').*", "", reason)
    reason = re.sub(r", by \S+ of their spread", "", reason)
    reason = re.sub(r"\d+ of its \d+ layers", "some of its layers alone", reason)
    return re.sub(r"heads have \d+ keys and \d+ values", "keys and values differ in size", reason)


def _code(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


SECTIONS = (Section("architectures", "docs/models.md", text),)
