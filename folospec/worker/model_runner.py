"""Runs one model over packed rows. The target has a runner, and so has every draft model: the same
class, each with its own KV."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from folospec.models.base import Model
from folospec.spec.draft_runner import ForwardResult, Rows
from folospec.worker.input_batch import make_batch, make_single
from folospec.worker.kv_cache import KVCache


class ModelRunner:
    """A model and its KV tensors. Implements `spec.draft_runner.DraftRunner`.

    Args:
        max_num_batched_tokens: most rows per pass; a longer batch is run in several, in order.
        row_at_a_time: run every row in a pass of its own. Slow; each row then is, to the bit, what
            plain decoding computes, whatever is in the batch: the oracle of the bit contract.
    """

    def __init__(
        self, model: Model, *, max_num_batched_tokens: int, row_at_a_time: bool = False
    ) -> None:
        self.model = model
        self.max_num_batched_tokens = max_num_batched_tokens
        self.row_at_a_time = row_at_a_time
        self.kv: KVCache | None = None
        self.num_passes = 0

    @property
    def is_deterministic(self) -> bool:
        """Whether a row's bits are the same whatever is in the batch."""
        return self.row_at_a_time or self.model.deterministic

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    def make_kv(self, num_blocks: int, block_size: int, device: torch.device) -> None:
        """Allocate the KV tensors; called once, when the size of the pool is known."""
        config = self.model.config
        self.kv = KVCache(
            config.kv_shapes,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=config.dtype,
            device=device,
        )

    @torch.inference_mode()
    def forward(self, batch: list[Rows], taps: tuple[int, ...] = ()) -> ForwardResult:
        """Run the rows of `batch`, writing their KV; logits come in the order of the batch."""
        run = self._run_rows if self.row_at_a_time else self._run
        results = [run(part, taps) for part in self._parts(batch)]
        if len(results) == 1:
            return results[0]
        return ForwardResult(
            torch.cat([r.logits for r in results]),
            {tap: torch.cat([r.taps[tap] for r in results]) for tap in taps},
        )

    def _parts(self, batch: list[Rows]) -> Iterator[list[Rows]]:
        """Split a batch into passes within the token budget. Only chains are cut; a tree is never
        larger than the budget."""
        part: list[Rows] = []
        room = self.max_num_batched_tokens
        for rows in batch:
            while rows.parents is None and len(rows.token_ids) > room:
                if room:
                    head, rows = _cut(rows, room)
                    part.append(head)
                yield part
                part, room = [], self.max_num_batched_tokens
            if rows.num_run > room and part:
                yield part
                part, room = [], self.max_num_batched_tokens
            part.append(rows)
            room -= rows.num_run
        if part:
            yield part

    def _run(self, batch: list[Rows], taps: tuple[int, ...]) -> ForwardResult:
        assert self.kv is not None
        inputs = make_batch(batch, self.kv.block_size, self.kv.layers[0].key.device)
        self.num_passes += 1
        hidden, tapped = self.model.forward(inputs.input_ids, inputs.metadata, self.kv.layers, taps)
        return ForwardResult(self.model.logits(hidden[inputs.logits_indices]), tapped)

    def _run_rows(self, batch: list[Rows], taps: tuple[int, ...]) -> ForwardResult:
        assert self.kv is not None
        device = self.kv.layers[0].key.device
        logits, tapped = [], []
        self.num_passes += 1
        for rows in batch:
            first = len(rows.token_ids) - rows.num_logits
            for row in range(rows.num_computed, len(rows.token_ids)):
                inputs = make_single(rows, row, self.kv.block_size, device)
                hidden, row_taps = self.model.forward(
                    inputs.input_ids, inputs.metadata, self.kv.layers, taps
                )
                tapped.append(row_taps)
                if row >= first:
                    logits.append(self.model.logits(hidden))
        empty = torch.empty(0, self.vocab_size, device=device)
        return ForwardResult(
            torch.cat(logits) if logits else empty,
            {tap: torch.cat([t[tap] for t in tapped]) for tap in taps},
        )


def _cut(rows: Rows, count: int) -> tuple[Rows, Rows]:
    """Cut a chain after `count` rows; the logits that were wanted stay wanted on either side."""
    rest = len(rows.token_ids) - count
    head_logits = max(0, rows.num_logits - rest)
    head = Rows(rows.token_ids[:count], rows.start, rows.block_table, head_logits)
    tail = Rows(
        rows.token_ids[count:], rows.start + count, rows.block_table, min(rows.num_logits, rest)
    )
    return head, tail
