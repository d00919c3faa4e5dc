"""Carries one sequence's part of one step through the stages.

    schedule   seq, start, num_tokens, num_draft_slots
    propose    proposal, and its tree
    execute    first_row, logits_indices, prompt_logits_indices
    verify     verdicts: the accepted path and the next token
    commit     accepted_path, new_token_ids, siblings

Each stage fills its fields and reads those of the stages before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from folospec.core.sequence import Sequence, SequenceGroup
from folospec.core.token_tree import EMPTY_TREE, TokenTree, Verdict


@dataclass(slots=True)
class SequenceStep:
    """Committed tokens [start, start + num_tokens), then the nodes of the tree."""

    seq: Sequence
    start: int
    """Computed tokens before the step."""
    num_tokens: int
    """Committed tokens that run in the step."""
    num_draft_slots: int = 0
    """Slots reserved for draft nodes behind them; 0 unless the last token alone runs."""
    proposal: Any = None
    """What was drafted, a `spec.proposal.Proposal`; nothing in `core` reads it."""
    tree: TokenTree = EMPTY_TREE
    """The draft tokens behind the last token: the proposal's, or a chain that the target has
    decoded by itself."""
    first_row: int = 0
    """Of its rows among the packed rows of the step."""
    logits_indices: range = range(0)
    """Its rows of logits, root first; none if the last token is not among the step's tokens."""
    wants_all_logits: bool = False
    """Logits are wanted of every committed token too, for the logprobs of a prompt."""
    prompt_logits_indices: range = range(0)
    """Then the rows of logits of the step's tokens."""
    num_draws: int = 1
    """Tokens that are drawn from the root's row: more than one where siblings are forked."""
    verdicts: list[Verdict] | None = None
    """One for each draw, the sequence's own first."""
    accepted_path: list[int] = field(default_factory=list)
    """The accepted nodes whose tokens were appended."""
    new_token_ids: list[int] = field(default_factory=list)
    """The tokens that were appended to the sequence."""
    siblings: list[Sequence] = field(default_factory=list)
    """Sequences that were forked off in this step."""

    @property
    def group(self) -> SequenceGroup:
        """The request that the sequence belongs to."""
        assert self.seq.group is not None
        return self.seq.group

    @property
    def samples(self) -> bool:
        """Whether the step ends with the last token, so that a next one can be drawn."""
        return self.start + self.num_tokens == self.seq.num_tokens

    @property
    def verdict(self) -> Verdict | None:
        """Of the sequence itself; None where nothing was verified."""
        return self.verdicts[0] if self.verdicts else None

    @property
    def committed_rows(self) -> list[int]:
        """The packed rows of the step whose tokens are committed after it."""
        end = self.first_row + self.num_tokens
        return [*range(self.first_row, end), *(end + node for node in self.accepted_path)]
