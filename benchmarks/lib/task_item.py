"""One request of a task, as `tasks` and `chat_tasks` make them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Item:
    """One request of a task; what is expected is known for edits only."""

    prompt_token_ids: list[int]
    max_tokens: int
    expected_token_ids: Sequence[int] = ()
    prediction_token_ids: Sequence[int] = ()
    """What the caller would send along: the rest of the original, as it was before the edit."""
