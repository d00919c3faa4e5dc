"""Holds the KV blocks: counts who uses each, and chooses which free one is taken next.

A block with `ref_cnt` 0 is free. A free block that is still in the prefix cache keeps its contents
until it is taken: free blocks without a hash go first, then the cached ones, least recently used
first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Block:
    """One physical block of `block_size` slots, at the same place in every KV tensor.

    `ref_cnt` counts the block tables that hold it. `block_hash` is set while the prefix cache
    points here. `owners` names the drafters whose KV has been filled for every slot of the block.
    """

    block_id: int
    ref_cnt: int = 0
    block_hash: bytes | None = None
    owners: set[str] = field(default_factory=set)


class BlockPool:
    """A fixed number of blocks, each free or held. All operations are O(1) per block, and a pool as
    large as memory costs nothing to make: a block's record is made when it is first taken.

    `on_evict` is called with a cached block that is about to be taken for something else; after
    that it has no hash.

    Raises:
        ValueError: `num_blocks` is not a positive integer.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[Block], None] | None = None) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be an integer of at least 1, got {num_blocks!r}")
        self.num_blocks = num_blocks
        self.blocks: list[Block] = []
        """Those that were ever taken, by id; all others are free."""
        self._on_evict = on_evict
        # The free ones of `blocks`, without a hash in front, cached ones at the back. They are
        # taken from the front; blocks that were never taken go between the two kinds.
        self._free: OrderedDict[int, None] = OrderedDict()

    def __getitem__(self, block_id: int) -> Block:
        return self.blocks[block_id]

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, those with cached contents included."""
        return self.num_blocks - len(self.blocks) + len(self._free)

    def allocate(self) -> Block:
        """Take a free block, evicting the least recently used cached one if no other is left.

        Raises:
            RuntimeError: no block is free; callers look at `num_free` first.
        """
        if not self.num_free:
            raise RuntimeError(f"all {self.num_blocks} blocks are held")
        first = next(iter(self._free), None)
        if len(self.blocks) < self.num_blocks and (first is None or self.blocks[first].block_hash):
            self.blocks.append(Block(len(self.blocks), ref_cnt=1))
            return self.blocks[-1]
        block_id, _ = self._free.popitem(last=False)
        block = self.blocks[block_id]
        if block.block_hash is not None:
            if self._on_evict is not None:
                self._on_evict(block)
            block.block_hash = None
        block.owners.clear()
        block.ref_cnt = 1
        return block

    def retain(self, block: Block) -> None:
        """Hold a block once more; a free block (a prefix hit) stops being free."""
        if block.ref_cnt == 0:
            del self._free[block.block_id]
        block.ref_cnt += 1

    def release(self, blocks: Iterable[Block]) -> None:
        """Let go of the blocks, in the order in which cached ones are to be evicted.

        Raises:
            RuntimeError: a block is released that nobody holds.
        """
        for block in blocks:
            if block.ref_cnt < 1:
                raise RuntimeError(f"block {block.block_id} is released, but nobody holds it")
            block.ref_cnt -= 1
            if block.ref_cnt == 0:
                self._free[block.block_id] = None
                if block.block_hash is None:
                    self._free.move_to_end(block.block_id, last=False)

    def check(self) -> None:
        """Raise AssertionError if a block is both free and held, or neither."""
        for block in self.blocks:
            if block.ref_cnt < 0:
                raise AssertionError(f"block {block.block_id} has ref_cnt {block.ref_cnt}")
            if (block.ref_cnt == 0) != (block.block_id in self._free):
                where = "in" if block.block_id in self._free else "missing from"
                raise AssertionError(
                    f"block {block.block_id}: ref_cnt {block.ref_cnt}, but {where} the free list"
                )
        num_held = sum(block.ref_cnt > 0 for block in self.blocks)
        if num_held + self.num_free != self.num_blocks:
            raise AssertionError(f"{num_held} held + {self.num_free} free is not {self.num_blocks}")
