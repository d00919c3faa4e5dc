"""From what the contestants did in a cell to rows: rates, ratios, limits and agreement."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.engine.throughput import TIMES
from benchmarks.lib.limits import Machine, Work, run_seconds
from benchmarks.peers.contest import Cell, Entry
from benchmarks.peers.contestants import ANCHOR, Setup

Row = dict[str, Any]


def make_rows(
    cell: Cell,
    entries: Sequence[Entry],
    rounds: Sequence[list[list[int]]],
    max_tokens: int,
    setup: Setup,
    work: Work,
    machine: Machine,
) -> list[Row]:
    """Return a row per contestant; the anchor, which is in every group, has the row of the first.

    Args:
        entries: of all groups.
        rounds: the prompts of the timed rounds.
    """
    anchors = {e.group: e for e in entries if e.contestant.name == ANCHOR and e.seconds}
    first = min(anchors) if anchors else None
    kept = [e for e in entries if e.contestant.name != ANCHOR or e.group == (first or 0)]
    rivals = [e for e in kept if e.contestant.is_rival and not e.error]
    fastest = _fastest(rivals, anchors)
    fastest_plain = _fastest([e for e in rivals if not e.contestant.is_speculative], anchors)
    lengths = [[len(ids) for ids in prompts] for prompts in rounds]
    limit = statistics.median(
        run_seconds(work, machine, own, max_tokens, cell.batch, setup.dtype) for own in lengths
    )
    tokens = cell.num_prompts * max_tokens
    context = sum(map(sum, lengths)) / sum(map(len, lengths)) + max_tokens / 2
    read, done = work.step([round(context)] * cell.batch, setup.dtype)
    common = {
        "checkpoint": setup.checkpoint,
        "dtype": setup.dtype,
        "threads": setup.threads,
        "target": setup.target,
        "task": cell.task,
        "temperature": cell.temperature,
        "batch": cell.batch,
        "num_prompts": cell.num_prompts,
        "mean_prompt_tokens": sum(map(sum, lengths)) / sum(map(len, lengths)),
        "max_tokens": max_tokens,
        "rounds": len(rounds),
        "step_bytes": read,
        "step_operations": done,
        "step_limit_seconds": machine.seconds(read, done, setup.dtype),
        "limit_tokens_per_second": tokens / limit,
    }
    rows = []
    for entry in kept:
        row = {
            **common,
            "contestant": entry.contestant.name,
            "peer": entry.contestant.peer,
            "speculative": entry.contestant.is_speculative,
            "group": entry.group,
            "settings": {"mode": entry.contestant.mode, **entry.contestant.options},
            "precision": setup.precision(entry.contestant)._asdict(),
            "versions": entry.versions,
        }
        if entry.error is not None or not entry.seconds:
            rows.append({**row, "error": entry.error or "it did not run"})
            continue
        row |= {
            "seconds": entry.seconds,
            "tokens_per_second": tokens / entry.median,
            "tokens_per_second_range": [tokens / max(entry.seconds), tokens / min(entry.seconds)],
            "memory_bytes": entry.memory_bytes,
            "share_of_limit": limit / entry.median,
            "ratio_to_folospec_plain": _to_anchor(entry, anchors),
            "fastest_peer": fastest.contestant.name if fastest else None,
            "ratio_to_fastest_peer": ratio(entry, fastest, anchors),
            "fastest_plain_peer": fastest_plain.contestant.name if fastest_plain else None,
            "ratio_to_fastest_plain_peer": ratio(entry, fastest_plain, anchors),
            **_details(entry),
        }
        if cell.temperature == 0 and entry.group in anchors:
            row |= agreement(anchors[entry.group].token_ids, entry.token_ids)
        rows.append(row)
    return rows


def ratio(entry: Entry, other: Entry | None, anchors: dict[int, Entry]) -> float | None:
    """How many times as fast as another: the median of the rounds' ratios if they took turns, else
    by way of the anchor, which both took turns with. None if that cannot be said."""
    if other is None:
        return None
    if entry.group == other.group:
        return _paired(entry, other)
    own, others = _to_anchor(entry, anchors), _to_anchor(other, anchors)
    return own / others if own is not None and others is not None else None


def _to_anchor(entry: Entry, anchors: dict[int, Entry]) -> float | None:
    return _paired(entry, anchors[entry.group]) if entry.group in anchors else None


def _paired(entry: Entry, other: Entry) -> float | None:
    pairs = list(zip(entry.seconds, other.seconds, strict=False))
    return statistics.median(b / a for a, b in pairs) if pairs else None


def _fastest(entries: Sequence[Entry], anchors: dict[int, Entry]) -> Entry | None:
    """By the ratio to the anchor, which holds across groups; without one, by the seconds."""
    if not entries:
        return None
    return max(entries, key=lambda e: _to_anchor(e, anchors) or 1e-9 / e.median)


def agreement(
    expected: Sequence[list[list[int]]], found: Sequence[list[list[int]]]
) -> dict[str, float]:
    """Share of prompts with the same tokens, and share of tokens before the first difference."""
    pairs = [
        pair
        for own, other in zip(expected, found, strict=False)
        for pair in zip(own, other, strict=True)
    ]
    before = [len(os.path.commonprefix([a, b])) for a, b in pairs]
    return {
        "same_completions": sum(a == b for a, b in pairs) / len(pairs),
        "same_tokens": sum(before) / sum(len(a) for a, _ in pairs),
    }


def past_end(token_ids: Sequence[list[list[int]]], ends: set[int]) -> float | None:
    """Share of the outputs that go on behind a token which would have ended them; None if there are
    none."""
    outputs = [ids for part in token_ids for ids in part]
    return sum(not ends.isdisjoint(ids[:-1]) for ids in outputs) / len(outputs) if outputs else None


def _details(entry: Entry) -> Row:
    """What folospec says about its steps."""
    details = entry.details
    steps, drafts = details.get("num_steps"), details.get("num_drafts")
    if not steps:
        return dict(details)
    spent = {key: 1000 * details[key] / steps for key in TIMES}
    spent["rest"] = 1000 * sum(entry.seconds) / steps - sum(spent.values())
    accepted = details["num_accepted_tokens"]
    return {
        "milliseconds_per_step": spent,
        "acceptance_length": 1 + accepted / drafts if drafts else None,
        "acceptance_rate": accepted / details["num_draft_tokens"] if drafts else None,
        "target_passes_per_round": details["num_target_passes"] / len(entry.seconds),
    }
