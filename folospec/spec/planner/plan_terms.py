"""Defines what the planner and the engine exchange: sources, sequences, proposals, reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

REASONS: Mapping[str, str] = {
    "not_wanted": "the request asks for no drafts, or for none of these drafters",
    "no_room": "the output has room for one token more, which needs no draft",
    "unplanned": "it was not among the running sequences when the step was planned",
    "reference": "now and then a step without drafts, to know what one costs",
    "no_slots": "the token budget or the blocks left no slot for a draft",
    "batch_full": "a draft would pay alone, but in this batch a row costs more than it brings",
    "rejected": "too few drafts are accepted to pay for drafting",
    "nothing_to_say": "no drafter had a proposal",
    "unlikely": "there was a proposal, and no node likely enough to pay for its row",
}
"""Why a sequence had no draft in a step."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where drafts come from: a drafter, or all of them together where they are merged."""

    name: str
    limit: int
    """Most draft tokens."""
    in_passes: bool
    """Whether every level costs a pass of a model; if not, asking costs the same at any depth."""
    guess: tuple[float, float, float, float, float] | None = None
    """What drafting costs, see `DraftCost`, where something is known before any draft."""


@dataclass(slots=True)
class PlannedSequence:
    """A sequence that could be drafted for."""

    seq_id: str
    room: int
    """Tokens that it may still generate, above 1."""
    wanted: int | None
    """Most draft tokens by the request's own wish."""
    uncomputed: Mapping[str, int]
    """By the name of each source that may draft for it, the tokens that it has to catch up with."""


@dataclass(slots=True)
class ScoredProposal:
    """A proposal as the planner sees it."""

    source: str
    seq_id: str
    parents: Sequence[int]
    depths: Sequence[int]
    confidence: Sequence[float] | None
    """The confidence, as the drafter gave it."""
    calibrated: list[float]
    chances: list[float]
    """Of each node to be reached and accepted."""
    candidate: Sequence[bool] | None = None
    is_probe: bool = False
    kept: list[int] = field(default_factory=list)
    expected_gain: float | None = None
    """Where the shape may follow from drawn tokens that must not decide: what it counts for, known
    before they were drawn."""

    @property
    def is_indivisible(self) -> bool:
        """Whether all nodes are kept or none: scratch rows belong together, and nodes that tell of
        drawn tokens must not decide."""
        has_scratch = self.candidate is not None and not all(self.candidate)
        return has_scratch or self.expected_gain is not None

    def net(self, price: float) -> float:
        """Tokens it is expected to bring, less the price of the rows that are worth it."""
        if self.expected_gain is not None:
            return self.expected_gain
        return sum(chance - price for chance in self.chances if chance > price)
