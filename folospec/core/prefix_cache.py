"""Finds the blocks that already hold the KV of a token prefix.

A full block is known by a chained hash: its own tokens and the hash of the block before it, so
equal hashes mean equal tokens from position 0 on. The hash covers tokens only; what else fills a
block must be a function of those tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from hashlib import blake2b

from folospec.core.block_pool import Block

_DIGEST_SIZE = 16


def hash_block(parent: bytes | None, token_ids: Iterable[int]) -> bytes:
    """16 bytes of BLAKE2b over the parent's hash (None for the first block) and the token ids."""
    content = (parent or bytes(_DIGEST_SIZE)) + array("q", token_ids).tobytes()
    return blake2b(content, digest_size=_DIGEST_SIZE).digest()


class PrefixCache:
    """A map from block hashes to blocks; it holds no references, so cached blocks may be free."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, Block] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def lookup(self, block_hashes: Iterable[bytes]) -> list[Block]:
        """The blocks of the longest cached prefix of a chain of hashes."""
        found = []
        for block_hash in block_hashes:
            block = self._blocks.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def insert(self, block_hash: bytes, block: Block) -> bool:
        """Publish a full block; False, and nothing done, if another block has the same tokens."""
        if self._blocks.setdefault(block_hash, block) is not block:
            return False
        block.block_hash = block_hash
        return True

    def evict(self, block: Block) -> None:
        """Forget a block whose contents are about to change; if it is cached at all."""
        if block.block_hash is not None:
            del self._blocks[block.block_hash]
            block.block_hash = None

    def check(self, blocks: Iterable[Block]) -> None:
        """Raise AssertionError unless the map and the hashes written on the blocks say the same."""
        hashed = {block.block_hash: block for block in blocks if block.block_hash is not None}
        for block_hash, block in self._blocks.items():
            if hashed.get(block_hash) is not block:
                raise AssertionError(
                    f"cached block {block.block_id} does not carry the hash it is cached under"
                )
        for block_hash, block in hashed.items():
            if block_hash not in self._blocks:
                raise AssertionError(
                    f"block {block.block_id} carries a hash but is not in the cache"
                )
