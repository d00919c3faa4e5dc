"""The prompts of a comparison, round by round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.lib.chat_tasks import CHAT_TASKS
from benchmarks.lib.tasks import make_task
from benchmarks.peers.checkpoints import has_draft, hf_checkpoint
from benchmarks.peers.contest import Cell
from folospec.models.loader import load_tokenizer

MAX_MODEL_LEN = 1024
TASKS = ("completion", "editing")
CHAT = ("chat", "code", "file_editing")


@dataclass(frozen=True, slots=True)
class Rounds:
    """What a cell completes."""

    prompts: list[list[list[int]]]
    """Token ids, by round; those of the warm-up first."""
    max_tokens: int
    """New tokens of each."""

    @property
    def longest(self) -> int:
        """Most tokens of a prompt and its output."""
        return max(len(ids) for part in self.prompts for ids in part) + self.max_tokens


def default_tasks(checkpoint: str) -> Sequence[str]:
    """Conversations for a chat model, and code for those that know nothing else."""
    return TASKS if has_draft(checkpoint) else CHAT


def make_rounds(
    checkpoint: str, tasks: Sequence[str], batches: Sequence[int], rounds: int, max_tokens: int
) -> dict[tuple[str, int], Rounds]:
    """The rounds of every task and batch size.

    Args:
        rounds: timed ones, to which the warm-up comes.
        max_tokens: at most; a task of `chat_tasks` has its own number, behind which a model would
            go on after its end.

    Raises:
        ValueError: a task has not as many prompts, or one is too long.
    """
    tokenizer = load_tokenizer(str(hf_checkpoint(checkpoint)))
    found = {}
    for task in tasks:
        for batch in batches:
            size = Cell(task, 0.0, batch).num_prompts
            items = make_task(task, tokenizer, size * (rounds + 1), max_tokens).items
            count = items[0].max_tokens if task in CHAT_TASKS else max_tokens
            prompts = [item.prompt_token_ids for item in items]
            parts = [prompts[i : i + size] for i in range(0, len(prompts), size)]
            found[task, batch] = own = Rounds(parts, count)
            if own.longest > MAX_MODEL_LEN:
                raise ValueError(
                    f"max_tokens must fit in {MAX_MODEL_LEN} tokens with a prompt of "
                    f"{own.longest - count}, got {max_tokens}"
                )
    return found
