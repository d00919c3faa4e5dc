"""Holds a drafter, and reads and checks once what the drafter says of itself.

That is when the engine is made: nothing that it says later, or fails to say, can surprise a step.
"""

from __future__ import annotations

from dataclasses import dataclass

from folospec.spec.drafters.base import Drafter, DrafterNeeds, check_count
from folospec.spec.guarded_runner import RunnerAccess
from folospec.speculative_config import DrafterConfig


@dataclass(frozen=True, slots=True, eq=False)
class DrafterHandle:
    """A drafter and its facts; see the properties of `Drafter`."""

    drafter: Drafter
    name: str
    """In this engine, where each name is there once."""
    config: DrafterConfig
    num_speculative_tokens: int
    max_scratch_slots: int
    needs: DrafterNeeds
    kv_owner: str | None
    drafts_in_passes: bool
    has_static_tree: bool
    access: RunnerAccess
    """To the models that it has loaded."""


def hold(
    drafter: object, name: str, config: DrafterConfig, access: RunnerAccess, num_layers: int
) -> DrafterHandle:
    """Read a drafter's facts.

    Args:
        access: to the models that this drafter has loaded.
        num_layers: of the target.

    Raises:
        ValueError: it is no `Drafter`, or a fact is out of range.
    """
    if not isinstance(drafter, Drafter):
        raise ValueError(f"{name} must be built as a Drafter, got a {type(drafter).__name__}")
    handle = DrafterHandle(
        drafter=drafter,
        name=name,
        config=config,
        num_speculative_tokens=drafter.num_speculative_tokens,
        max_scratch_slots=drafter.max_scratch_slots,
        needs=drafter.needs,
        kv_owner=drafter.kv_owner,
        drafts_in_passes=drafter.drafts_in_passes,
        has_static_tree=drafter.has_static_tree,
        access=access,
    )
    check_count(f"num_speculative_tokens of {name}", handle.num_speculative_tokens)
    check_count(f"max_scratch_slots of {name}", handle.max_scratch_slots, least=0)
    for fact in ("drafts_in_passes", "has_static_tree"):
        if not isinstance(getattr(handle, fact), bool):
            raise ValueError(
                f"{fact} of {name} must be True or False, got {getattr(handle, fact)!r}"
            )
    if handle.kv_owner is not None and handle.kv_owner not in access.kv_owners:
        raise ValueError(
            f"kv_owner of {name} must be None or a name under which it has loaded a model, "
            f"{sorted(access.kv_owners)}, got {handle.kv_owner!r}"
        )
    _check_needs(handle.needs, name, num_layers)
    return handle


def _check_needs(needs: object, name: str, num_layers: int) -> None:
    if not isinstance(needs, DrafterNeeds):
        raise ValueError(f"needs of {name} must be a DrafterNeeds, got a {type(needs).__name__}")
    layers = needs.aux_hidden_state_layers
    ok = isinstance(layers, tuple) and all(type(layer) is int for layer in layers)
    if not ok or not all(0 <= layer <= num_layers for layer in layers):
        raise ValueError(
            f"aux_hidden_state_layers of {name} must be a tuple of integers in 0..{num_layers}, "
            f"got {layers!r}"
        )
    check_count(f"num_top_tokens of {name}", needs.num_top_tokens, least=0)
    if not isinstance(needs.prediction, bool):
        raise ValueError(f"prediction of {name} must be True or False, got {needs.prediction!r}")
