"""Run the code of docs/walkthrough.md and write what it prints into the page.

Every ```python block runs, in order and in one namespace; the ```text block after it is replaced by
its output. Run it when the code or the bundled models have changed:

    python docs/update_walkthrough.py
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

PAGE = Path(__file__).with_name("walkthrough.md")
_BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\n^```text\n(?P<output>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)


def rendered(page: str) -> str:
    """Return the page with every output as the code prints it now; a block that prints nothing has
    none."""
    namespace: dict[str, object] = {"__name__": "walkthrough"}
    return _BLOCK.sub(_runner(page, namespace), page)


def _runner(page: str, namespace: dict[str, object]) -> Callable[[re.Match[str]], str]:
    def run(block: re.Match[str]) -> str:
        code = block["code"]
        # Blank lines in front, so that a traceback names the line of the page.
        first_line = page.count("\n", 0, block.start("code"))
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile("\n" * first_line + code, str(PAGE), "exec"), namespace)
        output = "".join(f"{line.rstrip()}\n" for line in printed.getvalue().splitlines())
        shown = f"\n```text\n{output}```\n" if output else ""
        return f"```python\n{code}```\n{shown}"

    return run


def main() -> None:
    before = PAGE.read_text()
    after = rendered(before)
    PAGE.write_text(after)
    sys.stderr.write("unchanged\n" if after == before else "updated\n")


if __name__ == "__main__":
    main()
