"""Fork a sequence, draft on the fork, verify, and merge what was accepted: tokens, then KV blocks.

Run: python examples/03_fork_draft_verify_merge.py
"""

from folospec.core import KVCacheManager, Sequence

GUESSES = [100, 101, 102]


def verify(draft: Sequence) -> list[bool]:
    """Stands for the target model: it agrees with the first two guesses only."""
    return [token_id in (100, 101) for token_id in draft.output_token_ids]


def count_accepted(verdict: list[bool]) -> int:
    """Guesses up to the first that was rejected."""
    return verdict.index(False) if False in verdict else len(verdict)


def tokens_alone() -> None:
    original = Sequence(seq_id="main", prompt_token_ids=[1, 2, 3])
    draft = original.fork("draft")
    for token_id in GUESSES:
        draft.add_token_id(token_id)
    original.merge(draft, num_accepted=count_accepted(verify(draft)))
    print("tokens alone:", original.token_ids)


def with_kv_blocks() -> None:
    manager = KVCacheManager(num_blocks=8, block_size=4)
    original = Sequence(seq_id="main", prompt_token_ids=[1, 2, 3])
    manager.admit(original)
    manager.allocate_slots(original, num_slots=3)
    manager.commit(original, num_computed_tokens=3)  # the target has computed the prompt
    print("main        ", original.block_table)

    draft = original.fork("draft")
    print("draft shares", draft.block_table)
    for token_id in GUESSES:
        draft.add_token_id(token_id)
    copies = manager.allocate_slots(draft, num_slots=3)
    print("draft writes", draft.block_table, copies)  # copy-on-write: main's block stays as it was
    verdict = verify(draft)
    manager.commit(draft, num_computed_tokens=6)  # the target has computed the guesses too

    original.merge(draft, num_accepted=count_accepted(verdict))
    print("main merged ", original.block_table, original.token_ids)
    manager.check_integrity([original])  # the draft holds nothing, every block is accounted for
    print("free blocks ", manager.num_free_blocks, "of", manager.num_blocks)


if __name__ == "__main__":
    tokens_alone()
    with_kv_blocks()
