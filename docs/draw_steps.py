"""Draw the README's picture: what a command shows of its steps, as SVG.

python docs/draw_steps.py
"""

from __future__ import annotations

import io
import re
import shlex
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

from rich.console import Console

from folospec.cli.main import app
from folospec.cli.steps import StepsView
from folospec.trace.records import read_trace

PICTURE = Path(__file__).parent / "pictures" / "steps.svg"
DRAFTING = '{"method": "draft_model", "tree": [2, 2, 1]}'
COMMAND = ("generate", "class Stack:", "--max-tokens", "11", "--speculative", DRAFTING)


def drawn() -> str:
    """Run the command, and draw the steps of its trace as `--show-steps` does."""
    plain = dict.fromkeys(("markup", "highlight", "emoji"), False)
    out = Console(record=True, file=io.StringIO(), force_terminal=True, **plain)
    out.print(f"$ folospec {shlex.join(COMMAND[:-2])} \\", style="bold")
    out.print(f"    {shlex.join(COMMAND[-2:])} --show-steps", style="bold")
    with tempfile.TemporaryDirectory() as folder:
        trace = str(Path(folder) / "trace.jsonl")
        with redirect_stdout(io.StringIO()):
            app([*COMMAND, "--trace", trace], standalone_mode=False)
        header, steps = read_trace(trace)
        view = StepsView(out, labelled=False)
        view.show_header(header)
        for step in steps:
            view.show(step)
    out.width = max(map(len, out.export_text(clear=False).splitlines()))
    return without_links(out.export_svg(title="folospec", unique_id="steps"))


def without_links(svg: str) -> str:
    """The picture in the viewer's own monospaced font: rich refers to one on the web."""
    svg = re.sub(r"\s*(@font-face \{.*?\}|<!-- Generated .*? -->)", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code, ", "")


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(drawn())
