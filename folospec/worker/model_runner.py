"""Runs one model over packed rows.

The target has a runner, and so has every draft model: the same class, each with its own KV.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from folospec.attention.metadata import AttentionMetadata, IntArray, pack_tables
from folospec.kernels.sampling_records import PackedTrees
from folospec.models.base import Model
from folospec.models.decoder import Decoder
from folospec.models.forward import ForwardResult, Rows
from folospec.models.native_chains import ChainBatch, draw_chains
from folospec.spec.draft_runner import Chains, ChainSampling, DrawnChains, RowChains
from folospec.worker.cuda.chain_graphs import MAX_LENGTH, ChainGraphs
from folospec.worker.cuda.graphs import Recorder, StepGraphs
from folospec.worker.input_batch import check_room, make_batch, make_single
from folospec.worker.kv_cache import KVCache

if TYPE_CHECKING:
    from folospec.kernels.gpu.sampling import DeviceSampling


_CHAIN_LENGTHS = (1, 2, 4, 8, 16)
"""Of drafts that are shorter than the longest, as a planner wants them."""
_CATCH_UP_ROWS = 2
"""Of a draft model, after a step in which all drafts were accepted: the last one, and the root."""


class ModelRunner:
    """A model and its KV tensors. Implements `spec.draft_runner.DraftRunner`.

    Args:
        max_num_batched_tokens: most rows per pass; a longer batch is run in several, in order.
        batch_invariant_reference: run every row in a pass of its own. Slow; each row then is, to
            the bit, what plain decoding computes, whatever is in the batch: the oracle of the bit
            contract.
        kv_dtype: type of keys and values in the cache; None is the model's own.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_num_batched_tokens: int,
        batch_invariant_reference: bool = False,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.kv_dtype = kv_dtype or model.config.dtype
        self.max_num_batched_tokens = max_num_batched_tokens
        self.batch_invariant_reference = batch_invariant_reference
        self.kv: KVCache | None = None
        self.graphs: StepGraphs | None = None
        self.chain_graphs: ChainGraphs | None = None
        self.num_passes = 0

    @property
    def is_deterministic(self) -> bool:
        """Whether a row's bits are the same whatever is in the batch."""
        return self.batch_invariant_reference or self.model.deterministic

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
            dtype=self.kv_dtype,
            device=device,
        )

    def use_graphs(self, recorder: Recorder, sampling: DeviceSampling, *, verifies: bool) -> None:
        """Run passes as CUDA graphs from now on, where they fit; the KV must be there.

        Args:
            sampling: draws in the same graphs.
            verifies: and verifies in them, as is done with a target.
        """
        assert self.kv is not None
        assert isinstance(self.model, Decoder)
        self.graphs = StepGraphs(self.model, self.kv, recorder, sampling, verifies)
        self.chain_graphs = ChainGraphs(self.graphs)

    @torch.inference_mode()
    def warm_up(
        self, *, max_num_seqs: int = 1, max_rows_each: int = 1, aux_layers: tuple[int, ...] = ()
    ) -> None:
        """Record the CUDA graphs of steps with up to so many sequences, and so many rows of each; a
        runner without graphs has nothing to do. `aux_layers` are as in `forward`."""
        if self.graphs is not None:
            self.graphs.warm_up(max_num_seqs, max_rows_each, aux_layers)

    def freeze_graphs(self) -> None:
        """Record no more: steps that no graph was recorded for are launched kernel by kernel."""
        if self.graphs is not None:
            self.graphs.is_closed = True

    @torch.inference_mode()
    def forward(
        self,
        batch: list[Rows],
        aux_layers: tuple[int, ...] = (),
        packed_trees: PackedTrees | None = None,
    ) -> ForwardResult:
        """Run the rows of `batch`, writing their KV; logits come in the order of the batch.

        Args:
            packed_trees: one for each sequence of the batch: a pass that runs as a graph draws and
                verifies too, and says so by `ForwardResult.verified`. Others leave it to the
                caller.
        """
        parts = list(self._parts(batch))
        if self.graphs is not None and len(parts) == 1:
            replayed = self.graphs.run(batch, aux_layers, packed_trees)
            if replayed is not None:
                self.num_passes += 1
                return replayed
        run = self._run_rows if self.batch_invariant_reference else self._run
        results = [run(part, aux_layers) for part in parts]
        if len(results) == 1:
            return results[0]
        return ForwardResult(
            torch.cat([r.logits for r in results]),
            {
                layer: torch.cat([r.aux_hidden_states[layer] for r in results])
                for layer in aux_layers
            },
        )

    def chains(self, starts: Sequence[int], block_tables: Sequence[Sequence[int]]) -> Chains:
        """See `DraftRunner.chains`."""
        if self.batch_invariant_reference or len(starts) > self.max_num_batched_tokens:
            return RowChains(self, starts, block_tables)
        return PassChains(self, starts, block_tables)

    @torch.inference_mode()
    def draw_chains(
        self,
        logits: Tensor,
        starts: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        chains: Sequence[ChainSampling],
        *,
        as_target: bool = False,
    ) -> DrawnChains | None:
        """See `DraftRunner.draw_chains`; with `as_target` tokens are drawn as verification draws
        them."""
        if self.chain_graphs is None:
            return None if as_target else self._draw_natively(logits, starts, block_tables, chains)
        drawn = self.chain_graphs.run(logits, starts, block_tables, chains, as_target)
        if drawn is not None:
            self.num_passes += max(chain.length for chain in chains) - 1
        return drawn

    def _draw_natively(
        self,
        logits: Tensor,
        starts: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        chains: Sequence[ChainSampling],
    ) -> DrawnChains | None:
        """The same on a CPU, where the model runs natively and has all tokens of the logits."""
        assert self.kv is not None
        if self.batch_invariant_reference or len(starts) > self.max_num_batched_tokens:
            return None
        decoder = self.model.native_for(len(starts)) if isinstance(self.model, Decoder) else None
        if decoder is None or decoder.lm_head.out_size != logits.shape[1]:
            return None
        ends = np.array(
            [start + chain.length - 1 for start, chain in zip(starts, chains, strict=True)]
        )
        check_room(ends, block_tables, self.kv.block_size)
        batch = ChainBatch(
            starts=starts,
            block_table=pack_tables(block_tables),
            block_size=self.kv.block_size,
            all_params=[chain.packed for chain in chains],
            positions=[chain.position for chain in chains],
            scales=[chain.scale for chain in chains],
            lengths=[chain.length for chain in chains],
            min_probability=[chain.min_probability for chain in chains],
        )
        drawn = draw_chains(decoder, logits, self.kv.layers, batch)
        self.num_passes += drawn.num_passes
        return DrawnChains(drawn.token_ids, drawn.confidence)

    @torch.inference_mode()
    def warm_up_chains(self, max_num_seqs: int, length: int, vocab_size: int) -> None:
        """See `DraftRunner.warm_up_chains`."""
        if self.chain_graphs is not None and length <= MAX_LENGTH:
            self.warm_up(max_num_seqs=max_num_seqs, max_rows_each=_CATCH_UP_ROWS)
            halves = [*takewhile(lambda shorter: shorter < length, _CHAIN_LENGTHS), length]
            self.chain_graphs.warm_up(max_num_seqs, halves, vocab_size)

    @torch.inference_mode()
    def warm_up_multi_step(self, max_num_seqs: int, lengths: Sequence[int]) -> None:
        """Record the chains that a target decodes by itself, see `draw_chains`."""
        if self.chain_graphs is not None:
            self.chain_graphs.warm_up(max_num_seqs, lengths, self.vocab_size, is_target=True)

    def _parts(self, batch: list[Rows]) -> Iterator[list[Rows]]:
        """Split a batch into passes within the token budget. Only chains are cut; a tree is never
        larger than the budget."""
        if sum(rows.num_run for rows in batch) <= self.max_num_batched_tokens:
            yield batch
            return
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

    def _run(self, batch: list[Rows], aux_layers: tuple[int, ...]) -> ForwardResult:
        assert self.kv is not None
        inputs = make_batch(batch, self.kv.block_size, self.kv.layers[0].key.device)
        self.num_passes += 1
        hidden, aux_hidden_states = self.model.forward(
            inputs.input_ids, inputs.metadata, self.kv.layers, aux_layers
        )
        if inputs.logits_indices is not None:
            hidden = hidden[inputs.logits_indices]
        return ForwardResult(self.model.logits(hidden), aux_hidden_states)

    def _run_rows(self, batch: list[Rows], aux_layers: tuple[int, ...]) -> ForwardResult:
        assert self.kv is not None
        device = self.kv.layers[0].key.device
        logits, aux_hidden_states = [], []
        self.num_passes += 1
        for rows in batch:
            first = len(rows.token_ids) - rows.num_logits
            for row in range(rows.num_computed, len(rows.token_ids)):
                inputs = make_single(rows, row, self.kv.block_size, device)
                hidden, row_aux_layers = self.model.forward(
                    inputs.input_ids, inputs.metadata, self.kv.layers, aux_layers
                )
                aux_hidden_states.append(row_aux_layers)
                if row >= first:
                    logits.append(self.model.logits(hidden))
        empty = torch.empty(0, self.vocab_size, device=device)
        return ForwardResult(
            torch.cat(logits) if logits else empty,
            {layer: torch.cat([t[layer] for t in aux_hidden_states]) for layer in aux_layers},
        )


class PassChains:
    """`Chains` whose metadata is made once, and moves on with them."""

    def __init__(
        self, runner: ModelRunner, starts: Sequence[int], block_tables: Sequence[Sequence[int]]
    ) -> None:
        assert runner.kv is not None
        self.runner, self.kv = runner, runner.kv
        self._has_run = False
        self._num_slots = self.kv.block_size * np.array([len(table) for table in block_tables])
        self._prepare(np.array(starts), pack_tables(block_tables))

    @torch.inference_mode()
    def forward(self, token_ids: Sequence[int]) -> Tensor:
        """See `Chains.forward`."""
        if self._has_run:
            self._check_room()
            self.metadata.advance()
        self._num_passes_left -= 1
        self._has_run = True
        input_ids = torch.from_numpy(np.array(token_ids)).to(self.metadata.positions.device)
        model = self.runner.model
        self.runner.num_passes += 1
        return model.logits(model.forward(input_ids, self.metadata, self.kv.layers)[0])

    def keep(self, chosen: Sequence[int]) -> None:
        """See `Chains.keep`."""
        kept, metadata = np.array(chosen), self.metadata
        next_positions = metadata.suffix_positions[kept] + self._has_run
        self._num_slots = self._num_slots[kept]
        self._prepare(next_positions, metadata.block_table[kept])

    def _prepare(self, positions: IntArray, block_table: NDArray[np.int32]) -> None:
        # Behind the end of a shorter table there is padding: another sequence's block.
        self._num_passes_left = int((self._num_slots - positions).min())
        self._check_room()
        device = self.kv.layers[0].key.device
        self.metadata = AttentionMetadata.of_single_rows(
            positions, block_table, self.kv.block_size, device
        )
        self._has_run = False

    def _check_room(self) -> None:
        if self._num_passes_left < 1:
            raise ValueError("chains must stay within their slots, got one that is at its last")


def _cut(rows: Rows, count: int) -> tuple[Rows, Rows]:
    """Cut a chain after `count` rows; the logits that were wanted stay wanted on either side."""
    rest = len(rows.token_ids) - count
    head_logits = max(0, rows.num_logits - rest)
    head = Rows(rows.token_ids[:count], rows.start, rows.block_table, head_logits)
    tail = Rows(
        rows.token_ids[count:], rows.start + count, rows.block_table, min(rows.num_logits, rest)
    )
    return head, tail
