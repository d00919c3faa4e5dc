import pytest

from folospec.core import Block, PrefixCache, hash_block


def chain(*blocks: list[int]) -> list[bytes]:
    hashes: list[bytes] = []
    for tokens in blocks:
        hashes.append(hash_block(hashes[-1] if hashes else None, tokens))
    return hashes


def test_hash_depends_on_everything_before_the_block() -> None:
    assert chain([1, 2], [3, 4])[1] != chain([1, 9], [3, 4])[1]


def test_hash_depends_on_order_and_on_block_borders() -> None:
    assert chain([1, 2]) != chain([2, 1])
    assert chain([1], [2])[-1] != chain([1, 2])[-1]


def test_hash_is_the_same_in_every_process() -> None:
    assert hash_block(None, [1, 2, 3]).hex() == "20e6940ce341efc8b45db2e362c7ce61"


def test_lookup_stops_at_the_first_block_that_is_missing() -> None:
    cache, hashes = PrefixCache(), chain([1], [2], [3])
    blocks = [Block(i) for i in range(3)]
    cache.insert(hashes[0], blocks[0])
    cache.insert(hashes[2], blocks[2])
    assert cache.lookup(hashes) == [blocks[0]]


def test_insert_keeps_the_first_of_two_equal_blocks() -> None:
    cache, (block_hash,) = PrefixCache(), chain([1])
    first, second = Block(0), Block(1)
    assert cache.insert(block_hash, first)
    assert not cache.insert(block_hash, second)
    assert second.block_hash is None
    assert cache.lookup([block_hash]) == [first]


def test_an_evicted_block_is_not_found_again() -> None:
    cache, (block_hash,) = PrefixCache(), chain([1])
    block = Block(0)
    cache.insert(block_hash, block)
    cache.evict(block)
    assert cache.lookup([block_hash]) == []
    assert block.block_hash is None


def test_check_catches_a_block_that_lost_its_hash() -> None:
    cache, block = PrefixCache(), Block(0)
    cache.insert(b"x", block)
    block.block_hash = None
    with pytest.raises(AssertionError, match="does not carry the hash"):
        cache.check([block])


def test_check_catches_a_hash_that_is_not_in_the_cache() -> None:
    with pytest.raises(AssertionError, match="not in the cache"):
        PrefixCache().check([Block(0, block_hash=b"x")])
