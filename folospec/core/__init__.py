"""Keeps track of sequences, blocks and what runs next; it never imports torch."""

from folospec.core.block_pool import Block, BlockPool
from folospec.core.kv_cache_manager import BlockCopy, KVCacheManager
from folospec.core.prefix_cache import PrefixCache, hash_block
from folospec.core.scheduler import Scheduler, SchedulerOutput
from folospec.core.sequence import Sequence, SequenceGroup, SequenceStatus
from folospec.core.sequence_step import SequenceStep
from folospec.core.stats import EngineStats, PrefixCacheStats
from folospec.core.token_tree import TokenTree, Verdict

__all__ = [
    "Block",
    "BlockCopy",
    "BlockPool",
    "EngineStats",
    "KVCacheManager",
    "PrefixCache",
    "PrefixCacheStats",
    "Scheduler",
    "SchedulerOutput",
    "Sequence",
    "SequenceGroup",
    "SequenceStatus",
    "SequenceStep",
    "TokenTree",
    "Verdict",
    "hash_block",
]
