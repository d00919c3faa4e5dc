"""What a user sees of a batch: results as text or JSON on stdout; progress, errors and a summary on
stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.text import Text

from folospec.cli.batch import Totals
from folospec.cli.batch_output import Journal
from folospec.cli.batch_result import Result, json_line
from folospec.cli.render import console, print_output, progress_bar, summary_lines, write
from folospec.cli.runner import EXIT_FAILED

if TYPE_CHECKING:
    from folospec.outputs import RequestOutput


class ResultWriter(Protocol):
    """Takes results as they finish."""

    def write(self, result: Result) -> None: ...

    def finish(self) -> None:
        """No more results come."""


class BatchView:
    """Hands results to a writer, and shows on stderr what fails and how far the batch is.

    Args:
        journal: the file that results go to, if they do.
    """

    def __init__(self, writer: ResultWriter, journal: Journal | None) -> None:
        self._writer, self._journal = writer, journal
        # A terminal that shows the results needs no bar.
        self._bar = progress_bar(wanted=journal is not None or not console().is_terminal)
        self._num_results = self._num_tokens = 0

    @contextmanager
    def shown(self, count: Callable[[], int | None]) -> Iterator[None]:
        """Show a bar while inside.

        Args:
            count: gives the number of records; called if there is a bar.
        """
        total = None if self._bar.disable else count()
        self._task = self._bar.add_task("prompts", total=total, note="")
        with self._bar:
            yield

    def take(self, result: Result) -> None:
        """Write a result."""
        if result.error is not None:
            line = f"folospec: {result.title}: {' '.join(result.error.split())}"
            self._bar.console.print(line, soft_wrap=True)
        self._writer.write(result)
        self._num_results += not result.is_cut
        if result.output is not None:
            self._num_tokens += sum(len(c.token_ids) for c in result.output.outputs)
        num_skipped = self._journal.num_skipped if self._journal is not None else 0
        self._bar.update(
            self._task,
            completed=num_skipped + self._num_results,
            note=f"{self._num_tokens} tokens",
        )


def print_summary(totals: Totals, journal: Journal | None) -> int:
    """Say on stderr what was done and how to go on, and return the exit code: 1 if there is a
    failed prompt, in this run or in the file."""
    lines = summary_lines(totals, journal.num_skipped if journal is not None else 0)
    num_failed = totals.num_failed
    if journal is not None and journal.can_resume:
        num_failed = journal.num_failed
        failed = f", {num_failed} of them failed (--retry-failed runs them again)"
        lines.append(f"{journal.num_done} results in {journal.path}{failed * bool(num_failed)}")
        lines += ["the same command goes on from here"] * totals.interrupted
    for line in lines:
        console(stderr=True).print(line, style="dim", soft_wrap=True)
    return EXIT_FAILED if num_failed else 0


class JsonLines:
    """Results as lines of JSON on stdout."""

    def write(self, result: Result) -> None:
        write(console(), json_line(result.as_dict()).decode())

    def finish(self) -> None:
        """Every line is written."""


class TextStream:
    """The text of a single completion, as it comes. On a terminal the prompt stands before it,
    dimmed; a pipe gets the completion alone."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._num_sent = 0
        self._has_begun = False

    def show(self, touched: list[RequestOutput]) -> None:
        """Write what is new in the only request."""
        for output in touched:
            if not self._has_begun and self._out.is_terminal:
                self._out.print(Text(output.prompt or "", style="dim"), end="", soft_wrap=True)
            self._has_begun = True
            text = output.outputs[0].text
            write(self._out, text[self._num_sent :])
            self._num_sent = max(self._num_sent, len(text))

    def write(self, result: Result) -> None:
        """Write the rest, and end the line."""
        if result.output is not None:
            self.show([result.output])
            write(self._out, "\n")

    def finish(self) -> None:
        """Everything is written."""


class TextList:
    """Completions under their titles, in the order of the prompts.

    Args:
        is_numbered: whether there may be several prompts.
        at_the_end: hold them all until `finish`.
    """

    def __init__(self, out: Console, *, is_numbered: bool, at_the_end: bool = False) -> None:
        self._out, self._is_numbered, self._at_the_end = out, is_numbered, at_the_end
        self._held: dict[int, Result] = {}
        """By index: results whose turn has not come."""
        self._next = 0

    def write(self, result: Result) -> None:
        """Print the result when those of all prompts before it are printed."""
        self._held[result.record.index] = result
        while not self._at_the_end and self._next in self._held:
            self._print(self._held.pop(self._next))
            self._next += 1

    def finish(self) -> None:
        """Print what is held: after an interrupt there are gaps."""
        for index in sorted(self._held):
            self._print(self._held[index])
        self._held.clear()

    def _print(self, result: Result) -> None:
        if result.output is None or result.error is not None:
            return  # the error is on stderr
        place = [str(result.record.index + 1)] if self._is_numbered else []
        if result.id is not None:
            place.append(str(result.id))
        print_output(self._out, result.output, place)
