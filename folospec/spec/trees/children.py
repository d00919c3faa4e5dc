"""Draws the children of a draft node from the draft model's distribution at that node.

    coupled              top k of log draft_probs + g, with the noise g that will draw the target's
                         token: where the two distributions nearly agree, so do their arg-maxes
                             (Gumbel coupling, arXiv 2408.07978). Only for rules that share noise.
    top_k                top k of draft_probs: a function of the context, so a one-hot distribution
                         (EAGLE-2, OPT-Tree).
    without_replacement  top k of log draft_probs + g with noise of its own: k draws, each from
                         what the earlier ones left (RSD, arXiv 2402.14160; Sequoia).
    iid                  k independent draws; equal ones stay separate trials (SpecInfer).

For a greedy request all of them are the top k of draft_probs: there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from folospec.sampling.sampler import perturb

CHILDREN = ("coupled", "top_k", "without_replacement", "iid")

NEG_INF = float("-inf")


@dataclass(slots=True)
class ChildRequest:
    """A node whose children are drawn: how many, and with which noise."""

    count: int
    keys: Sequence[int]
    """One key of `noise.key`; for i.i.d. children one for each. None is needed by a greedy
    request."""
    temperature: float
    """Of the request; 0 is greedy."""


@dataclass(slots=True)
class Children:
    """The children of one place, in the order of their trial; fewer than asked for where the
    distribution has no more tokens."""

    token_ids: list[int]
    confidence: list[float]
    """The chance of each to be the target's token, as far as distribution and noise tell."""
    draft_probs: Tensor | None = None
    """[num_children, vocab_size] the distribution each was drawn from, given the earlier ones; None
    where they are one-hot."""


def draw_children(
    how: str, log_probs: Tensor, places: Sequence[ChildRequest], sharpness: float = 1.0
) -> list[Children]:
    """Draw the children of every place.

    Args:
        how: one of `CHILDREN`.
        log_probs: float [num_places, vocab_size], the draft distributions after the request's own
            pipeline; of greedy requests the distribution at temperature 1, so that there is more
            than one token.
        sharpness: of the confidence, see `_chances`.
    """
    if how == "iid" and any(place.temperature > 0 for place in places):
        return _iid(log_probs, places, sharpness)
    scores = log_probs
    if how in ("coupled", "without_replacement"):
        scores = _perturbed(log_probs, places)
    most = min(max(place.count for place in places), log_probs.shape[1])
    if most == 1:
        token_ids = scores.argmax(-1, keepdim=True)
        values = scores.gather(-1, token_ids)
    else:
        values, token_ids = scores.topk(most, -1)
    scale = [
        sharpness * (place.temperature or 1.0)
        if how == "coupled" or place.temperature == 0
        else 1.0
        for place in places
    ]
    chances = _chances(scores if how == "coupled" else log_probs, scale).gather(-1, token_ids)
    drawn = []
    for index, (place, ids, row, chance) in enumerate(
        zip(places, token_ids.tolist(), values.tolist(), chances.tolist(), strict=True)
    ):
        count = sum(value > NEG_INF for value in row[: place.count])
        children = Children(ids[:count], chance[:count])
        if how == "without_replacement" and place.temperature > 0:
            _add_draft_probs(children, log_probs[index].exp())
        drawn.append(children)
    return drawn


def _perturbed(log_probs: Tensor, places: Sequence[ChildRequest]) -> Tensor:
    drawn = [index for index, place in enumerate(places) if place.temperature > 0]
    if not drawn:
        return log_probs
    keys = [places[index].keys[0] for index in drawn]
    if len(drawn) == len(places):
        return perturb(log_probs, keys)
    scores = log_probs.clone()
    scores[drawn] = perturb(log_probs[drawn], keys)
    return scores


def _chances(scores: Tensor, scale: Sequence[float]) -> Tensor:
    """The chance of every token to be the target's, given the noise: [num_places, vocab_size].

    `scores` are log draft_probs + g, and the target's are log target_probs + g. They differ by the
    difference of the two models' logits over the temperature. If that difference were itself
    Gumbel noise of scale 1 / sharpness, for each token its own, the target's token would be x with
    probability

        softmax(sharpness * temperature * scores)[x].

    With the sharpness 1, at temperature 0, it is what the draft model says. The closer the models,
    the greater the sharpness; `drafting.Sharpness` measures it. Where the noise is not known,
    `scores` are log draft_probs and their scale is 1.
    """
    column = torch.tensor(scale, dtype=scores.dtype, device=scores.device)[:, None]
    return (scores * column).softmax(-1)


def _add_draft_probs(children: Children, probs: Tensor) -> None:
    """The distribution of each child: that of the node, without the earlier ones."""
    draft_probs = []
    left = probs.clone()
    for token_id in children.token_ids:
        mass = left.sum()
        if float(mass) <= torch.finfo(left.dtype).eps:  # what is left is rounding
            break
        draft_probs.append(left / mass)
        left[token_id] = 0.0
    del children.token_ids[len(draft_probs) :], children.confidence[len(draft_probs) :]
    children.draft_probs = torch.stack(draft_probs) if draft_probs else None


def _iid(log_probs: Tensor, places: Sequence[ChildRequest], sharpness: float) -> list[Children]:
    drawn = []
    for row, place in zip(log_probs, places, strict=True):
        if place.temperature == 0:
            drawn += draw_children("top_k", row[None], [place], sharpness)
        elif float(row.amax()) == NEG_INF:
            drawn.append(Children([], []))
        else:
            repeated = row.expand(place.count, -1)
            token_ids = perturb(repeated, list(place.keys)).argmax(-1)
            chances = row.exp()[token_ids].tolist()
            drawn.append(Children(token_ids.tolist(), chances, repeated.exp()))
    return drawn
