"""The text the demo models are trained on: the sources of Python's own standard library.

`documents()` yields (name, text) pairs, `split()` says which side a module belongs to, and
`prepare()` writes a byte-level BPE tokenizer and the token streams to a work folder. Whole modules,
with their tests, are held out by name.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
HELD_OUT = frozenset(
    [
        "bisect",
        "calendar",
        "cmd",
        "colorsys",
        "copy",
        "csv",
        "fnmatch",
        "fractions",
        "glob",
        "graphlib",
        "heapq",
        "json",
        "queue",
        "reprlib",
        "sched",
        "shlex",
        "statistics",
        "textwrap",
    ]
)
SKIPPED_FOLDERS = frozenset({"site-packages", "encodings", "__pycache__", "bad_coding", "data"})


def documents() -> Iterator[tuple[str, str]]:
    """Yield (path below the standard library, text) in a fixed order; files that are not UTF-8 are
    left out."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(name.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield name.as_posix(), text


def split(name: str) -> str:
    """Return "held_out" for a held-out module, its package's files and its tests, otherwise
    "train"."""
    parts = [part.removesuffix(".py").removeprefix("test_") for part in name.split("/")]
    return "held_out" if HELD_OUT.intersection(parts) else "train"


def train_tokenizer(texts: Iterator[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def prepare(work: Path) -> tuple[Tokenizer, dict[str, np.ndarray], dict[str, int]]:
    """Return (tokenizer, token stream of each split as uint16, UTF-8 bytes of each split), cached
    below `work`."""
    work.mkdir(parents=True, exist_ok=True)
    tokenizer_file, streams_file = work / "tokenizer.json", work / "streams.npz"
    texts: dict[str, list[str]] = {"train": [], "held_out": []}
    for name, text in documents():
        texts[split(name)].append(text)
    if not tokenizer_file.exists():
        train_tokenizer(iter(texts["train"])).save(str(tokenizer_file))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    if not streams_file.exists():
        end = [tokenizer.token_to_id(END_OF_TEXT)]
        arrays = {}
        for side, side_texts in texts.items():
            rows = [np.array(e.ids + end, np.uint16) for e in tokenizer.encode_batch(side_texts)]
            arrays[side] = np.concatenate(rows)
        np.savez(streams_file, **arrays)
    with np.load(streams_file) as streams:
        num_bytes = {
            side: sum(len(t.encode()) for t in side_texts) for side, side_texts in texts.items()
        }
        return tokenizer, {side: streams[side] for side in texts}, num_bytes
