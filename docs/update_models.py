"""Write the results of benchmarks/engine/architectures.py into docs/models.md.

python -m benchmarks.engine.architectures --out architectures.jsonl
python docs/update_models.py architectures.jsonl
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))
from page_sections import fill, read_rows  # noqa: E402 - the page's folder is known only now

PAGE = DOCS / "models.md"
FAULTS = ("wrong", "crash")

Row = dict[str, Any]


def section(rows: Sequence[Row]) -> str:
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
    parts.append("| reason | model types |\n|---|---|\n")
    parts += [f"| {reason} | {_code(names)} |\n" for reason, names in refused.items()]
    if unmade := _by_reason(rows, "no checkpoint"):
        names = sorted(name for group in unmade.values() for name in group)
        parts.append(f"\n**Not checked** ({len(names)}), since transformers cannot make, save and ")
        parts.append(f"load a tiny one with a varied output: {_code(names)}.\n")
    return "".join([*parts, "\n", _setting(rows[0])])


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


def _setting(row: Row) -> str:
    source = row["provenance"]
    changed = " with uncommitted changes" if source["git_uncommitted_changes"] else ""
    return (
        f"transformers {source['transformers']}, torch {source['torch']}, float32 on "
        f"{source['cpu']}, commit {str(source['git_commit'])[:10]}{changed}. "
        f"Command: `{source['command']}`.\n"
    )


def updated(page: str, rows: Sequence[Row]) -> str:
    """Return the page with the section filled in; see `fill`."""
    return fill(page, rows, {"architectures": section}, Path(__file__).name)


def main() -> None:
    rows = read_rows(sys.argv)
    PAGE.write_text(updated(PAGE.read_text(), rows))


if __name__ == "__main__":
    main()
