"""Collects which rows of KV move to other slots when a step is committed."""

from __future__ import annotations

from collections.abc import Sequence


class KVMoves:
    """What a step moves, collected over its sequences and made at once: their draft rows are in
    blocks of their own, so that no move reads what another one writes."""

    def __init__(self) -> None:
        self.of_owner: dict[str, tuple[list[int], list[int]]] = {}
        """By owner of KV: the slots that rows are in, and those that they go to."""

    def add(self, owner: str, source_slots: Sequence[int], target_slots: Sequence[int]) -> None:
        """Move these rows of an owner's KV, later."""
        sources, targets = self.of_owner.setdefault(owner, ([], []))
        sources.extend(source_slots)
        targets.extend(target_slots)
