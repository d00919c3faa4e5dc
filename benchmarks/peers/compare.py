"""folospec and the engines that one would otherwise run, on one checkpoint, in turns, in one run.

    python -m benchmarks.peers.compare --setup-only  # environments and conversions
    python -m benchmarks.peers.compare --out peers.jsonl --plot peers.svg
    python -m benchmarks.peers.compare --checkpoints demo --batches 1 --peers openvino --rounds 2
    python -m benchmarks.peers.compare --checkpoints smollm2 --dtypes bfloat16 --batches 1

All contestants complete the same prompts with the same number of new tokens, on token ids alone,
without a prefix cache, with the same number of threads, in the same precision as far as they offer
it; `contestants` has their settings, `contest` how they take turns. Those whose processes
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

from tqdm import tqdm

from benchmarks.lib.limits import Machine, Work, measure
from benchmarks.lib.output import begin, show, write_rows
from benchmarks.lib.tasks import ALL_TASKS
from benchmarks.peers import checkpoints, venvs
from benchmarks.peers.checkpoints import end_token_ids, has_draft
from benchmarks.peers.contest import Cell, Entry, Group
from benchmarks.peers.contestants import (
    NATIVE,
    TARGETS,
    Contestant,
    Setup,
    groups,
    make_contestants,
)
from benchmarks.peers.kinds import PEER_KINDS
from benchmarks.peers.prompts import CHAT, MAX_MODEL_LEN, TASKS, Rounds, default_tasks, make_rounds
from benchmarks.peers.rows import Row, make_rows, past_end
from benchmarks.peers.surprise import excess_surprise
from benchmarks.peers.table import rate_table

GIB = 1 << 30


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the comparison and return its rows."""
    args = parse_arguments(argv)
    contestants = {
        checkpoint: make_contestants(args.folospec, args.peers, args.draft_tokens, checkpoint)
        for checkpoint in args.checkpoints
    }
    failed = set_up(args)
    if args.setup_only:
        return []
    facts = begin(argv, __file__)
    machine = measure(args.threads)
    common = {"benchmark": "peers", "provenance": facts, "machine": described(machine)}
    rounds = {
        name: make_rounds(
            name, args.tasks or default_tasks(name), args.batches, args.rounds, args.max_tokens
        )
        for name in args.checkpoints
    }

    def measured() -> Iterator[Row]:
        for checkpoint in args.checkpoints:
            for dtype in args.dtypes:
                own = contestants[checkpoint], rounds[checkpoint]
                for row in contest(args, checkpoint, dtype, *own, failed, machine):
                    yield {**common, **row}

    rows = write_rows(measured(), args.out)
    for checkpoint in args.checkpoints:
        show(rate_table([row for row in rows if row["checkpoint"] == checkpoint], checkpoint))
    if args.plot is not None:
        from benchmarks.lib.plots import save
        from benchmarks.peers.plots import rates

        save(rates(rows), args.plot)
    return rows


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="folospec and its peers, in turns.")
    known = checkpoints.NAMES
    parser.add_argument("--checkpoints", type=_choices(known), default=list(known))
    dtypes = ("float32", "bfloat16")
    parser.add_argument("--dtypes", type=_choices(dtypes), default=list(dtypes))
    parser.add_argument("--batches", type=_counts, default=[1, 8, 32])
    parser.add_argument("--temperatures", type=_temperatures, default=[0.0, 0.8])
    parser.add_argument(
        "--tasks",
        type=_choices(ALL_TASKS),
        help=f"default: {','.join(TASKS)}; of a chat model {','.join(CHAT)}",
    )
    peers = tuple(PEER_KINDS)
    parser.add_argument("--peers", type=_choices(peers), default=list(peers))
    parser.add_argument(
        "--folospec",
        type=_settings,
        help='JSON or @FILE: [{"name": "plain"}, {"name": "auto", "speculative": "auto"}, ...]',
    )
    parser.add_argument(
        "--draft-tokens", type=_counts, default=[4], help="of the peers, such as 4,8"
    )
    parser.add_argument("--rounds", type=_count, default=5)
    parser.add_argument("--max-tokens", type=_count, default=64, help="of a chat model at most")
    parser.add_argument("--threads", type=_count, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--target",
        choices=tuple(TARGETS),
        default=NATIVE,
        help="the instructions that all may use; the machine's own, or those of AVX2",
    )
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
        kind = PEER_KINDS[peer]
        wanted = [c for c in args.checkpoints if kind.only_checkpoint in ("", c)]
        try:
            print(f"setting up {peer}", file=sys.stderr)
            engine = kind.engine or peer
            for name in dict.fromkeys((engine, venvs.environment_of(engine, args.target))):
                venvs.install(name)  # the first converts
            for name in [*(["draft"] if any(map(has_draft, wanted)) else []), *wanted]:
                for dtype in args.dtypes:
                    checkpoints.checkpoint_for(peer, name, dtype)
        except (RuntimeError, OSError, ValueError) as error:
            failed[peer] = f"{type(error).__name__}: {error}"
            print(f"{peer}: {failed[peer]}", file=sys.stderr)
    return failed


def contest(
    args: argparse.Namespace,
    checkpoint: str,
    dtype: str,
    contestants: Sequence[Contestant],
    rounds: dict[tuple[str, int], Rounds],
    failed: dict[str, str],
    machine: Machine,
) -> Iterator[Row]:
    """Measure all cells on one checkpoint and type, and yield their rows."""
    longest = max(own.longest for own in rounds.values())
    # Speculation may need room beyond the last token, and some engines whole blocks.
    max_len = min(MAX_MODEL_LEN, -(-(longest + 32) // 64) * 64)
    setup = Setup(
        checkpoint, dtype, args.threads, max(args.batches), max_len, args.timeout, args.target
    )
    folder = checkpoints.hf_checkpoint(checkpoint)
    work, ends = Work.of_checkpoint(folder), end_token_ids(folder)
    cells = [Cell(t, u, b) for t, b in rounds for u in args.temperatures]
    entries: dict[Cell, list[Entry]] = {cell: [] for cell in cells}
    able = [c for c in contestants if c.peer not in failed]
    memory = args.memory_gib or 0.85 * available_gib()
    parts = groups(able, setup, work, memory)
    for contestant in contestants:
        if contestant.peer in failed:
            for cell in cells:
                entries[cell].append(Entry(contestant, 0, error=failed[contestant.peer]))
    with tqdm(total=0, bar_format="{desc} [{elapsed}]", leave=False) as bar:

        def note(text: str) -> None:
            bar.set_description_str(f"{checkpoint} {dtype}: {text}")

        for index, members in enumerate(parts):
            with Group(
                index,
                members,
                lambda c: setup.process(c, work),
                lambda c: setup.load_message(c, work),
                note,
            ) as group:
                for cell in cells:
                    part = rounds[cell.task, cell.batch]
                    entries[cell] += group.measure(cell, part.prompts, part.max_tokens)
                    if index < len(parts) - 1:
                        continue
                    own, found = part.prompts[1:], entries[cell]
                    for row in make_rows(cell, found, own, part.max_tokens, setup, work, machine):
                        entry = entry_of(row, found)
                        past = {"share_past_end": past_end(entry.token_ids, ends)}
                        yield {**row, **past, **surprise(row, entry, own, str(folder))}


def entry_of(row: Row, entries: Sequence[Entry]) -> Entry:
    key = row["contestant"], row["group"]
    return next(e for e in entries if (e.contestant.name, e.group) == key)


def surprise(
    row: Row, entry: Entry, rounds: Sequence[list[list[int]]], model: str
) -> dict[str, float]:
    """Whether what was sampled was drawn from the model; nothing for greedy and failed rows."""
    if row["temperature"] == 0 or "error" in row:
        return {}
    prompts = [ids for own in rounds for ids in own]
    outputs = [ids for own in entry.token_ids for ids in own]
    of_demo = has_draft(row["checkpoint"])  # the grown ones compute what the demo does
    reference = {} if of_demo else {"model": model}
    excess, error = excess_surprise(
        prompts[: len(outputs)], outputs, row["temperature"], **reference
    )
    return {"excess_surprise": excess, "excess_surprise_error": error}


def described(machine: Machine) -> dict[str, Any]:
    return {
        "read_bytes_per_second": machine.bytes_per_second,
        "operations_per_second": dict(machine.operations_per_second),
    }


def available_gib() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if "MemAvailable" in line) * 1024 / GIB


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
