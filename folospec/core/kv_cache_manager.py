"""Gives sequences the blocks for their KV, and takes back what they do not keep.

One block table per sequence serves the target and every drafter that keeps KV. Here is a step of a
sequence with 7 tokens, n = 6 of them computed, and a draft of 3 nodes; block_size is 4:

    block_table     9               2               5
                +---------------+---------------+---------------+
    slots       | 36  37  38  39|  8   9  10  11| 20  21  22  23|
    contents    | t0  t1  t2  t3| t4  t5  t6  d0| d1  d2        |
                +---------------+---------------+---------------+
                  '---- computed ----'  |   '-- draft --'
                                      root: the last committed token, at slot(n)

    slot(i) = block_table[i // 4] * 4 + i % 4

    allocate_slots(seq, 4)  slots n..n+3 become ours alone: new blocks past the end of the table,
                            a copy in place of a block that others hold too (copy-on-write)
    -- the target runs; the verdict: no draft token accepted, the next token is t7 --
    seq.add_token_id(t7)
    commit(seq, 7)          t6 is computed too; had d0 been accepted, it would be commit(seq, 8),
                            and block 2, full of committed tokens, would enter the prefix cache
    rollback(seq)           t7 will take d0's slot; block 5 holds no committed token and is freed
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from folospec.core.block_pool import Block, BlockPool
from folospec.core.prefix_cache import PrefixCache
from folospec.core.sequence import Sequence
from folospec.core.stats import PrefixCacheStats


class BlockCopy(NamedTuple):
    """Copy all slots of block `src` to block `dst`, in the KV of the target and the drafters.

    To be done before the step writes anything: in order, or all reads before all writes.
    """

    src: int
    dst: int


class KVCacheManager:
    """The blocks of one engine.

    A step costs in proportion to the blocks it touches, not to the length of the context; only
    `admit`, `fork` and `free` walk the block table.

    Raises:
        ValueError: `num_blocks` or `block_size` is not a positive integer.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = False
    ) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be an integer of at least 1, got {block_size!r}")
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.stats = PrefixCacheStats()
        self._cache = PrefixCache()
        self._pool = BlockPool(num_blocks, on_evict=self._cache.evict)

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        return self._pool.num_free

    def blocks(self, seq: Sequence) -> list[Block]:
        """The blocks of a sequence in the order of its table, to look at."""
        return [self._pool[block_id] for block_id in seq.block_table]

    # Admission ------------------------------------------------------------------------------------

    def cached_blocks(self, seq: Sequence, *, use_cache: bool = True) -> list[Block]:
        """The longest cached prefix of the sequence that leaves at least one token to compute.
        Changes nothing.
        """
        if not (use_cache and self.enable_prefix_caching):
            return []
        num_blocks = (seq.num_tokens - 1) // self.block_size
        return self._cache.lookup(seq.block_hashes(self.block_size, num_blocks))

    def can_admit(self, seq: Sequence, *, use_cache: bool = True) -> bool:
        """Whether the free blocks are enough for all tokens of a sequence that has no blocks."""
        cached = self.cached_blocks(seq, use_cache=use_cache)
        num_new = self._num_blocks(seq.num_tokens) - len(cached)
        num_free_hits = sum(block.ref_cnt == 0 for block in cached)
        return num_new + num_free_hits <= self.num_free_blocks

    def admit(self, seq: Sequence, *, use_cache: bool = True) -> int:
        """Give a sequence its cached prefix; it holds blocks here from now on, until `free`.

        Sets `kv`, `block_table`, `num_computed_tokens`, and for each drafter the number of leading
        tokens for which every cached block has its KV too. With `use_cache` False, or caching off,
        it starts from nothing.

        Returns:
            the number of tokens whose KV was found.

        Raises:
            ValueError: the sequence is admitted already, or finished.
        """
        if seq.kv is not None or seq.status.is_finished:
            raise ValueError(
                f"only an unfinished sequence without blocks can be admitted, got {seq!r}"
            )
        cached = self.cached_blocks(seq, use_cache=use_cache)
        for block in cached:
            self._pool.retain(block)
        seq.kv = self
        seq.block_table = [block.block_id for block in cached]
        seq.num_computed_tokens = len(cached) * self.block_size
        seq.draft_progress = self._owned_prefix(cached)
        if use_cache and self.enable_prefix_caching:
            self.stats.queries += seq.num_tokens
            self.stats.hits += seq.num_computed_tokens
        return seq.num_computed_tokens

    # A step ---------------------------------------------------------------------------------------

    def num_blocks_needed(self, seq: Sequence, num_slots: int) -> int:
        """Free blocks that `allocate_slots(seq, num_slots)` would take."""
        first, stop = self._touched(seq, num_slots)
        blocks, table = self._pool.blocks, seq.block_table
        num_needed = max(0, stop - max(first, len(table)))
        for block_id in table[first:stop]:
            num_needed += blocks[block_id].ref_cnt > 1
        return num_needed

    def can_allocate(self, seq: Sequence, num_slots: int) -> bool:
        return self.num_blocks_needed(seq, num_slots) <= self.num_free_blocks

    def allocate_slots(self, seq: Sequence, num_slots: int) -> list[BlockCopy] | None:
        """Make positions [n, n + num_slots) addressable, in blocks that are ours alone.

        n is `num_computed_tokens`. A shared block among them is replaced by a new one, with a copy
        if it has computed rows. A block that is only ours but in the prefix cache leaves the cache,
        since its contents are about to change.

        Returns:
            the copies to make before anything is written; or None, with nothing changed, if there
            are not enough blocks.
        """
        if not self.can_allocate(seq, num_slots):
            return None
        first, stop = self._touched(seq, num_slots)
        copies = []
        for index in range(first, min(stop, len(seq.block_table))):
            copy = self._make_private(seq, index)
            if copy is not None:
                copies.append(copy)
        for _ in range(len(seq.block_table), stop):
            seq.block_table.append(self._pool.allocate().block_id)
        return copies

    def commit(self, seq: Sequence, num_computed_tokens: int) -> None:
        """Advance to `num_computed_tokens`; blocks full of committed tokens enter the prefix cache.

        The tokens must have been added before, and their KV must lie at their slots.

        Raises:
            ValueError: it would go backwards, past the last token, or past the last slot.
        """
        low = seq.num_computed_tokens
        high = min(seq.num_tokens, len(seq.block_table) * self.block_size)
        if not low <= num_computed_tokens <= high:
            raise ValueError(
                f"num_computed_tokens must be in [{low}, {high}], "
                f"got {num_computed_tokens} for {seq!r}"
            )
        seq.num_computed_tokens = num_computed_tokens
        if self.enable_prefix_caching:
            stop = num_computed_tokens // self.block_size
            hashes = (
                seq.block_hashes(self.block_size, stop) if stop > low // self.block_size else []
            )
            for index in range(low // self.block_size, stop):
                block = self._pool[seq.block_table[index]]
                if block.block_hash is None:
                    self._cache.insert(hashes[index], block)

    def rollback(self, seq: Sequence) -> None:
        """Free the blocks past the last committed token, where only rejected draft nodes were."""
        keep = self._num_blocks(seq.num_tokens)
        if keep < len(seq.block_table):
            surplus = seq.block_table[keep:]
            del seq.block_table[keep:]
            self._pool.release(self._pool[block_id] for block_id in reversed(surplus))
        for owner, progress in seq.draft_progress.items():
            seq.draft_progress[owner] = min(progress, seq.num_tokens)

    def mark_draft(self, seq: Sequence, owner: str, num_tokens: int) -> None:
        """Note that a drafter's KV is computed for the first `num_tokens` tokens.

        Each full block among them is marked as the owner's, which a later prefix hit will see.

        Raises:
            ValueError: there are not so many tokens or slots.
        """
        high = min(seq.num_tokens, len(seq.block_table) * self.block_size)
        if not 0 <= num_tokens <= high:
            raise ValueError(f"num_tokens must be in [0, {high}], got {num_tokens} for {seq!r}")
        start = seq.draft_progress.get(owner, 0) // self.block_size
        seq.draft_progress[owner] = num_tokens
        for index in range(start, num_tokens // self.block_size):
            self._pool[seq.block_table[index]].owners.add(owner)

    # Forks and ends -------------------------------------------------------------------------------

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Share every block of `parent` with `child`; used by `Sequence.fork`."""
        for block in self.blocks(parent):
            self._pool.retain(block)
        child.kv = self
        child.block_table = list(parent.block_table)
        child.num_computed_tokens = parent.num_computed_tokens
        child.draft_progress = dict(parent.draft_progress)

    def take_over(self, seq: Sequence, draft: Sequence) -> None:
        """Hand the blocks and the progress of `draft` to `seq`; used by `Sequence.merge`.

        What lies past the tokens of `seq` is freed, and the draft is left without blocks. If its KV
        is behind that of `seq`, `seq` keeps its own.
        """
        if draft.num_computed_tokens >= seq.num_computed_tokens:
            seq.block_table, draft.block_table = draft.block_table, seq.block_table
            seq.num_computed_tokens = min(draft.num_computed_tokens, seq.num_tokens)
            seq.draft_progress = dict(draft.draft_progress)
        self.free(draft)
        self.rollback(seq)

    def free(self, seq: Sequence) -> None:
        """Release all blocks of a sequence: it is finished or preempted, its tokens stay.

        Tail first, so that of the cached blocks the beginnings, which more prompts share, live
        longest.
        """
        self._pool.release(self._pool[block_id] for block_id in reversed(seq.block_table))
        seq.block_table = []
        seq.num_computed_tokens = 0
        seq.draft_progress = {}
        seq.kv = None

    # Addresses ------------------------------------------------------------------------------------

    def slot(self, seq: Sequence, index: int) -> int:
        """Where row `index` of the sequence lives in every KV tensor of it."""
        return seq.block_table[index // self.block_size] * self.block_size + index % self.block_size

    def slots(self, seq: Sequence, start: int, stop: int) -> list[int]:
        """The slots of rows [start, stop)."""
        size, table = self.block_size, seq.block_table
        return [table[i // size] * size + i % size for i in range(start, stop)]

    # Checks ---------------------------------------------------------------------------------------

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Account for every block, given all sequences that hold any.

        Raises:
            AssertionError: a reference count differs from the number of tables that hold the block,
                a block is twice in one table, free + held is not the whole pool, the prefix cache
                and the blocks disagree, or a sequence has more computed tokens than tokens or
                slots.
        """
        sequences = list(sequences)
        self._pool.check()
        self._cache.check(self._pool.blocks)
        counts: Counter[int] = Counter()
        for seq in sequences:
            self._check_sequence(seq)
            counts.update(seq.block_table)
        for block in self._pool.blocks:
            if block.ref_cnt != counts[block.block_id]:
                raise AssertionError(
                    f"block {block.block_id} has ref_cnt {block.ref_cnt}, "
                    f"but {counts[block.block_id]} block tables hold it"
                )

    def _check_sequence(self, seq: Sequence) -> None:
        if len(set(seq.block_table)) != len(seq.block_table):
            raise AssertionError(f"a block is twice in one block table: {seq!r}")
        progress = max([seq.num_computed_tokens, *seq.draft_progress.values()])
        if progress > min(seq.num_tokens, len(seq.block_table) * self.block_size):
            raise AssertionError(
                f"{progress} computed tokens are more than there are tokens or slots: {seq!r}"
            )
        num_full = seq.num_computed_tokens // self.block_size
        hashes = seq.block_hashes(self.block_size, num_full) if self.enable_prefix_caching else []
        for block, block_hash in zip(self.blocks(seq), hashes, strict=False):
            if block.block_hash not in (None, block_hash):
                raise AssertionError(
                    f"block {block.block_id} is cached under other tokens than it holds: {seq!r}"
                )

    # Helpers --------------------------------------------------------------------------------------

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _touched(self, seq: Sequence, num_slots: int) -> tuple[int, int]:
        """The range of table indices that rows [n, n + num_slots) fall into."""
        n = seq.num_computed_tokens
        first = n // self.block_size
        return first, (self._num_blocks(n + num_slots) if num_slots > 0 else first)

    def _make_private(self, seq: Sequence, index: int) -> BlockCopy | None:
        block = self._pool[seq.block_table[index]]
        if block.ref_cnt == 1 and block.block_hash is None and not block.owners:
            return None
        end = (index + 1) * self.block_size
        # A drafter that is past this block has its rows here for tokens that stay, whatever the
        # target writes.
        owners = {owner for owner in block.owners if seq.draft_progress.get(owner, 0) >= end}
        if block.ref_cnt == 1:
            self._cache.evict(block)
            block.owners = owners
            return None
        new = self._pool.allocate()
        new.owners = owners
        self._pool.release([block])
        seq.block_table[index] = new.block_id
        # Rows are worth a copy if the target or a drafter has computed any of them.
        num_computed = max([seq.num_computed_tokens, *seq.draft_progress.values()])
        return (
            BlockCopy(block.block_id, new.block_id)
            if index * self.block_size < num_computed
            else None
        )

    def _owned_prefix(self, blocks: list[Block]) -> dict[str, int]:
        progress: dict[str, int] = {}
        owners = set(blocks[0].owners) if blocks else set()
        for index, block in enumerate(blocks):
            owners &= block.owners
            for owner in owners:
                progress[owner] = (index + 1) * self.block_size
        return progress
