"""A small engine for tests: ragged batches over shuffled blocks, chunked or not, greedy."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from folospec.attention.base import LayerKV
from folospec.attention.metadata import AttentionMetadata, SequenceRows
from folospec.models.base import Model


class PagedRunner:
    """Runs sequences of tokens on a model; slots nobody wrote hold NaN, so that reading one shows.

    `move` maps the position of a token to the one the model is told. `drop` is a context index that
    every later row is kept from seeing. Both are for controls that must fail.
    """

    def __init__(
        self,
        model: Model,
        *,
        move: Callable[[int], int] = lambda position: position,
        drop: int | None = None,
    ) -> None:
        self.model, self.move, self.drop = model, move, drop
        self.block_size = 4 if drop is None else 1
        self.free_blocks = list(range(1024 // self.block_size))
        random.Random(0).shuffle(self.free_blocks)
        self.kv = [
            LayerKV(
                *(torch.full((1024, *shape), torch.nan, dtype=model.config.dtype) for _ in "kv")
            )
            for shape in model.config.kv_shapes
        ]
        self.tables: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}

    def step(self, chunks: dict[int, list[int]]) -> dict[int, Tensor]:
        """Run the next tokens of each sequence; returns the logits of all their rows."""
        rows = [self.rows(seq, len(tokens)) for seq, tokens in chunks.items()]
        metadata = AttentionMetadata.from_rows(rows, self.block_size)
        input_ids = torch.tensor([token for tokens in chunks.values() for token in tokens])
        hidden, _ = self.model.forward(input_ids, metadata, self.kv)
        lengths = [len(tokens) for tokens in chunks.values()]
        for seq, length in zip(chunks, lengths, strict=True):
            self.computed[seq] += length
        return dict(zip(chunks, self.model.logits(hidden).split(lengths), strict=True))

    def rows(self, seq: int, count: int) -> SequenceRows:
        """The next `count` rows of a sequence, with blocks for them."""
        start, size = self.computed.setdefault(seq, 0), self.block_size
        table = self.tables.setdefault(seq, [])
        while len(table) * size < start + count:
            table.append(self.free_blocks.pop())
        indices = range(start, start + count)
        dropped = self.drop is not None and start > self.drop
        return SequenceRows(
            positions=[self.move(index) for index in indices],
            slots=[table[index // size] * size + index % size for index in indices],
            context_len=start - dropped,
            block_table=[b for i, b in enumerate(table) if not (dropped and i == self.drop)],
        )


def all_logits(runner: PagedRunner, sequences: list[list[int]], chunk: int) -> list[Tensor]:
    """Logits of every row of every sequence, `chunk` tokens of each per step, all in one batch."""
    parts: dict[int, list[Tensor]] = {seq: [] for seq in range(len(sequences))}
    for start in range(0, max(map(len, sequences)), chunk):
        chunks = {seq: tokens[start : start + chunk] for seq, tokens in enumerate(sequences)}
        for seq, logits in runner.step({s: part for s, part in chunks.items() if part}).items():
            parts[seq].append(logits)
    return [torch.cat(part) for part in parts.values()]


def greedy(
    runner: PagedRunner, prompts: list[list[int]], num_tokens: int, chunk: int
) -> list[list[int]]:
    """Continue the prompts by `num_tokens` each, greedily, as a ragged batch.

    Prompts run `chunk` tokens at a time beside sequences that already decode.
    """
    pending = {seq: list(prompt) for seq, prompt in enumerate(prompts)}
    outputs: list[list[int]] = [[] for _ in prompts]
    while any(len(output) < num_tokens for output in outputs):
        running = [seq for seq, output in enumerate(outputs) if len(output) < num_tokens]
        for seq, logits in runner.step({seq: pending[seq][:chunk] for seq in running}).items():
            pending[seq] = pending[seq][chunk:]
            if not pending[seq]:
                pending[seq] = [int(logits[-1].argmax())]
                outputs[seq] += pending[seq]
    return outputs
