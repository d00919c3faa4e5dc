"""Runs the Python of a page, as it is written and in the order in which it is written."""

from __future__ import annotations

import re
from collections.abc import Sequence


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```\n", page, re.MULTILINE | re.DOTALL)


def printed_by(blocks: Sequence[str], name: str) -> list[str]:
    """What each block prints, a line for a call; all of them share a namespace."""
    outputs: list[str] = []
    lines: list[str] = []
    namespace = {
        "__name__": "page",
        "print": lambda *values, **options: lines.append(repr(values)),
    }
    for block in blocks:
        exec(compile(block, name, "exec"), namespace)
        outputs.append("\n".join(lines))
        lines.clear()
    return outputs
