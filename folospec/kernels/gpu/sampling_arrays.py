"""Packs what sampling sends to the device, and reads what comes back.

All of it is int64, made and read with numpy on the host. See `gpu.sampling` for the kernels, and
`gpu.params` for parameter sets and draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from folospec.kernels.sampling_records import PackedTrees, VerifiedPath

Arrays = dict[str, NDArray[np.int64]]
PARAMS, TREE, DRAW, PROPOSAL, COLUMNS = 6, 4, 4, 7, 3
"""int64 in each, and those of a tree in the result: its token, the length of its path, the bits of
the largest logit (float32)."""
_MASK64 = 0xFFFFFFFFFFFFFFFF


def sizes(num_trees: int, num_nodes: int) -> dict[str, tuple[torch.dtype, int]]:
    """The type and length of the tensors of `run_verify` for so many trees, and nodes of all.

    Where there are fewer, "draws" is to be -1 beyond what there is, and the others 0: then the
    logits of a row that nobody asked for are not read, and its token is -1.
    """
    lengths = {
        "all_params": PARAMS * num_trees,
        "trees": TREE * num_trees,
        "nodes": 2 * num_nodes,
        "draws": DRAW * (num_trees + num_nodes),
    }
    return {name: (torch.int64, length) for name, length in lengths.items()}


def result_size(num_trees: int, num_nodes: int) -> int:
    """How many int64 the result of `run_verify` has."""
    return COLUMNS * num_trees + num_nodes


def arrays_of(packed_trees: PackedTrees) -> Arrays:
    """What `run_verify` reads, by the names of `sizes`."""
    all_params = np.frombuffer(b"".join(packed_trees.all_params), np.int64)
    trees = np.frombuffer(b"".join(packed_trees.trees), np.int64)
    nodes = np.array(packed_trees.nodes, np.int64)
    return {
        "all_params": all_params,
        "trees": trees,
        "nodes": nodes,
        "draws": _draws_of(trees, nodes),
    }


def _draws_of(flat_trees: NDArray[np.int64], nodes: NDArray[np.int64]) -> NDArray[np.int64]:
    """A draw for every row of every tree, in their order; none at nodes that are not verified."""
    trees = flat_trees.reshape(-1, TREE)
    root_rows, positions, begins, num_nodes = trees.T
    tree = np.repeat(np.arange(len(trees)), num_nodes + 1)
    start = np.arange(len(trees)) + begins // 2
    local = np.arange(len(tree)) - start[tree]
    draws = np.zeros((len(tree), DRAW), np.int64)
    draws[:, 0] = tree
    draws[:, 1] = root_rows[tree] + local
    draws[:, 2] = positions[tree]
    if len(nodes):
        node = np.flatnonzero(local)
        at = begins[tree[node]] + local[node] - 1
        draws[node[nodes[at] < 0], 0] = -1
        above = np.arange(len(tree))  # the draw of the parent; the root's is its own
        above[node] = start[tree[node]] + 1 + nodes[at + num_nodes[tree[node]]]
        ancestor, is_node = np.arange(len(tree)), local > 0
        while (below := is_node[ancestor]).any():
            draws[:, 2] += below
            ancestor = above[ancestor]
    return draws.ravel()


def child_arrays(all_params: Sequence[bytes], wanted: Sequence[bytes]) -> Arrays:
    """What `draw_next` reads: "all_params" and "draws". The arguments are those of
    `NativeChildren.draw`; each row has a draw."""
    asked = np.frombuffer(b"".join(wanted), np.int64).reshape(-1, 4)
    params, position, _, scale = asked.T
    draws = np.stack([params, np.arange(len(asked)), position, scale], 1)
    return {"all_params": np.frombuffer(b"".join(all_params), np.int64), "draws": draws.ravel()}


def has_filters(all_params: NDArray[np.int64]) -> bool:
    """Whether any of the parameter sets has top_k, top_p or min_p."""
    table = all_params.reshape(-1, PARAMS)
    temperature, top_p, log_min_p = table[:, 2:5].copy().view(np.float64).T
    some = (top_p < 1) | (log_min_p > -np.inf) | (table[:, 5] > 0)
    return bool((some & (temperature > 0)).any())


def read_paths(
    result: Tensor, packed_trees: PackedTrees, num_trees: int | None = None
) -> list[VerifiedPath]:
    """The outcome of every sequence.

    Args:
        result: of `run_verify`, int64 on the CPU.
        packed_trees: as they were given to `arrays_of`.
        num_trees: as many as the tensors had room for; None: no more than there are.
    """
    table = result.numpy()
    first_path = COLUMNS * (len(packed_trees) if num_trees is None else num_trees)
    ends = table[: COLUMNS * len(packed_trees)].reshape(-1, COLUMNS)
    peaks = ends[:, 2].astype(np.int32).view(np.float32).tolist()
    begins = np.frombuffer(b"".join(packed_trees.trees), np.int64).reshape(-1, TREE)[:, 2] // 2
    paths = table[first_path:].tolist()
    found = zip(ends[:, 0].tolist(), ends[:, 1].tolist(), peaks, begins.tolist(), strict=True)
    return [VerifiedPath(paths[at : at + length], token, peak) for token, length, peak, at in found]


class PackedProposals:
    """The sequences of a step that a ratio rule verifies, in one call."""

    def __init__(self) -> None:
        self._proposals: list[tuple[int, ...]] = []
        self._nodes: list[int] = []
        self._draft_probs: list[Tensor] = []
        self._num_draft_rows = 0
        self.max_nodes = 0

    def __len__(self) -> int:
        return len(self._proposals)

    @property
    def num_nodes(self) -> int:
        return len(self._nodes) // 2

    def add(
        self,
        stream: tuple[int, int, int],
        root_row: int,
        token_ids: Sequence[int],
        parents: Sequence[int],
        draft_probs: Tensor | None,
    ) -> None:
        """Add a sequence.

        Args:
            stream: seed, sample_index and the position of the root, which key its coins.
            root_row: its row of target probabilities; node i of its tree has the row i + 1 behind
                it.
            token_ids: of the nodes; -1 for one that is not verified.
            parents: an earlier node or -1, the root, for each.
            draft_probs: float [num_nodes, vocab_size], the distribution each node was drawn
                from; None: all are one-hot.
        """
        first_draft_row = -1
        if draft_probs is not None:
            first_draft_row = self._num_draft_rows
            self._num_draft_rows += len(draft_probs)
            self._draft_probs.append(draft_probs)
        seed, sample_index, position = (_signed(part) for part in stream)
        self._proposals.append(
            (root_row, len(self._nodes), len(token_ids), first_draft_row, seed, sample_index)
            + (position,)
        )
        self._nodes += [*token_ids, *parents]
        self.max_nodes = max(self.max_nodes, len(token_ids))

    def arrays(self) -> Arrays:
        """What `DeviceSampling.run_ratio` reads: "trials" and "nodes"."""
        proposals = np.array(self._proposals, np.int64).reshape(-1)
        return {"proposals": proposals, "nodes": np.array(self._nodes, np.int64)}

    def draft_probs(self, like: Tensor) -> Tensor:
        """The distributions of all drafts on the device of `like`, float32 [num_rows,
        vocab_size]."""
        probs = [one.to(like.device, torch.float32) for one in self._draft_probs]
        return torch.cat(probs) if probs else like.new_empty((0, like.shape[1]))


def _signed(part: int) -> int:
    """An integer modulo 2^64, as int64 has it."""
    part &= _MASK64
    return part - ((part >> 63) << 64)


class RatioPath(NamedTuple):
    """What a ratio rule found for a sequence."""

    path: list[int]
    """Accepted nodes, from the root's child downwards."""
    token_id: int
    """The token after the path; -1 where none is possible."""


def read_ratio_paths(result: Tensor, proposals: PackedProposals) -> list[RatioPath]:
    """The outcome of every sequence, from the result of `run_ratio` on the CPU."""
    table = result.tolist()
    paths = COLUMNS * len(proposals)
    ends = zip(table[:paths:COLUMNS], table[1:paths:COLUMNS], proposals._proposals, strict=True)
    starts = ((token, length, paths + proposal[1] // 2) for token, length, proposal in ends)
    return [RatioPath(table[at : at + length], token) for token, length, at in starts]


def on_device(arrays: Arrays, device: torch.device) -> dict[str, Tensor]:
    """The arrays as tensors, in one copy."""
    packed = torch.from_numpy(np.concatenate(list(arrays.values())))
    if device.type == "cuda":  # from pinned memory, lest the host wait for what runs before
        packed = packed.pin_memory()
    whole = packed.to(device, non_blocking=True)
    parts = whole.split([len(array) for array in arrays.values()])
    return dict(zip(arrays, parts, strict=True))


def read_children(result: Tensor) -> list[tuple[list[int], list[float]]]:
    """The token and its confidence of every row, or nothing, of a result on the CPU."""
    tokens, found, bits = result.numpy()
    chances = bits.astype(np.int32).view(np.float32).tolist()
    drawn = zip(tokens.tolist(), found.tolist(), chances, strict=True)
    return [([token], [chance]) if is_there else ([], []) for token, is_there, chance in drawn]
