"""Keeps the suffix drafter's trees in native code: one call for all rows of a step.

There is no Python object for a node. See `cpu/suffix.h`; the Python form, which says what is
computed, is `spec.stores.suffix_index.SuffixIndex`.
"""

from __future__ import annotations

import ctypes
import struct
import weakref
from array import array
from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

from folospec.kernels import native
from folospec.kernels.checked import pack_ids

_RULES = struct.Struct("=qqddddq")
_ASK_FIELDS, _ANSWER_FIELDS = 4, 3
_POINTER, _COUNT = ctypes.c_void_p, ctypes.c_int64
_MOST = 2**31 - 1
"""More tokens than any text has."""
_MOST_STORED = 2**62
_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "sizes": (None, (_POINTER,)),
    "new": (_POINTER, (ctypes.c_char_p,)),
    "free": (None, (_POINTER,)),
    "add": (None, (_POINTER, _POINTER, _COUNT)),
    "drop": (None, (_POINTER, _COUNT)),
    "draft": (None, (_POINTER, _POINTER, _COUNT, *[_POINTER] * 5)),
    "stats": (None, (_POINTER, _POINTER)),
    "texts": (None, (_POINTER, _POINTER, _POINTER)),
}


class SuffixRules(NamedTuple):
    """What matches, and what may be drafted under a match. See the options of `SuffixDrafter`."""

    max_depth: int
    max_tokens: int
    spec_factor: float
    spec_offset: float
    min_joint: float
    min_score: float
    is_chain: bool


class SuffixAsk(NamedTuple):
    """A sequence that wants a draft."""

    seq_id: str
    token_ids: Sequence[int]
    """All it has; what was there at the last ask is not read again."""
    max_nodes: int
    max_depth: int


class SuffixDraft(NamedTuple):
    """The best draft for a sequence, at least a node."""

    token_ids: list[int]
    parents: list[int]
    ratios: list[float]
    """How often the token of each node, by how often any token and one more, followed the node
    above."""
    length: int
    """Tokens of the match that it continues."""
    source: str
    """Where that match is: in the sequence's own tree, "request", or in the "shared" one."""


class SuffixStats(NamedTuple):
    """The sizes of an index. Stored is what finished requests left; the rest is of all there is."""

    num_stored_requests: int
    num_stored_tokens: int
    num_stored_nodes: int
    num_evictions: int
    num_sequences: int
    num_tokens: int
    num_nodes: int
    num_bytes: int


class NativeSuffixIndex:
    """`spec.stores.suffix_index.SuffixIndex`, in the library's memory until this object goes.

    Args:
        library: with `cpu/suffix.h` in it.

    Raises:
        RuntimeError: the library lays the structs out in another way.
        ValueError: the rules allow no match.
    """

    def __init__(self, library: ctypes.CDLL, rules: SuffixRules) -> None:
        if rules.max_depth < 1 or rules.max_tokens < 0:
            raise ValueError(
                f"max_depth must be at least 1 and max_tokens 0, got {rules.max_depth} and "
                f"{rules.max_tokens}"
            )
        # Python's lock is kept: calls are short, and another thread may ask for figures.
        locked = ctypes.PyDLL(library._name, handle=library._handle)
        functions = {}
        for name, (result, arguments) in _SIGNATURES.items():
            functions[name] = getattr(locked, f"folospec_suffix_{name}")
            functions[name].restype, functions[name].argtypes = result, arguments
        sizes = (_COUNT * 3)()
        functions["sizes"](sizes)
        expected = [_RULES.size, 8 * _ASK_FIELDS, 8 * _ANSWER_FIELDS]
        if list(sizes) != expected:
            raise RuntimeError(f"the structs must have {expected} bytes, got {list(sizes)}")
        self._draft, self._add, self._drop = (functions[name] for name in ("draft", "add", "drop"))
        self._stats, self._texts = functions["stats"], functions["texts"]
        self._max_depth = min(rules.max_depth, _MOST)
        kept = min(rules.max_tokens, _MOST_STORED)
        self._index = functions["new"](_RULES.pack(self._max_depth, kept, *rules[2:]))
        weakref.finalize(self, functions["free"], self._index)
        self._numbers = count()
        self._sequences: dict[str, tuple[int, int]] = {}
        """The number that the library knows a sequence by, and how many of its tokens it has."""

    def draft(self, asks: Sequence[SuffixAsk]) -> list[SuffixDraft | None]:
        """Take in the new tokens of every sequence, and find the best draft for it.

        Raises:
            ValueError: a token id is no integer of 31 bits.
        """
        packed, tails, room = array("q"), array("i"), 0
        told = {}
        for seq_id, token_ids, max_nodes, max_depth in asks:
            number, num_known = self._sequences.get(seq_id) or (next(self._numbers), 0)
            new = token_ids[num_known:]
            tails.extend(_pack(new))
            packed.extend((number, len(new), max_nodes, min(max_depth, self._max_depth)))
            told[seq_id] = (number, num_known + len(new))
            room += max(max_nodes, 0)
        answers = array("q", bytes(8 * _ANSWER_FIELDS * len(asks)))
        ids, above = array("i", bytes(4 * room)), array("i", bytes(4 * room))
        ratios = array("d", bytes(8 * room))
        self._draft(
            self._index,
            packed.buffer_info()[0],
            len(asks),
            tails.buffer_info()[0],
            *(found.buffer_info()[0] for found in (answers, ids, above, ratios)),
        )
        self._sequences.update(told)
        drafts: list[SuffixDraft | None] = []
        end, fields = 0, iter(answers)
        for num_nodes, length, is_shared in zip(fields, fields, fields, strict=True):
            if num_nodes == 0:
                drafts.append(None)
                continue
            begin, end = end, end + num_nodes
            drafts.append(
                SuffixDraft(
                    ids[begin:end].tolist(),
                    above[begin:end].tolist(),
                    ratios[begin:end].tolist(),
                    length,
                    "shared" if is_shared else "request",
                )
            )
        return drafts

    def add(self, token_ids: Sequence[int]) -> None:
        """Keep a finished text, and let the least recently used go until all fit. Raises ValueError
        as `draft` does."""
        text = _pack(token_ids)
        self._add(self._index, text.buffer_info()[0], len(text))

    def drop(self, seq_id: str) -> None:
        """Forget a sequence."""
        if (known := self._sequences.pop(seq_id, None)) is not None:
            self._drop(self._index, known[0])

    @property
    def texts(self) -> list[list[int]]:
        """The token ids of every finished text, the least recently used first."""
        stats = self.stats()
        lengths = array("q", bytes(8 * stats.num_stored_requests))
        ids = array("i", bytes(4 * stats.num_stored_tokens))
        self._texts(self._index, lengths.buffer_info()[0], ids.buffer_info()[0])
        texts, end = [], 0
        for length in lengths:
            begin, end = end, end + length
            texts.append(ids[begin:end].tolist())
        return texts

    def stats(self) -> SuffixStats:
        """The sizes of the trees; bytes are what the library has taken for them."""
        found = array("q", bytes(8 * len(SuffixStats._fields)))
        self._stats(self._index, found.buffer_info()[0])
        return SuffixStats(*found)


def _pack(token_ids: Sequence[int]) -> array[int]:
    """Token ids as the library reads them; it takes a negative one for the end of a text."""
    packed = pack_ids("token ids", token_ids, "i")
    if packed and min(packed) < 0:
        raise ValueError(f"token ids must be at least 0, got {min(packed)}")
    return packed


def make(rules: SuffixRules) -> NativeSuffixIndex | None:
    """An index; None where `native.load` has no library."""
    library = native.load()
    return None if library is None else NativeSuffixIndex(library.library, rules)
