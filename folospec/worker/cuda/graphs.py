"""Runs the passes of a model runner as CUDA graphs: model, logits, draws and verification.

    host    pack rows and trees | one copy | replay |                       wait | tokens, paths
    device                      '-> buffers -> model -> logits -> draws -> verify -> one copy back

A graph has fixed shapes: that of its bucket. A step fills the first places of its buffers, and the
rest is padding: rows that write nowhere, see nothing, and are read by nobody.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from folospec.attention import paged_rows
from folospec.attention.metadata import AttentionMetadata
from folospec.attention.paged import PagedBackend
from folospec.attention.paged_rows import PagedRows
from folospec.kernels.gpu import sampling_arrays
from folospec.kernels.sampling_records import PackedTrees, VerifiedPath
from folospec.models.decoder import Decoder
from folospec.models.forward import ForwardResult, Rows
from folospec.worker.cuda.buckets import MAX_ROWS, Bucket, bucket_of, buckets, max_rows_each
from folospec.worker.cuda.step_buffers import Fields, Result, StepBuffers
from folospec.worker.input_batch import InputBatch, make_batch
from folospec.worker.kv_cache import KVCache

if TYPE_CHECKING:
    from folospec.kernels.gpu.sampling import DeviceSampling

logger = logging.getLogger(__name__)

NO_SLOT = -1
"""Instead of a slot: the row's keys and values are written nowhere."""


Graph = TypeVar("Graph")


class Recorder(Protocol):
    """What records graphs: `capture.CudaGraphs`."""

    def record(self, fn: Callable[[], None]) -> Callable[[], None]: ...


class GraphKey(NamedTuple):
    """What a graph was recorded for."""

    bucket: Bucket
    aux_layers: tuple[int, ...]


class GraphShapes:
    """What the buffers of a runner's graphs hold, and how a step is written into them.

    Args:
        model: its attention must be capturable.
        kv: the runner's.
    """

    def __init__(self, model: Decoder, kv: KVCache) -> None:
        assert isinstance(model.attention, PagedBackend)
        self.attention = model.attention
        self.block_size = kv.block_size
        self.table_width = -(-model.config.max_model_len // kv.block_size)
        self.fold = model.num_heads // model.num_kv_heads

    def rows_per_tile(self, bucket: Bucket) -> int:
        return self.attention.rows_per_tile(bucket.num_rows, bucket.num_seqs, self.fold)

    def fields(self, bucket: Bucket) -> Fields:
        """The arrays of the rows of a step; the block table is the last of them."""
        sizes = paged_rows.sizes(
            bucket.num_seqs,
            bucket.num_rows,
            self.table_width,
            rows_per_tile=self.rows_per_tile(bucket),
            expands=self.attention.expands,
            max_rows_per_seq=max_rows_each(bucket),
        )
        del sizes["block_table"]
        rows = dict.fromkeys(_ROW_FIELDS, (torch.int64, (bucket.num_rows,)))
        tables = {name: (torch.int32, (size,)) for name, size in sizes.items()}
        width = bucket.num_seqs, self.table_width
        return {**rows, **tables, "block_table": (torch.int32, width)}

    def arrays(self, bucket: Bucket, inputs: InputBatch) -> dict[str, NDArray[Any]]:
        """A step as the arrays of `fields`."""
        metadata = inputs.metadata
        described = paged_rows.describe(
            metadata,
            rows_per_tile=self.rows_per_tile(bucket),
            expands=self.attention.expands,
        )
        rows = (inputs.input_ids, metadata.positions, metadata.slot_mapping)
        return {n: t.numpy() for n, t in zip(_ROW_FIELDS, rows, strict=True)} | described

    def metadata(self, bucket: Bucket, tensors: dict[str, Tensor]) -> AttentionMetadata:
        """The metadata of a recorded pass: all that is read of it is on the device."""
        nothing = np.zeros(0, np.int32)
        views = {name: tensors[name] for name in PagedRows._fields if name in tensors}
        rows = PagedRows(**views, rows_per_tile=self.rows_per_tile(bucket))
        return AttentionMetadata(
            query_start_loc=nothing,
            context_lens=nothing,
            block_table=nothing.reshape(0, 0),
            block_size=self.block_size,
            positions=tensors["positions"],
            slot_mapping=tensors["slot_mapping"],
            suffix_start_loc=nothing,
            suffix_slots=nothing.astype(np.int64),
            suffix_positions=nothing.astype(np.int64),
            suffix_masks=[],
            plan={paged_rows.PLAN_KEY: rows},
        )


_ROW_FIELDS = ("input_ids", "positions", "slot_mapping")
PADDING = {
    "tile_seq": -1,
    "slot_mapping": NO_SLOT,
    "draws": -1,
    "all_params": 0,
    "trees": 0,
    "nodes": 0,
}
"""Nothing else of what is left free is read."""


class PassGraph:
    """The recorded pass of one bucket."""

    def __init__(self, key: GraphKey, graphs: StepGraphs) -> None:
        self.key, self.graphs = key, graphs
        bucket, device = key.bucket, graphs.device
        fields = dict(graphs.shapes.fields(bucket))
        self.result: Result | None = None
        if graphs.verifies:
            sizes = sampling_arrays.sizes(bucket.num_seqs, bucket.num_rows)
            tree_fields = {name: (dtype, (size,)) for name, (dtype, size) in sizes.items()}
            fields = tree_fields | fields  # the block table stays the last
            size = sampling_arrays.result_size(bucket.num_seqs, bucket.num_rows)
            self.result = Result(size, device)
        self.buffers = StepBuffers(fields, device, PADDING)
        self.aux_hidden_states: dict[int, Tensor] = {}
        self._replay = graphs.recorder.record(self._run)

    def _run(self) -> None:
        graphs, tensors = self.graphs, self.buffers.device
        metadata = graphs.shapes.metadata(self.key.bucket, tensors)
        hidden, aux_hidden_states = graphs.model.forward(
            tensors["input_ids"], metadata, graphs.kv.layers, self.key.aux_layers
        )
        logits = graphs.logits[: self.key.bucket.num_rows]
        logits.copy_(graphs.model.logits(hidden))
        self.aux_hidden_states = aux_hidden_states
        if self.result is not None:
            most = max_rows_each(self.key.bucket) - 1
            graphs.sampling.run_verify(logits, tensors, self.result.device, max_nodes=most)

    def replay(self, inputs: InputBatch, packed_trees: PackedTrees | None) -> ForwardResult | None:
        """Run the step; None if its trees are too large, and nothing was run."""
        graphs, num_rows = self.graphs, inputs.metadata.num_tokens
        arrays = graphs.shapes.arrays(self.key.bucket, inputs)
        if graphs.verifies:
            arrays |= sampling_arrays.arrays_of(packed_trees or PackedTrees())
        if not self.buffers.fill(arrays):
            return None
        self._replay()
        logits = graphs.logits[:num_rows]
        if inputs.logits_indices is not None:
            logits = logits[inputs.logits_indices.to(graphs.device, non_blocking=True)]
        aux_layers = {layer: stream[:num_rows] for layer, stream in self.aux_hidden_states.items()}
        if packed_trees is None or self.result is None:
            return ForwardResult(logits, aux_layers)
        self.result.send()
        return ForwardResult(logits, aux_layers, partial(self._verified, packed_trees))

    def _verified(self, packed_trees: PackedTrees) -> list[VerifiedPath]:
        assert self.result is not None
        num_trees = self.key.bucket.num_seqs
        return sampling_arrays.read_paths(self.result.read(), packed_trees, num_trees)


class StepGraphs:
    """Runs passes of a model as graphs, recorded when they are first wanted.

    Args:
        model: of the runner, with capturable attention.
        kv: of the runner.
        recorder: what records.
        sampling: draws and verifies on the device.
        verifies: the graphs do so: those of a target.
    """

    def __init__(
        self,
        model: Decoder,
        kv: KVCache,
        recorder: Recorder,
        sampling: DeviceSampling,
        verifies: bool,
    ) -> None:
        self.model, self.kv, self.recorder, self.sampling = model, kv, recorder, sampling
        self.verifies = verifies
        self.device = kv.layers[0].key.device
        self.shapes = GraphShapes(model, kv)
        self.logits = torch.zeros(
            MAX_ROWS, model.config.vocab_size, dtype=torch.float32, device=self.device
        )
        """Of whichever graph ran last: each would keep as much memory of its own."""
        self.is_closed = False
        """Whether nothing is recorded any more: a recording takes as long as many steps."""
        self.num_graphs = 0
        """Those of chains among them."""
        self._graphs: dict[GraphKey, PassGraph] = {}

    def run(
        self, batch: Sequence[Rows], aux_layers: tuple[int, ...], packed_trees: PackedTrees | None
    ) -> ForwardResult | None:
        """Run a step; None if there is no graph for it, and nothing was run. The result holds until
        the next pass.

        Args:
            packed_trees: what is to be drawn and verified, one for each sequence.
        """
        bucket = bucket_of(len(batch), sum(rows.num_run for rows in batch))
        if bucket is None or max(len(r.token_ids) for r in batch) > max_rows_each(bucket):
            return None
        if self.verifies and any(rows.num_logits < rows.num_run for rows in batch):
            return None  # of a prompt few rows want logits, and a graph computes all
        graph = self._graph(GraphKey(bucket, aux_layers))
        if graph is None:
            return None
        inputs = make_batch(batch, self.kv.block_size, _CPU)
        return graph.replay(inputs, packed_trees if self.verifies else None)

    def warm_up(self, max_num_seqs: int, rows_each: int, aux_layers: tuple[int, ...]) -> None:
        """Record what steps with up to so many sequences will want, with a progress bar."""
        wanted = list(buckets(max_num_seqs, rows_each))
        for bucket in tqdm(wanted, desc="recording CUDA graphs", leave=False):
            self._graph(GraphKey(bucket, aux_layers))

    def _graph(self, key: GraphKey) -> PassGraph | None:
        graph = self._graphs.get(key)
        if graph is None:
            graph = self.recorded(lambda: PassGraph(key, self))
            if graph is not None:
                self._graphs[key] = graph
        return graph

    def recorded(self, make: Callable[[], Graph]) -> Graph | None:
        """What `make` records; None where nothing is recorded any more, or a recording fails: then
        it is the last one."""
        if self.is_closed:
            return None
        try:
            graph = make()
        except RuntimeError as error:
            self.is_closed = True
            logger.warning("steps go on without further CUDA graphs, a recording failed: %s", error)
            return None
        self.num_graphs += 1
        return graph


_CPU = torch.device("cpu")
