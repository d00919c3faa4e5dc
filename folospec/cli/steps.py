"""`folospec generate --show-steps` and `folospec steps FILE`: every step's draft and verdict.

    step 7  draft_model: 2 of 4 accepted  3 tokens  5.1 ms
      'self' +'.' 93% +'items' 71% ='.' | -'[' 40% ~'0' 55%

What the sequence got comes first, then what is left of the draft. A draft that branches is drawn as
a tree, a run without branches on one line.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from folospec.cli.render import console
from folospec.trace.records import (
    NodeTrace,
    SequenceTrace,
    StepTrace,
    TokenTrace,
    TraceHeader,
    read_trace,
)

_ROOT = -1
_MARKS = {"accepted": "+", "rejected": "-", "not_reached": "~"}
_STYLES = {"accepted": "green", "rejected": "red", "not_reached": "dim"}
_OWN_MARK, _OWN_STYLE = "=", "bold blue"


def show_trace(path: str) -> None:
    """Show the steps of a trace file.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not a trace, or a line of it is broken; what is before it is shown.
    """
    header, steps = read_trace(path)
    view = StepsView(console(), labelled=_has_several_sequences(path))
    view.show_header(header)
    for step in steps:
        view.show(step)


def _has_several_sequences(path: str) -> bool:
    found: set[str] = set()
    try:
        for step in read_trace(path)[1]:
            found.update(seq.seq_id for seq in step.sequences)
            if len(found) > 1:
                return True
    except ValueError:
        pass  # It is said when the view comes to that line.
    return False


class StepsView:
    """Prints steps one after the other.

    Args:
        labelled: begin every line with the sequence it is about, for more than one of them.
    """

    def __init__(self, out: Console, *, labelled: bool) -> None:
        self._out, self._labelled = out, labelled

    def show_header(self, header: TraceHeader) -> None:
        """Print what ran, and what the marks mean."""
        drafters = [f"{d.name} (up to {d.num_speculative_tokens})" for d in header.drafters]
        joined = (" + " if header.merge else ", ").join(drafters)
        drafting = f"{joined}, acceptance {header.acceptance}" if drafters else "no drafter"
        self._print(Text(f"{header.model}: {drafting}"))
        legend = Text()
        for verdict, mark in _MARKS.items():
            legend.append(f"{mark} {verdict.replace('_', ' ')}", _STYLES[verdict]).append("  ")
        legend.append(f"{_OWN_MARK} the target's own", _OWN_STYLE)
        self._print(legend.append("  %: the drafter's confidence", "dim"))

    def show(self, step: StepTrace) -> None:
        """Print one step."""
        if step.preempted:
            names = ", ".join(step.preempted)
            blocks = f"{step.blocks.held} of {step.blocks.total} blocks are held"
            self._print(Text(f"step {step.step}  preempted: {names}; {blocks}", "yellow"))
        for seq in step.sequences:
            label = (f"{seq.seq_id}  " if self._labelled else "", "dim")
            self._print(Text.assemble(label, _title(step, seq)))
            for line in _draft_lines(seq):
                self._print(Text.assemble(label, "  ", line))

    def _print(self, line: Text) -> None:
        self._out.print(line, soft_wrap=True)


def _title(step: StepTrace, seq: SequenceTrace) -> Text:
    parts = [_what(seq)]
    if seq.new_tokens:
        parts.append(f"{len(seq.new_tokens)} token{'s' if len(seq.new_tokens) > 1 else ''}")
    parts.append(f"{1000 * step.times.total:.1f} ms")
    if seq.finish_reason is not None:
        reason = "" if seq.stop_reason is None else f" {seq.stop_reason!r}"
        parts.append(f"ends: {seq.finish_reason}{reason}")
    line = Text.assemble((f"step {step.step}", "bold"), "  ", "  ".join(parts))
    hidden = _num_hidden(seq)
    return line.append(f"  {hidden} scratch rows", "dim") if hidden else line


def _what(seq: SequenceTrace) -> str:
    if seq.forked_from is not None:
        return f"forked from {seq.forked_from}"
    if seq.proposal is not None:
        accepted, drafted = len(seq.path), seq.proposal.num_draft_tokens
        return f"{seq.proposal.drafter}: {accepted} of {drafted} accepted"
    if seq.num_tokens == 1 and seq.root is not None:
        return "no draft" if seq.undrafted_reason is None else f"no draft: {seq.undrafted_reason}"
    return f"computes tokens {seq.start} to {seq.start + seq.num_tokens - 1}"


def _draft_lines(seq: SequenceTrace) -> Iterator[Text]:
    """The root, the draft below it, and the target's own token where the path ends."""
    if seq.root is None:
        return
    nodes = seq.proposal.nodes if seq.proposal is not None else []
    below = _children(nodes)
    end = max((i for i in below if i != _ROOT and nodes[i].verdict == "accepted"), default=_ROOT)
    labels = {i: _node(node) for i, node in enumerate(nodes)}
    labels[_ROOT] = Text(_shown(seq.root), "dim")
    own = len(nodes)
    if seq.next_token is not None:
        labels[own] = Text(_OWN_MARK + _shown(seq.next_token), _OWN_STYLE)
        below[own] = []
    if all(len(children) <= 1 for children in below.values()):
        yield _chain_line(below, labels, end, own)
        return
    if seq.next_token is not None:
        below[end].append(own)
    yield from _tree_lines(below, labels, _ROOT, Text(), "")


def _chain_line(below: dict[int, list[int]], labels: dict[int, Text], end: int, own: int) -> Text:
    run = _run(below, _ROOT)
    cut = run.index(end) + 1
    line = [labels[node] for node in run[:cut]] + ([labels[own]] if own in labels else [])
    if run[cut:]:
        line += [Text("|", "dim"), *(labels[node] for node in run[cut:])]
    return Text(" ").join(line)


def _tree_lines(
    below: dict[int, list[int]], labels: dict[int, Text], node: int, head: Text, indent: str
) -> Iterator[Text]:
    run = _run(below, node)
    yield Text.assemble(head, Text(" ").join(labels[i] for i in run))
    children = below[run[-1]]
    for child in children:
        last = child == children[-1]
        branch = Text(indent + ("`-- " if last else "|-- "), "dim")
        yield from _tree_lines(below, labels, child, branch, indent + ("    " if last else "|   "))


def _run(below: dict[int, list[int]], node: int) -> list[int]:
    """The node and those after it, as far as there is no branch."""
    run = [node]
    while len(below[run[-1]]) == 1:
        run += below[run[-1]]
    return run


def _children(nodes: list[NodeTrace]) -> dict[int, list[int]]:
    """The verified nodes under the root (-1) and under each other; scratch rows, and what hangs
    below them, are left out."""
    below: dict[int, list[int]] = {_ROOT: []}
    for i, node in enumerate(nodes):
        if node.verdict != "scratch" and node.parent in below:
            below[node.parent].append(i)
            below[i] = []
    return below


def _num_hidden(seq: SequenceTrace) -> int:
    nodes = seq.proposal.nodes if seq.proposal is not None else []
    return len(nodes) + 1 - len(_children(nodes))


def _node(node: NodeTrace) -> Text:
    # A scratch row is never drawn, but it has a label like the others.
    label = Text(_MARKS.get(node.verdict, "") + _shown(node), _STYLES.get(node.verdict, "dim"))
    return label if node.confidence is None else label.append(f" {node.confidence:.0%}", "dim")


def _shown(token: TokenTrace) -> str:
    """The token's text with its spaces and line ends to be seen, or its id."""
    return repr(token.text) if token.text is not None else str(token.token_id)
