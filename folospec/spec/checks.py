"""Builds a checked proposal of the engine's own from what a drafter returns.

A drafter's answer may hold anything; what the engine uses is built here from values that were
checked, and the drafter keeps no reference to it.

    answer of a drafter  ->  ProposalChecks.take  ->  Proposal of ints, floats and bools in tuples

A drafter may guess wrong. It may not write where it may not, nor hand over what cannot be verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from folospec.core.token_tree import TokenTree
from folospec.spec.acceptance import AcceptanceRule
from folospec.spec.proposal import Proposal

ROUNDING = 1e-6
"""How far a confidence may be out of [0, 1] by rounding; it is clipped."""
PROBS_TOLERANCE = 1e-3
"""How far the sum of a row of `draft_probs` may be from 1."""


class AnswerLimits(NamedTuple):
    """What an answer to one request is held against: the engine's own figures, whatever has become
    of the request in the drafter's hands."""

    drafter: str
    kv_owner: str | None
    num_tokens: int
    """Committed tokens of the sequence."""
    max_draft_tokens: int
    num_slots: int


class ProposalChecks:
    """Turns answers of drafters into proposals of the engine's own.

    Args:
        rule: the acceptance rule; `draft_probs` are looked at where it uses them.
        vocab_size: of the target.
        device: where `draft_probs` must be.
    """

    def __init__(self, rule: AcceptanceRule, vocab_size: int, device: torch.device) -> None:
        self._rule, self._vocab_size, self._device = rule, vocab_size, device

    def take(self, answer: object, limits: AnswerLimits) -> Proposal | None:
        """Return the checked copy of an answer; None where there is no draft in it.

        Raises:
            ValueError: a part has a wrong type, or is out of range; the message says which, and
                what is allowed.
        """
        if answer is None:
            return None
        if not isinstance(answer, Proposal):
            raise ValueError(
                "propose must return a Proposal or None for each request, "
                f"got a {type(answer).__name__}"
            )
        tree = self._take_tree(answer.tree)
        size = len(tree)
        if size == 0:
            return None
        proposal = Proposal(
            tree,
            draft_probs=self._take_probs(answer.draft_probs, size),
            confidence=_take_confidence(answer.confidence, size),
            candidate=_take_candidate(answer.candidate, size),
            draft_slots=_take_draft_slots(answer.draft_slots, size, limits),
            drafter=limits.drafter,
            own_nodes={limits.drafter: {node: node for node in range(size)}},
        )
        if proposal.num_draft_tokens > limits.max_draft_tokens:
            raise ValueError(
                f"at most {limits.max_draft_tokens} draft tokens were allowed, "
                f"got {proposal.num_draft_tokens}"
            )
        if size > limits.num_slots:
            raise ValueError(f"at most {limits.num_slots} nodes were allowed, got {size}")
        return proposal

    def _take_tree(self, tree: object) -> TokenTree:
        if not isinstance(tree, TokenTree):
            raise ValueError(f"tree must be a TokenTree, got a {type(tree).__name__}")
        token_ids = take_ints("token_ids", tree.token_ids)
        parents = take_ints("parents", tree.parents)
        if token_ids and max(token_ids) >= self._vocab_size:
            raise ValueError(
                f"draft token ids must be below {self._vocab_size}, got {max(token_ids)}"
            )
        own = TokenTree(token_ids, parents)
        if not self._rule.takes_trees and not own.is_chain:
            raise ValueError(
                "the acceptance rule verifies chains, got a tree; use acceptance='coupled' or "
                "'rejection'"
            )
        return own

    def _take_probs(self, probs: object, size: int) -> Tensor | None:
        if probs is None or self._rule.shares_noise:
            return None
        if type(probs) is not Tensor or probs.layout != torch.strided:
            raise ValueError(f"draft_probs must be a dense Tensor, got a {type(probs).__name__}")
        found = (list(probs.shape), probs.dtype, probs.device.type)
        floats = (torch.float32, torch.float64)
        shape, device = [size, self._vocab_size], self._device.type
        if found[0] != shape or probs.dtype not in floats or found[2] != device:
            raise ValueError(
                f"draft_probs must be {shape}, float32 or float64, on {device}, got {found}"
            )
        own = probs.detach().clone(memory_format=torch.contiguous_format)
        least, off = torch.stack([own.amin(), (own.sum(1) - 1.0).abs().amax()]).tolist()
        if not (least >= 0.0 and off <= PROBS_TOLERANCE):  # not so for NaN
            raise ValueError(
                "draft_probs must be finite and at least 0, and every row must sum to 1, got "
                f"{least} and a sum that is {off} off"
            )
        return own


def take_answers(answers: object, num_requests: int) -> Sequence[object]:
    """The answers of `propose`, one for each request.

    Raises:
        ValueError: it is no list, or has another length.
    """
    values = take_list("what propose returns", answers)
    if len(values) != num_requests:
        raise ValueError(
            f"a drafter must answer every request: {num_requests} requests, {len(values)} answers"
        )
    return values


def take_progress(value: object, limits: AnswerLimits) -> int:
    """A drafter's `num_draft_computed`.

    Raises:
        ValueError: it is no integer, or there are not so many tokens.
    """
    (progress,) = take_ints("num_draft_computed", (value,))
    if not 0 <= progress <= limits.num_tokens:
        raise ValueError(f"num_draft_computed must be in [0, {limits.num_tokens}], got {progress}")
    return progress


def take_list(name: str, values: Any) -> list | tuple:
    """The values of a list or tuple.

    Raises:
        ValueError: it is something else.
    """
    # Of a subclass neither the length nor what is in it can be relied on.
    if type(values) is not list and type(values) is not tuple:
        raise ValueError(f"{name} must be a list or a tuple, got a {type(values).__name__}")
    return values


def _take_per_node(name: str, values: Any, size: int) -> list | tuple:
    values = take_list(name, values)
    if len(values) != size:
        raise ValueError(
            f"{name} must have one entry for each of the {size} nodes, got {len(values)}"
        )
    return values


def take_ints(name: str, values: Any) -> tuple[int, ...]:
    """The integers of a list or tuple, those of numpy made Python's.

    Raises:
        ValueError: it is something else, or holds something else.
    """
    values = tuple(take_list(name, values))
    if set(map(type, values)) <= {int}:
        return values
    return tuple(_to_int(name, value) for value in values)


def _to_int(name: str, value: object) -> int:
    if type(value) is int:
        return value
    if not isinstance(value, np.integer):
        raise ValueError(f"{name} must be of integers, got a {type(value).__name__}")
    return int(value)


def _take_confidence(values: Any, size: int) -> tuple[float, ...] | None:
    if values is None:
        return None
    values = tuple(_take_per_node("confidence", values, size))
    if not set(map(type, values)) <= {float}:
        values = tuple(map(_to_float, values))
    if min(values) >= 0.0 and max(values) <= 1.0 and sum(values) >= 0.0:  # the sum finds NaN
        return values
    if not all(-ROUNDING <= value <= 1.0 + ROUNDING for value in values):
        raise ValueError(f"confidence must be in [0, 1], got {values}")
    return tuple(min(max(value, 0.0), 1.0) for value in values)


def _to_float(value: object) -> float:
    if type(value) not in (int, float) and not isinstance(value, (np.floating, np.integer)):
        raise ValueError(f"confidence must be of numbers, got a {type(value).__name__}")
    return float(value)  # type: ignore[arg-type]


def _take_candidate(values: Any, size: int) -> tuple[bool, ...] | None:
    if values is None:
        return None
    values = tuple(_take_per_node("candidate", values, size))
    for value in values:
        if type(value) is not bool:
            raise ValueError(f"candidate must be of bools, got a {type(value).__name__}")
    return values


def _take_draft_slots(
    slots: Any, size: int, limits: AnswerLimits
) -> dict[str, tuple[int | None, ...]]:
    """The slots by owner: the drafter's own KV alone, each slot once."""
    if type(slots) is not dict:
        raise ValueError(f"draft_slots must be a dict, got a {type(slots).__name__}")
    own = {}
    for owner, offsets in slots.items():
        if type(owner) is not str or owner != limits.kv_owner:
            raise ValueError(
                f"draft_slots must be of the drafter's kv_owner {limits.kv_owner!r}, got {owner!r}"
            )
        offsets = tuple(_take_per_node(f"draft_slots[{owner!r}]", offsets, size))
        used = take_ints("draft_slots", [offset for offset in offsets if offset is not None])
        if len(set(used)) < len(used) or not all(1 <= slot <= limits.num_slots for slot in used):
            raise ValueError(
                f"draft_slots must be None or in [1, {limits.num_slots}], each slot once, "
                f"got {offsets}"
            )
        taken = iter(used)
        own[owner] = tuple(None if offset is None else next(taken) for offset in offsets)
    return own
