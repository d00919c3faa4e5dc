"""Draws draft tokens from a draft model's logits: the request's own pipeline, then the children.

    logits -- constraints --+-- kernels: temperature, filters, noise, the best tokens in one call
                            `-- torch:   process(), then draw_children()

Kernels serve float32 logits wherever no draft needs a law beside its tokens: the native ones on a
CPU, and on a GPU Triton's, which draw one child of every node. Both ways draw the same children,
but for near ties.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from folospec.kernels.sampling import on_device
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
from folospec.spec.draft_runner import ChainLaw
from folospec.spec.trees.children import Children, Place, draw_children
from folospec.spec.trees.drafting import Drafting

if TYPE_CHECKING:
    from folospec.kernels.gpu.sampling import DeviceSampling
    from folospec.spec.drafters.base import DraftRequest


class DraftLaw:
    """What the drafts of a sequence are drawn with."""

    def __init__(self, row: DraftRequest, plan: Drafting) -> None:
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
        most = min(max(spot.count for spot in spots), logits.shape[1])
        kernels = self._kernels_for(logits, most)
        if kernels is None or any(spot.law.has_own_noise for spot in spots):
            log_probs = process(logits, [_sampling_row(s) for s in spots], soften_greedy=True)
            places = [self._place(spot) for spot in spots]
            return draw_children(self.plan.children, log_probs, places, sharpness)
        if any(spot.law.is_constrained for spot in spots):
            logits = constrain(logits, [_sampling_row(spot) for spot in spots])
        drawn = kernels.draw(
            logits,
            [spot.law.packed for spot in spots],
            [_wanted(index, spot, most, sharpness) for index, spot in enumerate(spots)],
            most,
        )
        return [Children(token_ids, confidence) for token_ids, confidence in drawn]

    def _kernels_for(self, logits: Tensor, most: int) -> NativeChildren | DeviceSampling | None:
        """What draws `most` children of every row; None where only torch does."""
        if self.native is not None and self.native.takes(logits):
            return self.native
        return on_device(logits) if most == 1 else None

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


def chain_law(law: DraftLaw, length: int, sharpness: float, least: float) -> ChainLaw:
    """What a runner needs that draws a chain of so many tokens by itself."""
    return ChainLaw(law.packed, _position(law, 0), _scale(law, sharpness), length, least)


def _wanted(index: int, spot: Spot, most: int, sharpness: float) -> bytes:
    position, count = _position(spot.law, len(spot.path)), min(spot.count, most)
    return pack_wanted(index, position, count, _scale(spot.law, sharpness))


def _position(law: DraftLaw, depth: int) -> int:
    """Of the token that is drawn after so many drafts."""
    return law.row.root_position + 1 + depth if law.is_noisy else NO_NOISE


def _scale(law: DraftLaw, sharpness: float) -> float:
    """The factor of scores in the confidence, see `children.draw_children`."""
    return sharpness * (law.temperature or 1.0) if law.uses_sharpness else 1.0


def _sampling_row(spot: Spot) -> SamplingRow:
    row = spot.law.row
    return SamplingRow(
        params=row.params,
        prompt_token_ids=row.prompt_token_ids,
        output_token_ids=row.output_token_ids,
        draft_token_ids=spot.path,
        is_draft=True,
    )
