"""From a draft model's logits to draft tokens: the request's own pipeline, then the children.

    logits -- constraints --+-- native: temperature, filters, noise, the best tokens in one call
                            `-- torch:  process(), then draw_children()

The native call serves float32 logits on a CPU wherever no draft needs a law beside its tokens. Both
draw the same children, but for near ties.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from folospec.sampling import noise
from folospec.sampling.best_tokens import (
    NO_NOISE,
    NativeChildren,
    load,
    pack_request,
    pack_wanted,
)
from folospec.sampling.constraints import SamplingRow, constrain, is_constrained
from folospec.sampling.noise import Purpose
from folospec.sampling.pipeline import process
from folospec.spec.children import Children, Place, draw_children
from folospec.spec.drafting import Drafting

if TYPE_CHECKING:
    from folospec.spec.drafters.base import DraftRow


class DraftLaw:
    """What the drafts of a sequence are drawn with."""

    def __init__(self, row: DraftRow, plan: Drafting) -> None:
        params = row.params
        self.row, self.temperature = row, params.temperature
        self.is_noisy = plan.is_sampled and not params.greedy
        self.has_own_noise = self.is_noisy and not plan.uses_target_noise
        """Each token has a law beside it, which a ratio rule asks for."""
        self.uses_sharpness = plan.uses_target_noise or params.greedy
        """Of the confidence, see `children.draw_children`."""
        self.is_constrained = is_constrained(SamplingRow(params))
        self.packed = pack_request(params, row.seed, row.sample_index)


@dataclass(slots=True)
class Spot:
    """A node whose children are drawn."""

    law: DraftLaw
    path: Sequence[int]
    """The draft tokens from under the root down to the node."""
    node_row: int
    """The node's row in the step; the root's is 0."""
    count: int = 1


class Drawer:
    """Draws the children of draft nodes.

    Args:
        stream: keeps the noise of drafters apart that have noise of their own.
    """

    def __init__(self, plan: Drafting, stream: int) -> None:
        self.plan, self.stream = plan, stream
        self.native: NativeChildren | None = load()

    def draw(self, logits: Tensor, spots: Sequence[Spot], sharpness: float) -> list[Children]:
        """Draw the children of every spot.

        Args:
            logits: float [num_spots, vocab_size], of the draft model; not changed.
            sharpness: of the confidence, see `drafting.Sharpness`.
        """
        native = self.native
        if native is None or not native.takes(logits) or any(s.law.has_own_noise for s in spots):
            log_probs = process(logits, [_sampling_row(s) for s in spots], soften_greedy=True)
            places = [self._place(spot) for spot in spots]
            return draw_children(self.plan.children, log_probs, places, sharpness)
        if any(spot.law.is_constrained for spot in spots):
            logits = constrain(logits, [_sampling_row(spot) for spot in spots])
        most = min(max(spot.count for spot in spots), logits.shape[1])
        drawn = native.draw(
            logits,
            [spot.law.packed for spot in spots],
            [_wanted(index, spot, most, sharpness) for index, spot in enumerate(spots)],
            most,
        )
        return [Children(token_ids, confidence) for token_ids, confidence in drawn]

    def _place(self, spot: Spot) -> Place:
        row, keys = spot.law.row, []
        if spot.law.is_noisy:
            if self.plan.uses_target_noise:
                codes = [int(Purpose.TARGET)]
                position = row.root_position + 1 + len(spot.path)
            else:
                draws = spot.count if self.plan.children == "iid" else 1
                streams = [self.stream + (draw << 10) for draw in range(draws)]
                codes = [noise.purpose_code(Purpose.DRAFT, spot.node_row, s) for s in streams]
                position = row.root_position
            keys = [noise.key(row.seed, row.sample_index, position, code) for code in codes]
        return Place(spot.count, keys, spot.law.temperature)


def _wanted(index: int, spot: Spot, most: int, sharpness: float) -> bytes:
    law = spot.law
    position = law.row.root_position + 1 + len(spot.path) if law.is_noisy else NO_NOISE
    scale = sharpness * (law.temperature or 1.0) if law.uses_sharpness else 1.0
    return pack_wanted(index, position, min(spot.count, most), scale)


def _sampling_row(spot: Spot) -> SamplingRow:
    row = spot.law.row
    return SamplingRow(
        params=row.params,
        prompt_token_ids=row.prompt_token_ids,
        output_token_ids=row.output_token_ids,
        draft_token_ids=spot.path,
        is_draft=True,
    )
