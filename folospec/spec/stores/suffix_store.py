"""Stores finished texts in one suffix tree, bounded in tokens; the least recently used go first."""

from __future__ import annotations

import os
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from folospec.spec.stores.suffix_tree import SuffixTree, Writer

FORMAT_VERSION = 1
_ARRAYS = {"version", "vocab_size", "lengths", "token_ids"}


class SuffixStore:
    """Texts of at most `max_tokens` tokens together, and their tree.

    Of a text that is longer than that on its own, the end is kept.
    """

    def __init__(self, max_depth: int, max_tokens: int) -> None:
        self.tree = SuffixTree(max_depth)
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self.num_evictions = 0
        self._texts: OrderedDict[int, array[int]] = OrderedDict()
        """By id, the least recently used first."""

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def texts(self) -> list[list[int]]:
        """The token ids of every text, the least recently used first."""
        return [list(text) for text in self._texts.values()]

    def add(self, token_ids: Sequence[int]) -> None:
        """Add a text, and take texts back until all fit."""
        token_ids = token_ids[max(0, len(token_ids) - self.max_tokens) :]
        if len(token_ids) == 0:
            return
        while self.num_tokens + len(token_ids) > self.max_tokens:
            _, oldest = self._texts.popitem(last=False)
            self.tree.remove(oldest)
            self.num_tokens -= len(oldest)
            self.num_evictions += 1
        writer = Writer(self.tree)
        for token_id in token_ids:
            writer.append(token_id)
        text = writer.close()
        self._texts[id(text)] = text
        self.num_tokens += len(text)

    def touch(self, text: array[int]) -> None:
        """Note that a text of the tree has been of use."""
        if id(text) in self._texts:
            self._texts.move_to_end(id(text))


def save_texts(path: str | Path, texts: Iterable[Sequence[int]], vocab_size: int) -> None:
    """Write texts as an .npz of `version`, `vocab_size`, `lengths` [num_texts] and `token_ids`
    [sum of lengths], the file complete or not there at all."""
    rows = [np.asarray(text, dtype=np.int32) for text in texts]
    arrays = {
        "version": np.int64(FORMAT_VERSION),
        "vocab_size": np.int64(vocab_size),
        "lengths": np.array([len(row) for row in rows], dtype=np.int64),
        "token_ids": np.concatenate([np.zeros(0, dtype=np.int32), *rows]),
    }
    partial = Path(f"{path}.partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    os.replace(partial, path)


def load_texts(path: str | Path, vocab_size: int) -> list[list[int]]:
    """Read what `save_texts` wrote.

    Raises:
        ValueError: there is no such file, it is none of these, or it is for another vocabulary.
    """
    arrays = _read_arrays(path)
    for name, wanted in (("version", FORMAT_VERSION), ("vocab_size", vocab_size)):
        if arrays[name].shape != () or int(arrays[name]) != wanted:
            raise ValueError(f"{name} of {str(path)!r} must be {wanted}, got {arrays[name]}")
    lengths, token_ids = arrays["lengths"], arrays["token_ids"]
    if (
        lengths.ndim != 1
        or token_ids.ndim != 1
        or (lengths < 1).any()
        or lengths.sum() != len(token_ids)
    ):
        raise ValueError(
            f"{str(path)!r} is damaged: lengths of {lengths.sum()} tokens, got {token_ids.shape}"
        )
    check_token_ids(token_ids.tolist(), vocab_size, str(path))
    ends = np.cumsum(lengths).tolist()
    return [token_ids[end - size : end].tolist() for end, size in zip(ends, lengths, strict=True)]


def _read_arrays(path: str | Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # numpy, zipfile and zlib each have their own
        raise ValueError(f"{str(path)!r} cannot be read as saved texts: {error}") from error
    if set(arrays) != _ARRAYS or any(a.dtype.kind not in "iu" for a in arrays.values()):
        raise ValueError(
            f"{str(path)!r} must hold the integers {sorted(_ARRAYS)}, got {sorted(arrays)}"
        )
    return arrays


def check_token_ids(token_ids: Iterable[Any], vocab_size: int, name: str) -> None:
    """Refuse what is not a list of token ids of the vocabulary.

    Raises:
        ValueError: it is not.
    """
    for token_id in token_ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise ValueError(f"token ids of {name} must be in [0, {vocab_size}), got {token_id!r}")
