"""How results look: on a terminal, and through a pipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from folospec.cli.runner import Counts, Run

if TYPE_CHECKING:
    from folospec.cli.batch import Totals
    from folospec.outputs import RequestOutput

ACCEPTANCE_LENGTH = (
    "acceptance length: 1 + accepted / drafts, the mean tokens per verified draft\n"
    "with the one that the target adds; a draft is a proposal of one token or more"
)
_TITLE_WIDTH = 60


def console(*, stderr: bool = False) -> Console:
    """A console that prints words as they are: no markup, no colours by guess, no emoji."""
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def progress_bar(*, wanted: bool = True) -> Progress:
    """A bar on stderr that is gone when the work is done; nothing where stderr is no terminal."""
    err = console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=err,
        transient=True,
        disable=not (wanted and err.is_terminal),
        redirect_stdout=False,  # to stderr, that would be
        redirect_stderr=False,
    )


@dataclass(frozen=True, slots=True)
class Measurement:
    """One row of a table: a method, what it wrote, and what that cost."""

    method: str
    num_tokens: int
    seconds: float
    counts: Counts
    equal: bool | None = None
    """Whether its tokens are those of plain decoding; None for plain decoding itself."""

    @property
    def rate(self) -> float:
        """Output tokens per second."""
        return self.num_tokens / self.seconds if self.seconds else 0.0

    def as_dict(self, baseline: Measurement) -> dict[str, Any]:
        return {
            "method": self.method,
            "num_tokens": self.num_tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.rate,
            "speed_up": self.rate / baseline.rate if baseline.rate else None,
            **asdict(self.counts),
            "acceptance_length": self.counts.acceptance_length,
            "tokens_equal": self.equal,
        }


def rate_table(rows: Sequence[Measurement], width: int = 80) -> Table:
    """The methods side by side, the first as the baseline; fits 60 columns."""
    padding = (0, 1) if width >= 80 else (0, 0)
    table = Table(box=box.SIMPLE_HEAD, padding=padding, pad_edge=False)
    table.add_column("method", overflow="fold")
    for name in (
        "tokens/s",
        "speed\n-up",
        "target\npasses",
        "tokens\nper\npass",
        "acceptance\nlength",
        "tokens\nequal",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        length, passes = row.counts.acceptance_length, row.counts.num_target_passes
        style = "red" if row.equal is False else ""
        table.add_row(
            row.method,
            f"{row.rate:.1f}",
            f"{row.rate / rows[0].rate:.2f}x" if rows[0].rate else "-",
            str(passes),
            f"{row.num_tokens / passes:.2f}" if passes else "-",
            f"{length:.2f}" if length is not None else "-",
            "-" if row.equal is None else "yes" if row.equal else "no",
            style=style,
        )
    return table


def print_completion(out: Console, title: str, text: str) -> None:
    """A titled completion, for output that holds several."""
    out.rule(Text(title, style="dim"), align="left", style="dim")
    write(out, text if text.endswith("\n") else text + "\n")


def write(out: Console, text: str) -> None:
    """Text as the model wrote it: no wrapping and no styles."""
    out.file.write(text)
    out.file.flush()


def print_run(out: Console, run: Run) -> None:
    """Print every completion of a run under a title."""
    for number, output in enumerate(run.outputs, start=1):
        print_output(out, output, [str(number)] if len(run.outputs) > 1 else [])


def print_output(out: Console, output: RequestOutput, place: Sequence[str]) -> None:
    """Print every completion of a prompt under a title that begins with its place."""
    for completion in output.outputs:
        words = list(place)
        if len(output.outputs) > 1:
            words.append(f"completion {completion.index + 1}")
        if completion.error is not None:
            words.append(f"error: {completion.error}")
        elif completion.finish_reason == "abort":
            words.append("cut short")
        print_completion(out, completion_title(output.prompt or "", words), completion.text)


def completion_title(prompt: str, place: Sequence[str]) -> str:
    """For example "2, completion 1: def add(a, b):"."""
    line = next((line for line in prompt.splitlines() if line.strip()), "")
    shown = line if len(line) <= _TITLE_WIDTH else line[: _TITLE_WIDTH - 3] + "..."
    return ": ".join(filter(None, [", ".join(place), shown]))


def summary_lines(totals: Totals, num_skipped: int = 0) -> list[str]:
    """What a run did and cost, in lines that fit 80 columns.

    Args:
        num_skipped: prompts whose results were there before.
    """
    counts, seconds = totals.counts, totals.seconds
    cut = "interrupted: " if totals.interrupted else ""
    lines = [
        f"{cut}{totals.num_tokens} tokens in {seconds:.2f} s, "
        f"{totals.num_tokens / seconds if seconds else 0.0:.1f} tokens/s, "
        f"{counts.num_target_passes} target passes"
    ]
    if counts.acceptance_length is not None:
        lines.append(
            f"acceptance length {counts.acceptance_length:.2f} = 1 + {counts.num_accepted_tokens} "
            f"accepted / {counts.num_drafts} drafts"
        )
    if totals.num_prompts + totals.num_cut != 1 or num_skipped or totals.num_failed:
        parts = [f"{totals.num_prompts - totals.num_failed} prompts done"]
        parts.append(f"{totals.num_failed} failed")
        parts += [f"{totals.num_cut} cut short"] * bool(totals.num_cut)
        parts += [f"{num_skipped} done before"] * bool(num_skipped)
        lines.append(", ".join(parts))
    return lines
