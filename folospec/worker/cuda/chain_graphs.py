"""Runs all passes for the chains of a step as one CUDA graph.

The chains are drafts of a draft model, or tokens that the target decodes before the host looks.

    logits of the roots -> draw -> token 0 -> pass -> draw -> token 1 -> pass -> ... -> token k - 1
                                     |                          |                         |
                                     '--------------------------'------- one copy back ---'

The tokens go from a draw to the next pass on the device. Where each of them will lie is known
before: positions and slots of all passes are sent in one copy. A chain that is to be shorter than
the others stays where it ended, and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from folospec.attention.metadata import IntArray, pack_tables
from folospec.kernels.gpu.sampling_arrays import (
    DRAW,
    PARAMS,
    child_arrays,
    read_children,
)
from folospec.kernels.native_children import pack_wanted
from folospec.spec.draft_runner import ChainSampling, DrawnChains
from folospec.worker.cuda.buckets import NUM_SEQS, Bucket, buckets
from folospec.worker.cuda.graphs import NO_SLOT, PADDING, StepGraphs
from folospec.worker.cuda.step_buffers import Fields, Result, StepBuffers
from folospec.worker.input_batch import check_room

_COLUMNS = 3
"""Of a draw: token, whether there is one, and the confidence in it."""
POSITION = 2
"""The column of a draw, see `kernels.gpu.params`."""
MAX_LENGTH = 32
"""Longer chains are drawn token by token."""


class ChainKey(NamedTuple):
    """What a graph was recorded for."""

    num_seqs: int
    length: int
    """Draws of every chain."""
    vocab_size: int
    """Of the tokens that may be drawn, the first ones of the model's."""
    is_target: bool
    """Tokens are drawn as verification draws them, without a confidence; else as drafts."""


def step_arrays(
    starts: IntArray,
    block_table: NDArray[np.int32],
    chains: Sequence[ChainSampling],
    key: ChainKey,
    block_size: int,
) -> dict[str, NDArray[Any]]:
    """The chains of a step as `ChainGraph` reads them; see `chain_fields`.

    Args:
        starts: [num_chains] slot index of the first token, and its position.
        block_table: [num_chains, width].
    """
    num_chains = len(chains)
    lengths = np.array([chain.length for chain in chains])
    passes = np.arange(key.length - 1)[:, None]
    is_run = passes < lengths - 1
    positions = starts + np.minimum(passes, np.maximum(lengths - 2, 0))
    blocks = np.minimum(positions // block_size, block_table.shape[1] - 1)
    slots = block_table[np.arange(num_chains), blocks].astype(np.int64) * block_size
    slots += positions % block_size
    seqs = np.arange(num_chains, dtype=np.int32)
    every = np.arange(num_chains + 1, dtype=np.int32)
    wanted = [pack_wanted(i, chain.position, 1, chain.scale) for i, chain in enumerate(chains)]
    return {
        **child_arrays([chain.packed for chain in chains], wanted),
        "positions": positions,
        "slot_mapping": np.where(is_run, slots, NO_SLOT),
        "context_lens": positions.astype(np.int32),
        "suffix_slots": slots.astype(np.int32),
        "suffix_positions": positions.astype(np.int32),
        "query_start_loc": every,
        "suffix_start_loc": every,
        "table_row": seqs,
        "mask_start": np.full(num_chains, -1, np.int32),
        "mask_words": np.empty(0, np.int32),
        "tile_seq": seqs,
        "tile_row": seqs,
        "block_table": block_table,
    }


_BY_PASS = ("positions", "slot_mapping", "context_lens", "suffix_slots", "suffix_positions")
"""Arrays with a row for every pass: [length - 1, num_seqs]."""


def chain_fields(key: ChainKey, table_width: int) -> Fields:
    """The arrays of `step_arrays`, of the sizes of a bucket."""
    seqs, passes = key.num_seqs, (key.length - 1, key.num_seqs)
    wide = dict.fromkeys(("positions", "slot_mapping"), (torch.int64, passes))
    narrow = dict.fromkeys(_BY_PASS[2:], (torch.int32, passes))
    starts = dict.fromkeys(("query_start_loc", "suffix_start_loc"), (torch.int32, (seqs + 1,)))
    single = ("table_row", "mask_start", "tile_seq", "tile_row")
    return {
        "all_params": (torch.int64, (PARAMS * seqs,)),
        "draws": (torch.int64, (DRAW * seqs,)),
        **wide,
        **narrow,
        **starts,
        **dict.fromkeys(single, (torch.int32, (seqs,))),
        "mask_words": (torch.int32, (0,)),
        "block_table": (torch.int32, (seqs, table_width)),
    }


class ChainGraph:
    """The recorded passes of one bucket."""

    def __init__(self, key: ChainKey, graphs: StepGraphs) -> None:
        self.key, self.graphs = key, graphs
        device = graphs.device
        fields = chain_fields(key, graphs.shapes.table_width)
        self.buffers = StepBuffers(fields, device, PADDING)
        self.logits = graphs.logits[: key.num_seqs, : key.vocab_size]
        self.result = Result(key.length * _COLUMNS * key.num_seqs, device)
        self._drawn = self.result.device.view(key.length, _COLUMNS, key.num_seqs)
        self._sampling = graphs.sampling
        self._advance = torch.zeros(key.length, DRAW, dtype=torch.int64)
        self._advance[:, POSITION] = torch.arange(key.length)
        self._advance = self._advance.to(device)
        self._replay = graphs.recorder.record(self._run)

    def _run(self) -> None:
        graphs, key, tensors = self.graphs, self.key, self.buffers.device
        last = graphs.model.config.vocab_size - 1
        logits = self.logits
        for draw in range(key.length):
            self._draw(logits, draw)
            if draw == key.length - 1:
                return
            views = {n: t[draw] if n in _BY_PASS else t for n, t in tensors.items()}
            metadata = graphs.shapes.metadata(Bucket(key.num_seqs, key.num_seqs), views)
            input_ids = self._drawn[draw, 0].clamp(max=last)
            hidden, _ = graphs.model.forward(input_ids, metadata, graphs.kv.layers)
            logits = graphs.model.logits(hidden)[:, : key.vocab_size]

    def _draw(self, logits: Tensor, draw: int) -> None:
        tensors, place = self.buffers.device, self._drawn[draw]
        if not self.key.is_target:
            self._sampling.draw_next(logits, tensors, place, advance=draw)
            return
        draws = tensors["draws"].view(-1, DRAW) + self._advance[draw]
        tokens, _ = self._sampling.draw_tokens(logits, tensors["all_params"], draws)
        place[0].copy_(tokens.clamp(min=0))
        place[1].copy_(tokens >= 0)

    def replay(
        self,
        logits: Tensor,
        starts: IntArray,
        block_table: NDArray[np.int32],
        chains: Sequence[ChainSampling],
    ) -> DrawnChains:
        """Run the step, and wait for its tokens."""
        key, block_size = self.key, self.graphs.shapes.block_size
        arrays = step_arrays(starts, block_table, chains, key, block_size)
        has_room = self.buffers.fill(arrays)
        assert has_room, "block tables are no longer than max_model_len"
        self.logits[: len(chains)].copy_(logits[:, : key.vocab_size])
        self._replay()
        self.result.send()
        drawn = DrawnChains([], [])
        passes = self.result.read().view(key.length, _COLUMNS, key.num_seqs)
        by_draw = [read_children(one[:, : len(chains)]) for one in passes]
        for seq, chain in enumerate(chains):
            # After a draw in which nothing was possible there is nothing to be looked at.
            draws = list(takewhile(lambda d: d[0], (d[seq] for d in by_draw[: chain.length])))
            drawn.token_ids.append([token_ids[0] for token_ids, _ in draws])
            drawn.confidence.append([chances[0] for _, chances in draws])
        return drawn


class ChainGraphs:
    """Runs the chains of a step, in graphs that are recorded when they are first wanted."""

    def __init__(self, graphs: StepGraphs) -> None:
        self._step_graphs = graphs
        self._graphs: dict[ChainKey, ChainGraph] = {}
        self._lengths: list[int] = []

    def warm_up(
        self, max_num_seqs: int, lengths: Sequence[int], vocab_size: int, is_target: bool = False
    ) -> None:
        """Record what up to so many chains of these lengths will want, with a progress bar; one of
        another length runs in the graph of the next longer."""
        sizes = [bucket.num_seqs for bucket in buckets(max_num_seqs, 1)]
        self._lengths = sorted({*self._lengths, *lengths})
        width = min(vocab_size, self._step_graphs.model.config.vocab_size)
        keys = [ChainKey(n, length, width, is_target) for length in lengths for n in sizes]
        for key in tqdm(keys, desc="recording chains", leave=False):
            self._graph(key)

    def run(
        self,
        logits: Tensor,
        starts: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        chains: Sequence[ChainSampling],
        is_target: bool = False,
    ) -> DrawnChains | None:
        """See `DraftRunner.draw_chains`, and `ChainKey.is_target`."""
        num_seqs = next((size for size in NUM_SEQS if size >= len(chains)), None)
        longest = max(chain.length for chain in chains)
        if num_seqs is None or longest > MAX_LENGTH:
            return None
        length = next((length for length in self._lengths if length >= longest), longest)
        width = min(logits.shape[1], self._step_graphs.model.config.vocab_size)
        graph = self._graph(ChainKey(num_seqs, length, width, is_target))
        if graph is None:
            return None
        ends = np.array(starts) + [chain.length - 1 for chain in chains]
        check_room(ends, block_tables, self._step_graphs.shapes.block_size)
        return graph.replay(logits, np.array(starts), pack_tables(block_tables), chains)

    def _graph(self, key: ChainKey) -> ChainGraph | None:
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._step_graphs.recorded(lambda: ChainGraph(key, self._step_graphs))
            if graph is not None:
                self._graphs[key] = graph
        return graph
