"""Packs what sampling sends to the device, and reads what comes back.

All of it is int64, made and read with numpy on the host. See `gpu.sampling` for the kernels, and
`gpu.law` for distributions and draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from folospec.kernels.sampling_records import Walk, Walks

Arrays = dict[str, NDArray[np.int64]]
LAW, TREE, DRAW, TRIAL, COLUMNS = 6, 4, 4, 7, 3
"""int64 in each, and those of a walk in the result: its token, the length of its path, the bits of
the largest logit (float32)."""
_MASK64 = 0xFFFFFFFFFFFFFFFF


def sizes(num_walks: int, num_nodes: int) -> dict[str, tuple[torch.dtype, int]]:
    """The type and length of the tensors of `run_walks` for so many walks and nodes of all trees.

    Where there are fewer, "draws" is to be -1 beyond what there is, and the others 0: then the
    logits of a row that nobody asked for are not read, and its token is -1.
    """
    lengths = {
        "laws": LAW * num_walks,
        "trees": TREE * num_walks,
        "nodes": 2 * num_nodes,
        "draws": DRAW * (num_walks + num_nodes),
    }
    return {name: (torch.int64, length) for name, length in lengths.items()}


def result_size(num_walks: int, num_nodes: int) -> int:
    """How many int64 the result of `run_walks` has."""
    return COLUMNS * num_walks + num_nodes


def arrays_of(walks: Walks) -> Arrays:
    """What `run_walks` reads, by the names of `sizes`."""
    laws = np.frombuffer(b"".join(walks.laws), np.int64)
    trees = np.frombuffer(b"".join(walks.trees), np.int64)
    nodes = np.array(walks.nodes, np.int64)
    return {"laws": laws, "trees": trees, "nodes": nodes, "draws": _draws_of(trees, nodes)}


def _draws_of(flat_trees: NDArray[np.int64], nodes: NDArray[np.int64]) -> NDArray[np.int64]:
    """A draw for every row of every tree, in their order; none at nodes that are not judged."""
    trees = flat_trees.reshape(-1, TREE)
    root_rows, positions, begins, num_nodes = trees.T
    walk = np.repeat(np.arange(len(trees)), num_nodes + 1)
    start = np.arange(len(trees)) + begins // 2
    local = np.arange(len(walk)) - start[walk]
    draws = np.zeros((len(walk), DRAW), np.int64)
    draws[:, 0] = walk
    draws[:, 1] = root_rows[walk] + local
    draws[:, 2] = positions[walk]
    if len(nodes):
        node = np.flatnonzero(local)
        at = begins[walk[node]] + local[node] - 1
        draws[node[nodes[at] < 0], 0] = -1
        above = np.arange(len(walk))  # the draw of the parent; the root's is its own
        above[node] = start[walk[node]] + 1 + nodes[at + num_nodes[walk[node]]]
        ancestor, is_node = np.arange(len(walk)), local > 0
        while (below := is_node[ancestor]).any():
            draws[:, 2] += below
            ancestor = above[ancestor]
    return draws.ravel()


def child_arrays(laws: Sequence[bytes], wanted: Sequence[bytes]) -> Arrays:
    """What `draw_next` reads: "laws" and "draws". The arguments are those of
    `NativeChildren.draw`; each row has a draw."""
    asked = np.frombuffer(b"".join(wanted), np.int64).reshape(-1, 4)
    law, position, _, scale = asked.T
    draws = np.stack([law, np.arange(len(asked)), position, scale], 1)
    return {"laws": np.frombuffer(b"".join(laws), np.int64), "draws": draws.ravel()}


def has_filters(laws: NDArray[np.int64]) -> bool:
    """Whether any of the laws has top_k, top_p or min_p."""
    table = laws.reshape(-1, LAW)
    temperature, top_p, log_min_p = table[:, 2:5].copy().view(np.float64).T
    some = (top_p < 1) | (log_min_p > -np.inf) | (table[:, 5] > 0)
    return bool((some & (temperature > 0)).any())


def read_walks(result: Tensor, walks: Walks, num_walks: int | None = None) -> list[Walk]:
    """The outcome of every sequence.

    Args:
        result: of `run_walks`, int64 on the CPU.
        walks: as they were given to `arrays_of`.
        num_walks: as many as the tensors had room for; None: no more than there are.
    """
    table = result.numpy()
    first_path = COLUMNS * (len(walks) if num_walks is None else num_walks)
    ends = table[: COLUMNS * len(walks)].reshape(-1, COLUMNS)
    peaks = ends[:, 2].astype(np.int32).view(np.float32).tolist()
    begins = np.frombuffer(b"".join(walks.trees), np.int64).reshape(-1, TREE)[:, 2] // 2
    paths = table[first_path:].tolist()
    found = zip(ends[:, 0].tolist(), ends[:, 1].tolist(), peaks, begins.tolist(), strict=True)
    return [Walk(paths[at : at + length], token, peak) for token, length, peak, at in found]


class Trials:
    """The sequences of a step that a ratio rule judges, in one call."""

    def __init__(self) -> None:
        self._trials: list[tuple[int, ...]] = []
        self._nodes: list[int] = []
        self._draft_probs: list[Tensor] = []
        self._num_draft_rows = 0
        self.max_nodes = 0

    def __len__(self) -> int:
        return len(self._trials)

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
            root_row: its row of laws; node i of its tree has the row i + 1 behind it.
            token_ids: of the nodes; -1 for one that is not judged.
            parents: an earlier node or -1, the root, for each.
            draft_probs: float [num_nodes, vocab_size], the law each node was drawn from; None: all
                are one-hot.
        """
        first_draft_row = -1
        if draft_probs is not None:
            first_draft_row = self._num_draft_rows
            self._num_draft_rows += len(draft_probs)
            self._draft_probs.append(draft_probs)
        seed, sample_index, position = (_signed(part) for part in stream)
        self._trials.append(
            (root_row, len(self._nodes), len(token_ids), first_draft_row, seed, sample_index)
            + (position,)
        )
        self._nodes += [*token_ids, *parents]
        self.max_nodes = max(self.max_nodes, len(token_ids))

    def arrays(self) -> Arrays:
        """What `DeviceSampling.run_ratio` reads: "trials" and "nodes"."""
        trials = np.array(self._trials, np.int64).reshape(-1)
        return {"trials": trials, "nodes": np.array(self._nodes, np.int64)}

    def draft_probs(self, like: Tensor) -> Tensor:
        """The laws of all drafts on the device of `like`, float32 [num_rows, vocab_size]."""
        laws = [law.to(like.device, torch.float32) for law in self._draft_probs]
        return torch.cat(laws) if laws else like.new_empty((0, like.shape[1]))


def _signed(part: int) -> int:
    """An integer modulo 2^64, as int64 has it."""
    part &= _MASK64
    return part - ((part >> 63) << 64)


class Judged(NamedTuple):
    """What a ratio rule found for a sequence."""

    path: list[int]
    """Accepted nodes, from the root's child downwards."""
    token_id: int
    """The token after the path; -1 where none is possible."""


def read_trials(result: Tensor, trials: Trials) -> list[Judged]:
    """The outcome of every sequence, from the result of `run_ratio` on the CPU."""
    table = result.tolist()
    paths = COLUMNS * len(trials)
    ends = zip(table[:paths:COLUMNS], table[1:paths:COLUMNS], trials._trials, strict=True)
    starts = ((token, length, paths + trial[1] // 2) for token, length, trial in ends)
    return [Judged(table[at : at + length], token) for token, length, at in starts]


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
