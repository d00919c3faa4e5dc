"""What the rows of the check say, as tables; a verdict for every goal comes last."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_check.goals import CHECKS, GOALS, find
from gpu_check.jobs import COMPLETE, Job

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table as text."""

    title: str
    header: tuple[str, ...]
    lines: list[tuple[str, ...]]


def sheets(rows: Sequence[Row]) -> list[Sheet]:
    """A table for every part that has rows; the verdicts come last."""
    made = [
        _kernels(rows),
        _not_begun(rows),
        _lossless(rows),
        _bits(rows),
        _rules(rows),
        _ceilings(rows),
        _steps(rows),
        _backends(rows),
        _linears(rows),
        _throughput(rows),
        _notes(rows),
        _memory(rows),
        _weights(rows),
        _engines(rows),
        _profiles(rows),
        _ends(rows),
        _failures(rows),
        verdict_sheet(rows),
    ]
    return [sheet for sheet in made if sheet.lines]


def verdict_sheet(rows: Sequence[Row]) -> Sheet:
    lines = []
    for goal in GOALS:
        value, verdict = goal.verdict(rows)
        lines.append((goal.name, goal.wanted, number(value), verdict))
    return Sheet("Goals", ("goal", "wanted", "measured", ""), lines)


def failed(rows: Iterable[Row]) -> list[Row]:
    """The rows that make the check fail."""
    return [row for row in rows if row.get("passed") is False]


def unproven(rows: Sequence[Row], sections: Iterable[str], jobs: Sequence[Job]) -> list[str]:
    """The sections of checks without a job, and their jobs that did not come to their end or
    checked nothing."""
    asked = [section for section in CHECKS if section in sections]
    found = [section for section in asked if section not in {job.section for job in jobs}]
    for job in jobs:
        own = find(rows, section=job.section, part=job.part)
        ends = [row["end"] for row in find(own, kind="end")]
        is_proven = ends[-1:] == [COMPLETE] and any("passed" in row for row in own)
        if job.section in asked and not is_proven:
            found.append(job.name)
    return found


def number(value: Any) -> str:
    """A cell: figures with three digits that count, "-" for what is not there."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _cells(row: Row, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(number(row.get(name)) for name in names)


def _listed(title: str, rows: Sequence[Row], columns: dict[str, str]) -> Sheet:
    """A line for every row; `columns` maps headings to entries."""
    names = list(columns.values())
    return Sheet(title, tuple(columns), [_cells(row, names) for row in rows])


def _groups(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return found


def _kernels(rows: Sequence[Row]) -> Sheet:
    lines = []
    for (part,), own in _groups(find(rows, kind="kernel"), "part").items():
        errors = [row["error_norm"] for row in own if row["passed"]]
        seeds = 1 + max(row["seed"] for row in own)
        bad = sorted({row["case"] for row in own if not row["passed"]})
        lines.append(
            (
                part,
                str(len(own)),
                str(seeds),
                str(len(failed(own))),
                number(max(errors, default=None)),
                ", ".join(bad[:4]),
            )
        )
    header = ("kernels", "checks", "seeds", "failed", "largest error", "failed cases")
    return Sheet("Kernels against their oracles", header, lines)


def _not_begun(rows: Sequence[Row]) -> Sheet:
    columns = {"kernels": "part", "first case without time": "case", "seed": "seed"}
    return _listed("Kernels not checked to the end", find(rows, kind="not begun"), columns)


def _lossless(rows: Sequence[Row]) -> Sheet:
    lines = []
    for row in find(rows, section="lossless"):
        if row.get("kind") not in ("plain", "tokens", "control"):
            continue
        name = row.get("drafter") or f"plain, beside {row.get('compared_with')}"
        if row["kind"] == "control":
            name = f"control: {row['control']}"
        places = row.get("first_differences", ())
        promise = "deterministic" if row["deterministic"] else "fast"
        lines.append(
            (
                f"{row['model']} {row['dtype']}, {promise}, {row['mode']}",
                *_cells(row, ("sampling",)),
                name,
                *_cells(row, ("num_tokens", "differing_tokens", "differing_sequences")),
                str(sum(place.get("near_tie", False) for place in places)),
                *_cells(row, ("num_accepted_tokens", "num_draft_tokens", "passed")),
            )
        )
    header = ("model", "sampling", "drafter", "tokens", "differ", "sequences", "near ties")
    header += ("accepted", "drafted", "passed")
    return Sheet("Speculative tokens beside plain ones", header, lines)


def _bits(rows: Sequence[Row]) -> Sheet:
    lines = []
    groups = _groups(find(rows, kind="bits"), "dtype", "deterministic", "mode", "context")
    for key, own in groups.items():
        worst = max(own, key=lambda row: row["differing_bits"])
        differing = sum(row["differing_bits"] for row in own)
        where = worst["way"] if differing else "-"
        lines.append((*map(number, key), str(len(own)), str(differing), where))
    header = ("type", "deterministic", "mode", "context", "ways", "differing bits", "most by")
    return Sheet("Bits of one token's logits", header, lines)


def _rules(rows: Sequence[Row]) -> Sheet:
    columns = {"rule": "rule", "drafts": "shape", "seeds": "seeds", "verdicts": "num_verdicts"}
    columns |= {"accepted": "num_accepted", "differ": "differing_verdicts", "passed": "passed"}
    return _listed("Acceptance rules, device beside host", find(rows, kind="rule"), columns)


def _ceilings(rows: Sequence[Row]) -> Sheet:
    columns = {"measured in": "part", "copy GB/s": "copy_gb_per_second"}
    columns |= {f"{t} TFLOP/s": f"{t}_tflop_per_second" for t in ("bfloat16", "float32")}
    return _listed("What the device can do", find(rows, kind="ceilings"), columns)


STEP = {"model": "model", "shape": "shape", "rows": "rows", "context": "context"}
STEP |= {"multi-step": "multi_step", "ms": "ms"}
SHARES = {"of the first": "ratio_to_first", "limit ms": "limit_ms", "share": "share_of_limit"}


def _steps(rows: Sequence[Row]) -> Sheet:
    columns = {**STEP, **SHARES, "deterministic": "deterministic"}
    columns["over fast"] = "over_fast"
    return _listed("Steps", find(rows, kind="step"), columns)


def _backends(rows: Sequence[Row]) -> Sheet:
    columns = {"attention": "attention", "block size": "block_size", **STEP}
    columns |= {"share": "share_of_limit", "": "skipped"}
    return _listed("Steps by attention backend", find(rows, kind="backend"), columns)


def _linears(rows: Sequence[Row]) -> Sheet:
    columns = {"weight": "weight", "rows": "rows", "own ms": "own_ms", "torch ms": "torch_ms"}
    columns |= {"own over torch": "own_over_torch", "share of the limit": "share_of_limit"}
    return _listed("The deterministic linear beside torch's", find(rows, kind="linear"), columns)


def _throughput(rows: Sequence[Row]) -> Sheet:
    columns = {"model": "model", "batch": "batch", "prompts": "prompts", "who": "contestant"}
    columns |= {"tokens/s": "tokens_per_second", "over plain": "ratio_to_folospec_plain"}
    columns |= {"tokens a step": "acceptance_length", "share of the limit": "share_of_limit"}
    columns |= {"tokens as plain": "tokens_equal_to_plain", "": "error"}
    return _listed("Throughput", find(rows, kind="throughput"), columns)


def _memory(rows: Sequence[Row]) -> Sheet:
    columns = {"model": "model", "drafter": "drafter", "asked": "asked"}
    columns |= {"asked bytes": "asked_bytes", "taken": "taken_bytes", "KV": "kv_bytes"}
    columns |= {"peak allocated": "peak_allocated_bytes", "peak reserved": "peak_reserved_bytes"}
    return _listed("Memory", find(rows, kind="memory"), {**columns, "passed": "passed"})


def _notes(rows: Sequence[Row]) -> Sheet:
    return _listed("Notes", find(rows, kind="note"), {"model": "model", "": "note"})


def _weights(rows: Sequence[Row]) -> Sheet:
    columns = {"model": "model", "quantization": "quantization", "bytes of layers": "weight_bytes"}
    columns |= {"ms a step": "ms", "": "skipped"}
    return _listed("Weights in 8 bits", find(rows, kind="weights"), columns)


def _engines(rows: Sequence[Row]) -> Sheet:
    columns = {"section": "section", "part": "part", "model": "model", "drafters": "drafters"}
    columns |= {"sequences": "max_num_seqs", "graphs": "num_graphs", "s": "warm_up_seconds"}
    return _listed("Warm-up of engines with CUDA graphs", find(rows, kind="engine"), columns)


def _profiles(rows: Sequence[Row]) -> Sheet:
    lines = [
        (*_cells(row, ("model", "shape", "rows")), *_cells(kernel, ("kernel", "calls", "ms")))
        for row in find(rows, kind="profile")
        for kernel in [*row["kernels"], {"kernel": "all kernels", "ms": row.get("busy_ms")}]
        + [{"kernel": f"{row['steps']} steps, by the clock", "ms": row.get("wall_ms")}]
    ]
    header = ("model", "shape", "rows", "kernel", "calls", "ms in all")
    return Sheet("Where the device's time goes", header, lines)


def _ends(rows: Sequence[Row]) -> Sheet:
    columns = {"section": "section", "part": "part", "": "end", "seconds": "seconds"}
    return _listed("How the parts ended", find(rows, kind="end"), columns)


def _failures(rows: Sequence[Row]) -> Sheet:
    lines = [
        (*_cells(row, ("section", "part", "kind")), number(row.get("case") or row.get("drafter")))
        + (str(row.get("error") or row.get("lacking") or "")[:200],)
        for row in failed(rows)
    ]
    return Sheet("Failures", ("section", "part", "kind", "of", "why"), lines)
