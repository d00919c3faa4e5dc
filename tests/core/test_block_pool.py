import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from folospec.core import Block, BlockPool


def test_allocate_gives_every_block_once() -> None:
    pool = BlockPool(5)
    assert {pool.allocate().block_id for _ in range(5)} == set(range(5))
    assert pool.num_free == 0


def test_allocate_without_a_free_block_is_refused() -> None:
    pool = BlockPool(1)
    pool.allocate()
    with pytest.raises(RuntimeError, match="all 1 blocks are held"):
        pool.allocate()


def test_a_block_is_free_when_its_last_holder_lets_go() -> None:
    pool = BlockPool(1)
    block = pool.allocate()
    pool.retain(block)
    pool.release([block])
    assert pool.num_free == 0
    pool.release([block])
    assert pool.num_free == 1


def test_releasing_a_free_block_is_refused() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    pool.release([block])
    with pytest.raises(RuntimeError, match="nobody holds it"):
        pool.release([block])


def test_blocks_without_a_hash_are_taken_before_cached_ones() -> None:
    pool = BlockPool(3)
    cached, plain = pool.allocate(), pool.allocate()
    cached.block_hash = b"x"
    pool.release([cached, plain])
    assert pool.allocate() is plain


def test_blocks_never_taken_are_taken_before_cached_ones() -> None:
    pool = BlockPool(2)
    cached = pool.allocate()
    cached.block_hash = b"x"
    pool.release([cached])
    assert pool.allocate() is not cached
    assert pool.allocate() is cached


def test_blocks_that_are_never_taken_cost_nothing() -> None:
    pool = BlockPool(10**12)
    blocks = [pool.allocate(), pool.allocate()]
    assert pool.blocks == blocks
    assert pool.num_free == 10**12 - 2
    pool.release(blocks)
    pool.check()
    assert pool.num_free == 10**12


def test_cached_blocks_are_evicted_least_recently_used_first() -> None:
    evicted: list[int] = []
    pool = BlockPool(3, on_evict=lambda block: evicted.append(block.block_id))
    blocks = [pool.allocate() for _ in range(3)]
    for i, block in enumerate(blocks):
        block.block_hash = bytes([i])
    pool.release([blocks[2], blocks[0], blocks[1]])
    pool.retain(blocks[2])  # used again
    pool.release([blocks[2]])
    for _ in range(3):
        pool.allocate()
    assert evicted == [blocks[0].block_id, blocks[1].block_id, blocks[2].block_id]


def test_a_block_taken_again_has_forgotten_hash_and_owners() -> None:
    pool = BlockPool(1)
    block = pool.allocate()
    block.block_hash, block.owners = b"x", {"drafter"}
    pool.release([block])
    again = pool.allocate()
    assert again.block_hash is None
    assert again.owners == set()


@pytest.mark.parametrize("num_blocks", [0, -3])
def test_a_pool_without_blocks_is_refused(num_blocks: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1, got {num_blocks}"):
        BlockPool(num_blocks)


@pytest.mark.parametrize(("ref_cnt", "words"), [(1, "but in the free"), (-1, "ref_cnt -1")])
def test_check_catches_a_wrong_reference_count(ref_cnt: int, words: str) -> None:
    pool = BlockPool(3)
    block = pool.allocate()
    pool.release([block])
    block.ref_cnt = ref_cnt
    with pytest.raises(AssertionError, match=words):
        pool.check()


def test_check_catches_a_held_block_that_was_lost() -> None:
    pool = BlockPool(3)
    pool.allocate().ref_cnt = 0
    with pytest.raises(AssertionError, match="missing from"):
        pool.check()


class PoolMachine(RuleBasedStateMachine):
    """Any order of allocate, retain, cache and release, against a dict of reference counts."""

    def __init__(self) -> None:
        super().__init__()
        self.evicted: list[Block] = []
        self.pool = BlockPool(4, on_evict=self.evicted.append)
        self.counts: dict[int, int] = {}
        self.free_cached: list[int] = []

    @precondition(lambda self: len(self.counts) < 4)
    @rule()
    def allocate(self) -> None:
        num_plain = 4 - len(self.counts) - len(self.free_cached)
        self.evicted.clear()
        block = self.pool.allocate()
        assert block.block_id not in self.counts
        if num_plain > 0:
            assert not self.evicted
        else:
            assert [b.block_id for b in self.evicted] == [self.free_cached.pop(0)]
        assert block.block_hash is None
        self.counts[block.block_id] = 1

    @rule(block_id=st.integers(0, 3))
    def retain(self, block_id: int) -> None:
        if block_id in self.counts or block_id in self.free_cached:
            self.pool.retain(self.pool[block_id])
            self.counts[block_id] = self.counts.get(block_id, 0) + 1
            if block_id in self.free_cached:
                self.free_cached.remove(block_id)

    @rule(block_id=st.integers(0, 3))
    def cache(self, block_id: int) -> None:
        if block_id in self.counts:
            self.pool[block_id].block_hash = bytes([block_id])

    @rule(block_id=st.integers(0, 3))
    def release(self, block_id: int) -> None:
        if block_id not in self.counts:
            return
        self.pool.release([self.pool[block_id]])
        self.counts[block_id] -= 1
        if self.counts[block_id] == 0:
            del self.counts[block_id]
            if self.pool[block_id].block_hash is not None:
                self.free_cached.append(block_id)

    @invariant()
    def counts_agree(self) -> None:
        self.pool.check()
        assert self.pool.num_free == 4 - len(self.counts)
        assert {b.block_id: b.ref_cnt for b in self.pool.blocks if b.ref_cnt} == self.counts


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
