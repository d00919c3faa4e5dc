"""folospec and the engines that one would otherwise run, on one checkpoint, in turns, in one run.

    python benchmarks/peers.py --setup-only                    # environments and conversions
    python benchmarks/peers.py --out peers.jsonl --plot peers.svg
    python benchmarks/peers.py --checkpoints demo --batches 1 --peers openvino --rounds 2

All contestants complete the same prompts with the same number of new tokens, on token ids alone,
without a prefix cache, with the same number of threads, in the same precision as far as they offer
it; `peer_contestants` has their settings, `peer_contest` how they take turns. Those whose processes
do not fit into the memory together run in groups, folospec's plain decoding in each of them, and
ratios across groups go by way of it. JSON lines go to --out or stdout, tables to stderr.

A contestant that fails has a row with its error. Rows of a cell are written when the last group has
been through it; an interrupt ends all processes and leaves the rows so far.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import peer_checkpoints
import peer_contestants
import peer_venvs
from limits import Machine, Work, measure
from output import begin, show, write_rows
from peer_contest import Cell, Entry, Group
from peer_contestants import Contestant, Setup
from peer_law import excess_surprise
from peer_rows import Row, make_rows
from rich.table import Table
from tasks import TASKS, make_task
from tqdm import tqdm

from folospec.models.loader import load_tokenizer

TOKENIZER = "folospec-demo"
MAX_MODEL_LEN = 1024
GIB = 1 << 30


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the comparison and return its rows."""
    args = parse_arguments(argv)
    contestants = peer_contestants.make_contestants(args.folospec, args.peers, args.draft_tokens)
    failed = set_up(args)
    if args.setup_only:
        return []
    facts = begin(argv, __file__)
    machine = measure(args.threads)
    common = {"benchmark": "peers", "provenance": facts, "machine": described(machine)}
    rounds = make_rounds(args)

    def measured() -> Iterator[Row]:
        for checkpoint in args.checkpoints:
            for dtype in args.dtypes:
                for row in contest(args, checkpoint, dtype, contestants, rounds, failed, machine):
                    yield {**common, **row}

    rows = write_rows(measured(), args.out)
    for checkpoint in args.checkpoints:
        show(rate_table([row for row in rows if row["checkpoint"] == checkpoint], checkpoint))
    if args.plot is not None:
        import peers_plots

        peers_plots.save(peers_plots.rates(rows), args.plot)
    return rows


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="folospec and its peers, in turns.")
    known = peer_checkpoints.NAMES
    parser.add_argument("--checkpoints", type=_choices(known), default=list(known))
    dtypes = ("float32", "bfloat16")
    parser.add_argument("--dtypes", type=_choices(dtypes), default=list(dtypes))
    parser.add_argument("--batches", type=_counts, default=[1, 8, 32])
    parser.add_argument("--temperatures", type=_temperatures, default=[0.0, 0.8])
    parser.add_argument("--tasks", type=_choices(TASKS), default=["completion", "editing"])
    peers = tuple(peer_contestants.PEER_KINDS)
    parser.add_argument("--peers", type=_choices(peers), default=list(peers))
    parser.add_argument(
        "--folospec",
        type=_settings,
        default=peer_contestants.FOLOSPEC,
        help='JSON or @FILE: [{"name": "plain"}, {"name": "auto", "speculative": "auto"}, ...]',
    )
    parser.add_argument(
        "--draft-tokens", type=_counts, default=[4], help="of the peers, such as 4,8"
    )
    parser.add_argument("--rounds", type=_count, default=5)
    parser.add_argument("--max-tokens", type=_count, default=64)
    parser.add_argument("--threads", type=_count, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--memory-gib", type=float, help="default: 0.85 of what is available")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds of a load or a run")
    parser.add_argument("--setup-only", action="store_true")
    parser.add_argument("--out", type=Path, help="write the JSON lines here instead of to stdout")
    parser.add_argument("--plot", type=Path, help="draw the rates here, such as peers.svg")
    return parser.parse_args(argv)


def set_up(args: argparse.Namespace) -> dict[str, str]:
    """Make environments and conversions; return the error of every peer that has none."""
    failed = {}
    for peer in args.peers:
        try:
            print(f"setting up {peer}", file=sys.stderr)
            peer_venvs.install(peer)
            for dtype in args.dtypes:
                for name in ("draft", *args.checkpoints):
                    peer_checkpoints.checkpoint_for(peer, name, dtype)
        except (RuntimeError, OSError) as error:
            failed[peer] = f"{type(error).__name__}: {error}"
            print(f"{peer}: {failed[peer]}", file=sys.stderr)
    return failed


def make_rounds(args: argparse.Namespace) -> dict[tuple[str, int], list[list[list[int]]]]:
    """The prompts of every round of a task and batch size, those of the warm-up first.

    Raises:
        ValueError: the held-out modules do not give as many, or one is too long.
    """
    tokenizer = load_tokenizer(TOKENIZER)
    found = {}
    for task in args.tasks:
        for batch in args.batches:
            size = Cell(task, 0.0, batch).num_prompts
            items = make_task(task, tokenizer, size * (args.rounds + 1)).items
            prompts = [item.prompt_token_ids for item in items]
            longest = max(map(len, prompts)) + args.max_tokens
            if longest > MAX_MODEL_LEN:
                raise ValueError(f"max_tokens must fit in {MAX_MODEL_LEN} tokens, got {longest}")
            found[task, batch] = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    return found


def contest(
    args: argparse.Namespace,
    checkpoint: str,
    dtype: str,
    contestants: Sequence[Contestant],
    rounds: dict[tuple[str, int], list[list[list[int]]]],
    failed: dict[str, str],
    machine: Machine,
) -> Iterator[Row]:
    """Measure all cells on one checkpoint and type, and yield their rows."""
    longest = max(len(ids) for own in rounds.values() for part in own for ids in part)
    # Speculation may need room beyond the last token, and some engines whole blocks.
    max_len = min(MAX_MODEL_LEN, -(-(longest + args.max_tokens + 32) // 64) * 64)
    setup = Setup(checkpoint, dtype, args.threads, max(args.batches), max_len, args.timeout)
    work = Work.of_checkpoint(peer_checkpoints.hf_checkpoint(checkpoint))
    cells = [Cell(t, u, b) for t in args.tasks for u in args.temperatures for b in args.batches]
    entries: dict[Cell, list[Entry]] = {cell: [] for cell in cells}
    able = [c for c in contestants if c.peer not in failed]
    memory = args.memory_gib or 0.85 * available_gib()
    groups = peer_contestants.groups(able, setup, work, memory)
    for contestant in contestants:
        if contestant.peer in failed:
            for cell in cells:
                entries[cell].append(Entry(contestant, 0, error=failed[contestant.peer]))
    with tqdm(total=0, bar_format="{desc} [{elapsed}]", leave=False) as bar:

        def note(text: str) -> None:
            bar.set_description_str(f"{checkpoint} {dtype}: {text}")

        for index, members in enumerate(groups):
            with Group(
                index,
                members,
                lambda c: setup.process(c, work),
                lambda c: setup.load_message(c, work),
                note,
            ) as group:
                for cell in cells:
                    prompts = rounds[cell.task, cell.batch]
                    entries[cell] += group.measure(cell, prompts, args.max_tokens)
                    if index < len(groups) - 1:
                        continue
                    own, found = prompts[1:], entries[cell]
                    for row in make_rows(cell, found, own, args.max_tokens, setup, work, machine):
                        yield {**row, **law(row, cell, found, own)}


def law(
    row: Row, cell: Cell, entries: Sequence[Entry], rounds: Sequence[list[list[int]]]
) -> dict[str, float]:
    """Whether what was sampled was drawn from the model; nothing for greedy and failed rows."""
    if cell.temperature == 0 or "error" in row:
        return {}
    entry = next(
        e for e in entries if e.contestant.name == row["contestant"] and e.group == row["group"]
    )
    prompts = [ids for own in rounds for ids in own]
    outputs = [ids for own in entry.token_ids for ids in own]
    excess, error = excess_surprise(prompts[: len(outputs)], outputs, cell.temperature)
    return {"excess_surprise": excess, "excess_surprise_error": error}


def described(machine: Machine) -> dict[str, Any]:
    return {
        "read_bytes_per_second": machine.bytes_per_second,
        "operations_per_second": dict(machine.operations_per_second),
    }


def available_gib() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if "MemAvailable" in line) * 1024 / GIB


def rate_table(rows: Sequence[Row], title: str) -> Table:
    table = Table(
        title=f"{title}: generated tokens per second",
        caption="x: speed relative to folospec plain, and to the fastest peer of all modes. "
        "limit: share of what the machine could do without speculation. same: completions equal "
        "to folospec plain's. excess: nats per token by which samples are too surprising.",
    )
    for header in (
        "dtype",
        "task",
        "T",
        "batch",
        "contestant",
        "median",
        "range",
        "x plain",
        "x peer",
        "limit",
        "same",
        "excess",
    ):
        left = header in ("dtype", "task", "contestant")
        table.add_column(header, justify="left" if left else "right", no_wrap=left)
    for row in rows:
        cell = [row["dtype"], row["task"], f"{row['temperature']:g}", str(row["batch"])]
        if "error" in row:
            table.add_row(*cell, row["contestant"], f"[red]{row['error'][:40]}[/red]")
            continue
        low, high = row["tokens_per_second_range"]
        table.add_row(
            *cell,
            row["contestant"],
            f"{row['tokens_per_second']:.1f}",
            f"{low:.0f}-{high:.0f}",
            _number(row["ratio_to_folospec_plain"]),
            _number(row["ratio_to_fastest_peer"]),
            _number(row["share_of_limit"]),
            _number(row.get("same_completions")),
            _number(row.get("excess_surprise")),
        )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _temperatures(text: str) -> list[float]:
    values = [float(part) for part in text.split(",")]
    if min(values) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return values


def _choices(allowed: Sequence[str] | dict[str, Any]) -> Any:
    def read(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"must be of {', '.join(allowed)}, got {name!r}")
        return names

    return read


def _settings(text: str) -> list[dict[str, Any]]:
    found = json.loads(Path(text[1:]).read_text() if text.startswith("@") else text)
    if not isinstance(found, list):
        raise argparse.ArgumentTypeError(f"must be a list of settings, got {found!r}")
    return found


if __name__ == "__main__":
    main()
