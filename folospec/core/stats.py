"""Counts what the engine does: a draft at once for its request and for the engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from folospec.outputs import RequestMetrics, SpeculationCounts

if TYPE_CHECKING:
    from folospec.core.sequence_step import SequenceStep


@dataclass(slots=True)
class PrefixCacheStats:
    """Counted in tokens, at every admission, those after a preemption included."""

    queries: int = 0
    """Tokens of the sequences that were looked up."""
    hits: int = 0
    """Of those, the tokens whose KV was found."""


@dataclass(slots=True)
class EngineStats(SpeculationCounts):
    """What the engine has done since it started; a target pass counts once, whoever is in it."""

    num_steps: int = 0
    num_scheduled_tokens: int = 0
    """Rows that the target computed, draft nodes included."""
    num_output_tokens: int = 0
    """Tokens that requests received."""
    num_moved_rows: int = 0
    """KV rows of accepted nodes that a tree's commit moved; 0 for chains."""
    prefix_cache: PrefixCacheStats = field(default_factory=PrefixCacheStats)
    """The cache manager's own counts: pass `KVCacheManager.stats`."""

    def as_dict(self) -> dict[str, Any]:
        """All counts, and the rates that follow from them, by name."""
        counts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "prefix_cache"}
        return {
            **{k: v.copy() if isinstance(v, (list, dict)) else v for k, v in counts.items()},
            "acceptance_length": self.acceptance_length,
            "acceptance_rate": self.acceptance_rate,
            "acceptance_rate_per_pos": self.acceptance_rate_per_pos,
            "prefix_cache_queries": self.prefix_cache.queries,
            "prefix_cache_hits": self.prefix_cache.hits,
        }

    def add_time(self, part: str, seconds: float, steps: Iterable[SequenceStep]) -> None:
        """Add to the time of a part of the step, such as "draft_time", for the engine and for each
        request that takes part."""
        groups = {id(step.group): step.group for step in steps}
        for counts in (self, *(group.metrics for group in groups.values())):
            setattr(counts, part, getattr(counts, part) + seconds)

    def record_pass(self, steps: Sequence[SequenceStep], num_passes: int, seconds: float) -> None:
        """Count the target's passes of a step and their time, for the engine and for each of its
        sequences."""
        self.add_time("target_time", seconds, steps)
        self.num_target_passes += num_passes
        for step in steps:
            step.group.metrics.num_target_passes += num_passes
            self.num_scheduled_tokens += step.num_tokens + len(step.tree)

    def record_draft(
        self, metrics: RequestMetrics, num_draft_tokens: int, num_accepted: int
    ) -> None:
        """Count one verified draft, for its request and for the engine.

        `num_accepted` of its tokens are in the output.

        Raises:
            ValueError: there was no draft token, or more were accepted than drafted.
        """
        if num_draft_tokens < 1:
            raise ValueError(
                f"a draft has at least one token, got num_draft_tokens={num_draft_tokens}"
            )
        if not 0 <= num_accepted <= num_draft_tokens:
            raise ValueError(f"num_accepted must be in [0, {num_draft_tokens}], got {num_accepted}")
        both: tuple[SpeculationCounts, SpeculationCounts] = (metrics, self)
        for counts in both:
            counts.num_drafts += 1
            counts.num_draft_tokens += num_draft_tokens
            counts.num_accepted_tokens += num_accepted
            _grow(counts.num_accepted_tokens_per_pos, num_accepted)
            for position in range(num_accepted):
                counts.num_accepted_tokens_per_pos[position] += 1
            _grow(counts.acceptance_histogram, num_accepted + 1)
            counts.acceptance_histogram[num_accepted] += 1

    def record_undrafted(self, metrics: RequestMetrics, reason: str) -> None:
        """Count a step of a sequence without a draft, for its request and for the engine."""
        metrics.undrafted_reason = reason
        counts = metrics.num_undrafted
        counts[reason] = counts.get(reason, 0) + 1
        self.num_undrafted[reason] = self.num_undrafted.get(reason, 0) + 1


def _grow(counts: list[int], length: int) -> None:
    counts.extend([0] * (length - len(counts)))
