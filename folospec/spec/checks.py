"""What the engine demands of a proposal before it runs it: a drafter may be wrong, but must not
write where it may not, nor say what cannot be judged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from folospec.spec.verify import AcceptanceRule

if TYPE_CHECKING:
    from folospec.spec.drafters.base import DraftRow
    from folospec.spec.proposal import Proposal


def check_answer(
    row: DraftRow, proposal: Proposal | None, rule: AcceptanceRule, vocab_size: int
) -> None:
    """Refuse an answer to `row` that cannot be served.

    Raises:
        ValueError: the row's progress, or the proposal's size, slots, tokens or laws are out of
            bounds; or it is a tree and the rule judges chains.
    """
    known = len(row.token_ids)
    if not 0 <= row.num_draft_computed <= known:
        raise ValueError(
            f"num_draft_computed must be in [0, {known}], got {row.num_draft_computed}"
        )
    if proposal is None:
        return
    _check_sizes(row, proposal)
    for token_id in proposal.tree.token_ids:
        if token_id >= vocab_size:
            raise ValueError(f"draft token ids must be below {vocab_size}, got {token_id}")
    if not rule.takes_trees and not proposal.tree.is_chain:
        raise ValueError(
            "acceptance='block' judges chains, got a tree; use 'coupled' or 'rejection'"
        )
    if not rule.shares_noise:
        _check_laws(proposal, vocab_size)


def _check_sizes(row: DraftRow, proposal: Proposal) -> None:
    if proposal.num_draft_tokens > row.max_draft_tokens:
        raise ValueError(
            f"at most {row.max_draft_tokens} draft tokens were allowed, "
            f"got {proposal.num_draft_tokens}"
        )
    if len(proposal) > row.num_slots:
        raise ValueError(f"at most {row.num_slots} nodes were allowed, got {len(proposal)}")
    for offsets in proposal.draft_slots.values():
        for offset in offsets:
            if offset is not None and not 1 <= offset <= row.num_slots:
                raise ValueError(
                    f"draft_slots must be None or in [1, {row.num_slots}], got {offset}"
                )


def _check_laws(proposal: Proposal, vocab_size: int) -> None:
    law = proposal.draft_probs
    if law is None:
        return
    if law.shape[1] != vocab_size:
        raise ValueError(f"draft_probs must cover {vocab_size} tokens, got {law.shape[1]}")
    if not bool((law >= 0).all()) or not bool(law.isfinite().all()):
        raise ValueError("draft_probs must be finite and at least 0")
