"""How results look: on a terminal, and through a pipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from folospec.cli.runner import Counts, Run

if TYPE_CHECKING:
    from folospec.outputs import RequestOutput

ACCEPTANCE_LENGTH = (
    "acceptance length: 1 + accepted / drafts, the mean tokens per verified draft\n"
    "with the one that the target adds; a draft is a proposal of one token or more"
)
_TITLE_WIDTH = 60


def console(*, stderr: bool = False) -> Console:
    """A console that prints words as they are: no markup, no colours by guess, no emoji."""
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def progress_bar() -> Progress:
    """A bar on stderr that is gone when the work is done; nothing where stderr is no terminal."""
    err = console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=err,
        transient=True,
        disable=not err.is_terminal,
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


def rate_table(rows: Sequence[Measurement]) -> Table:
    """The methods side by side, the first as the baseline; fits 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("method", no_wrap=True)
    for name in (
        "tokens/s",
        "speed-up",
        "target\npasses",
        "tokens\nper pass",
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
        for completion in output.outputs:
            place = [f"{number}/{len(run.outputs)}"] if len(run.outputs) > 1 else []
            if len(output.outputs) > 1:
                place.append(f"completion {completion.index + 1}")
            if completion.finish_reason == "abort":
                place.append("cut short")
            print_completion(out, completion_title(output.prompt or "", place), completion.text)


def completion_title(prompt: str, place: Sequence[str]) -> str:
    """For example "2/3, completion 1: def add(a, b):"."""
    line = next((line for line in prompt.splitlines() if line.strip()), "")
    shown = line if len(line) <= _TITLE_WIDTH else line[: _TITLE_WIDTH - 3] + "..."
    return ": ".join([", ".join(place), shown] if place else [shown])


def summary_lines(run: Run) -> list[str]:
    """What a run cost, in lines that fit 80 columns."""
    counts, num_tokens = run.counts, run.num_tokens
    rate = num_tokens / run.seconds if run.seconds else 0.0
    cut = "interrupted: " if run.interrupted else ""
    lines = [
        f"{cut}{num_tokens} tokens in {run.seconds:.2f} s, {rate:.1f} tokens/s, "
        f"{counts.num_target_passes} target passes"
    ]
    if counts.acceptance_length is not None:
        lines.append(
            f"acceptance length {counts.acceptance_length:.2f} = 1 + {counts.num_accepted_tokens} "
            f"accepted / {counts.num_drafts} drafts"
        )
    return lines


def output_record(output: RequestOutput) -> dict[str, Any]:
    """A request as JSON has it; times are seconds since its arrival."""
    metrics = asdict(output.metrics)
    arrival = metrics.pop("arrival_time")
    for name in ("first_token_time", "finished_time"):
        time = metrics.pop(name)
        metrics[f"seconds_to_{name.removesuffix('_time')}"] = (
            None if time is None else time - arrival
        )
    metrics["acceptance_length"] = output.metrics.acceptance_length
    return {
        "prompt": output.prompt,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "outputs": [
            {
                "text": completion.text,
                "token_ids": completion.token_ids,
                "finish_reason": completion.finish_reason,
                "stop_reason": completion.stop_reason,
            }
            for completion in output.outputs
        ],
        "metrics": metrics,
    }
