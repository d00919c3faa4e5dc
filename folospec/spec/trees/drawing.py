"""Draws draft tokens from a draft model's logits: the request's own pipeline, then the children.

    logits -- constraints --+-- kernels: temperature, filters, noise, the best tokens in one call
                            `-- torch:   process(), then draw_children()

Kernels serve float32 logits wherever no draft needs a distribution beside its tokens: the native
ones on a CPU, and on a GPU Triton's, which draw one child of every node. Both ways draw the same
children, but for near ties.
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
from folospec.spec.draft_runner import ChainSampling
from folospec.spec.trees.children import Children, ChildRequest, draw_children
from folospec.spec.trees.drafting import Drafting

if TYPE_CHECKING:
    from folospec.kernels.gpu.sampling import DeviceSampling
    from folospec.spec.drafters.base import DraftRequest


class DraftSampling:
    """What the drafts of a sequence are drawn with."""

    def __init__(self, row: DraftRequest, plan: Drafting) -> None:
        params = row.params
        self.row, self.temperature = row, params.temperature
        self.is_noisy = plan.is_sampled and not params.greedy
        self.has_own_noise = self.is_noisy and not plan.uses_target_noise
        """Each token has a distribution beside it, which a ratio rule asks for."""
        self.uses_sharpness = plan.uses_target_noise or params.greedy
        """Of the confidence, see `children.draw_children`."""
        self.is_constrained = is_constrained(SamplingRow(params))
        self.packed = pack_request(params, row.seed, row.sample_index)


@dataclass(slots=True)
class DraftPosition:
    """A node whose children are drawn."""

    sampling: DraftSampling
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

    def draw(
        self, logits: Tensor, nodes: Sequence[DraftPosition], sharpness: float
    ) -> list[Children]:
        """Draw the children of every node.

        Args:
            logits: float [num_nodes, vocab_size], of the draft model; not changed.
            sharpness: of the confidence, see `drafting.Sharpness`.
        """
        most = min(max(node.count for node in nodes), logits.shape[1])
        kernels = self._kernels_for(logits, most)
        if kernels is None or any(node.sampling.has_own_noise for node in nodes):
            log_probs = process(logits, [_sampling_row(s) for s in nodes], soften_greedy=True)
            places = [self._place(node) for node in nodes]
            return draw_children(self.plan.children, log_probs, places, sharpness)
        if any(node.sampling.is_constrained for node in nodes):
            logits = constrain(logits, [_sampling_row(node) for node in nodes])
        drawn = kernels.draw(
            logits,
            [node.sampling.packed for node in nodes],
            [_wanted(index, node, most, sharpness) for index, node in enumerate(nodes)],
            most,
        )
        return [Children(token_ids, confidence) for token_ids, confidence in drawn]

    def _kernels_for(self, logits: Tensor, most: int) -> NativeChildren | DeviceSampling | None:
        """What draws `most` children of every row; None where only torch does."""
        if self.native is not None and self.native.takes(logits):
            return self.native
        return on_device(logits) if most == 1 else None

    def _place(self, node: DraftPosition) -> ChildRequest:
        row, keys = node.sampling.row, []
        if node.sampling.is_noisy:
            if self.plan.uses_target_noise:
                codes = [int(Purpose.TARGET)]
                position = row.root_position + 1 + len(node.path)
            else:
                draws = node.count if self.plan.children == "iid" else 1
                streams = [self.stream + (draw << 10) for draw in range(draws)]
                codes = [noise.purpose_code(Purpose.DRAFT, node.node_row, s) for s in streams]
                position = row.root_position
            keys = [noise.key(row.seed, row.sample_index, position, code) for code in codes]
        return ChildRequest(node.count, keys, node.sampling.temperature)


def chain_sampling(
    sampling: DraftSampling, length: int, sharpness: float, min_probability: float
) -> ChainSampling:
    """What a runner needs that draws a chain of so many tokens by itself."""
    return ChainSampling(
        sampling.packed,
        _position(sampling, 0),
        _scale(sampling, sharpness),
        length,
        min_probability,
    )


def _wanted(index: int, node: DraftPosition, most: int, sharpness: float) -> bytes:
    position, count = (
        _position(node.sampling, len(node.path)),
        min(node.count, most),
    )
    return pack_wanted(index, position, count, _scale(node.sampling, sharpness))


def _position(sampling: DraftSampling, depth: int) -> int:
    """Of the token that is drawn after so many drafts."""
    return sampling.row.root_position + 1 + depth if sampling.is_noisy else NO_NOISE


def _scale(sampling: DraftSampling, sharpness: float) -> float:
    """The factor of scores in the confidence, see `children.draw_children`."""
    return sharpness * (sampling.temperature or 1.0) if sampling.uses_sharpness else 1.0


def _sampling_row(node: DraftPosition) -> SamplingRow:
    row = node.sampling.row
    return SamplingRow(
        params=row.params,
        prompt_token_ids=row.prompt_token_ids,
        output_token_ids=row.output_token_ids,
        draft_token_ids=node.path,
        is_draft=True,
    )
