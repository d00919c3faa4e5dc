"""The goals of the check, as data, and how each is found in the rows.

Nothing here measures, and nothing is called met without a row that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_check.jobs import COMPLETE

Row = dict[str, Any]

MODEL = "grown 1.2b"
CHECKS = ("kernels", "lossless", "bits", "rules")
MET, MISSED, NOT_MEASURED, INCOMPLETE = "met", "missed", "not measured", "incomplete"


@dataclass(frozen=True, slots=True)
class Goal:
    """`value` finds the figure in the rows, None where it was not measured. The goal of a section
    is met only if all of its parts ended complete."""

    name: str
    bound: float
    at_least: bool
    value: Callable[[Sequence[Row]], float | None]
    section: str | None = None

    def verdict(self, rows: Sequence[Row]) -> tuple[float | None, str]:
        """The figure, and whether it is within the bound."""
        value = self.value(rows)
        if value is None:
            return None, NOT_MEASURED
        ok = value >= self.bound if self.at_least else value <= self.bound
        ends = find(rows, kind="end", section=self.section) if self.section else []
        if ok and any(row["end"] != COMPLETE for row in ends):
            return value, INCOMPLETE
        return value, MET if ok else MISSED

    @property
    def wanted(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.bound:g}"


def find(rows: Iterable[Row], /, **wanted: Any) -> list[Row]:
    """The rows that have all these entries."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def _step(name: str, **wanted: Any) -> Callable[[Sequence[Row]], float | None]:
    def value(rows: Sequence[Row]) -> float | None:
        fast = [row for row in find(rows, kind="step", **wanted) if not row.get("deterministic")]
        return fast[0][name] if fast else None

    return value


def _speedup(model: str) -> Callable[[Sequence[Row]], float | None]:
    """Of the told drafter over plain decoding, at batch 1, of the cell with most prompts."""

    def value(rows: Sequence[Row]) -> float | None:
        told = [
            row
            for row in find(rows, kind="throughput", model=model, batch=1)
            if row["contestant"].startswith("folospec told") and "ratio_to_folospec_plain" in row
        ]
        best = max(told, key=lambda row: row["prompts"], default=None)
        return None if best is None else best["ratio_to_folospec_plain"]

    return value


def _over_transformers(model: str, batch: int) -> Callable[[Sequence[Row]], float | None]:
    """Own plain decoding over the fastest way of transformers that ran, of one cell. None if its
    plain `generate` is not among them."""

    def value(rows: Sequence[Row]) -> float | None:
        cell = find(rows, kind="throughput", model=model, batch=batch)
        others = [row for row in cell if row["contestant"].startswith("transformers")]
        ratios = [row.get("ratio_to_folospec_plain") for row in others]
        known = [ratio for ratio in ratios if ratio is not None]
        has_plain = any(
            row["contestant"] == "transformers generate" and row.get("ratio_to_folospec_plain")
            for row in others
        )
        return 1 / max(known) if known and has_plain else None

    return value


def _failed(section: str) -> Callable[[Sequence[Row]], float | None]:
    """How many checks of a section failed; None if none ran."""

    def value(rows: Sequence[Row]) -> float | None:
        checked = [row for row in find(rows, section=section) if "passed" in row]
        return sum(not row["passed"] for row in checked) if checked else None

    return value


GOALS = (
    *(Goal(f"{section}: failed checks", 0, False, _failed(section), section) for section in CHECKS),
    Goal(
        f"{MODEL}, plain, batch 1: share of the bandwidth limit",
        0.80,
        True,
        _step("share_of_read", model=MODEL, shape="plain", context=512),
    ),
    Goal(
        f"{MODEL}: a step with 16 rows over one with 1 row",
        1.15,
        False,
        _step("ratio_to_first", model=MODEL, shape="chain", rows=16, context=512),
    ),
    Goal(
        f"{MODEL}, batch 1: speculative (k = 5, right at 0.8) over plain",
        2.5,
        True,
        _speedup(MODEL),
    ),
    *(
        Goal(
            f"{model}, batch {batch}: plain over the fastest way of transformers{without}",
            2.0,
            True,
            _over_transformers(model, batch),
        )
        for model, without in ((MODEL, ""), ("8b", " (no draft model)"))
        for batch in (1, 8, 64)
    ),
)
