"""Samples and verifies rows of logits on a GPU, in a few launches and with one host read.

It does what `native_sampling` does on the CPU, and has the ratio rules too.

    arrays_of(trees)   numpy, on the host: parameter sets, trees, nodes and draws, all int64
    run_verify(...)     launches alone: tensors in, `result` out; may be part of a CUDA graph
    read_paths(...)    the result, copied to the host, as `VerifiedPath`s

`DeviceSampling.draw_and_verify` is the three in a row. A row's outcome depends on that row, its
parameter set and its position alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import triton
from torch import Tensor

from folospec.kernels.gpu import launch
from folospec.kernels.gpu.coupled import verify_kernel
from folospec.kernels.gpu.draw import child_kernel, draw_kernel
from folospec.kernels.gpu.log_probs import write_kernel
from folospec.kernels.gpu.ratio import block_kernel, rejection_kernel
from folospec.kernels.gpu.row_passes import NUM_WARPS, RowPasses
from folospec.kernels.gpu.sampling_arrays import (
    DRAW,
    PROPOSAL,
    TREE,
    PackedProposals,
    arrays_of,
    child_arrays,
    has_filters,
    on_device,
    read_children,
    read_paths,
    result_size,
)
from folospec.kernels.sampling_records import PackedTrees, VerifiedPath


class DeviceSampling:
    """Sampling by Triton kernels.

    Args:
        part: tokens of the vocabulary that one program works on, a power of two; None: by the
            vocabulary.
        filtered_rows: filters are applied to so many rows at a time; each needs 8 bytes of memory
            for a token of the vocabulary.
    """

    def __init__(self, part: int | None = None, filtered_rows: int = 128) -> None:
        self._part, self._filtered_rows = part, filtered_rows

    @staticmethod
    def takes(logits: Tensor) -> bool:
        """Whether the rows are of the kind that the kernels read. Where kernels are interpreted
        they are slow, and do it only if FOLOSPEC_KERNELS=triton asks for them."""
        if launch.is_interpreted():
            runs = os.environ.get("FOLOSPEC_KERNELS") == "triton"
        else:
            runs = logits.device.type == "cuda" and _runs_on_cards()
        return (
            runs
            and logits.dtype == torch.float32
            and logits.dim() == 2
            and logits.shape[1] > 0
            and logits.stride(1) == 1
        )

    # ---- the target's tokens, and their paths --------------------------------------------------

    def draw_and_verify(self, logits: Tensor, packed_trees: PackedTrees) -> list[VerifiedPath]:
        """`NativeSampling.draw_and_verify`, with one host read.

        Raises:
            ValueError: a sequence has rows that there are no logits for.
        """
        return read_paths(self.start_verify(logits, packed_trees).cpu(), packed_trees)

    def start_verify(self, logits: Tensor, packed_trees: PackedTrees) -> Tensor:
        """`draw_and_verify` with the result, for `read_paths`, left on the device.

        Raises:
            ValueError: a sequence has rows that there are no logits for.
        """
        if packed_trees.num_rows > len(logits):
            raise ValueError(f"there are {len(logits)} rows of logits, not {packed_trees.num_rows}")
        arrays = arrays_of(packed_trees)
        tensors = on_device(arrays, logits.device)
        size = result_size(len(packed_trees), len(packed_trees.nodes) // 2)
        result = torch.empty(size, dtype=torch.int64, device=logits.device)
        most = int(arrays["trees"][3::TREE].max(initial=0))
        filters = has_filters(arrays["all_params"])
        self.run_verify(logits, tensors, result, filters=filters, max_nodes=most)
        return result

    def run_verify(
        self,
        logits: Tensor,
        tensors: dict[str, Tensor],
        result: Tensor,
        *,
        filters: bool = True,
        max_nodes: int | None = None,
    ) -> None:
        """Draw at all rows and verify all trees. Nothing is read on the host.

        Args:
            logits: float32 [*, vocab_size], such as `takes` says yes to.
            tensors: int64, of `sizes`.
            result: int64 of `result_size`: for every tree its token (-1 where none is possible),
                the length of its path and the bits of the peak; then the paths.
            filters: whether any parameter set has some; False is faster.
            max_nodes: of one tree; None: all nodes may be in one.
        """
        tokens, row_peaks = self.draw_tokens(
            logits, tensors["all_params"], tensors["draws"], filters=filters
        )
        self.verify_trees(tensors, tokens, row_peaks, result, max_nodes=max_nodes)

    def verify_trees(
        self,
        tensors: dict[str, Tensor],
        tokens: Tensor,
        row_peaks: Tensor,
        result: Tensor,
        *,
        max_nodes: int | None = None,
    ) -> None:
        """The second half of `run_verify`, of what `draw_tokens` gave for all rows."""
        num_trees = tensors["trees"].numel() // TREE
        if max_nodes is None:
            max_nodes = tensors["nodes"].numel() // 2
        rows = max(16, triton.next_power_of_2(max_nodes + 1))
        launch.launch(
            verify_kernel,
            (num_trees,),
            *(tensors["trees"], tensors["nodes"], tokens, row_peaks, result, num_trees),
            ROWS=rows,
            num_warps=4 if rows > 64 else 1,
        )

    def draw_tokens(
        self, logits: Tensor, all_params: Tensor, draws: Tensor, *, filters: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Draw the target's token for every draw. Nothing is read on the host.

        Args:
            all_params: int64 [6 * num_params], of `pack_sampling`.
            draws: int64 [4 * num_draws], see `gpu.params`.

        Returns:
            int64 [num_draws], -1 where no token is possible; and the largest logits, float32.
        """
        passes = RowPasses(logits, all_params, draws, self._part, filters=filters)
        tokens = torch.empty(passes.num_draws, dtype=torch.int64, device=logits.device)
        row_peaks = torch.empty_like(tokens, dtype=torch.float32)
        for rows, drawn, peaks, firsts, roughs, _, totals, kept in passes.chunks(
            self._filtered_rows
        ):
            found = (drawn, 0, peaks, firsts, roughs, totals, *kept)
            out = (tokens[rows], row_peaks[rows])
            passes.launch(draw_kernel, (len(drawn),), *found, *out)
        return tokens, row_peaks

    # ---- children of draft nodes ---------------------------------------------------------------

    def draw(
        self, logits: Tensor, all_params: Sequence[bytes], wanted: Sequence[bytes], most: int
    ) -> list[tuple[list[int], list[float]]]:
        """`NativeChildren.draw` for one child of every row, with one host read.

        Raises:
            ValueError: more children are wanted.
        """
        if most != 1:
            raise ValueError(f"one child can be drawn of every row, got most={most}")
        arrays = child_arrays(all_params, wanted)
        result = torch.empty((3, len(wanted)), dtype=torch.int64, device=logits.device)
        tensors = on_device(arrays, logits.device)
        self.draw_next(logits, tensors, result, filters=has_filters(arrays["all_params"]))
        return read_children(result.cpu())

    def draw_next(
        self,
        logits: Tensor,
        tensors: dict[str, Tensor],
        result: Tensor,
        *,
        filters: bool = True,
        advance: int = 0,
    ) -> None:
        """Draw the best child of every row and the confidence in it. Nothing is read on the host.

        Args:
            logits: float32 [num_rows, vocab_size], such as `takes` says yes to.
            tensors: "all_params" and "draws" of `child_arrays`. A greedy parameter set is read
                as temperature 1 without filters.
            result: int64 [3, num_rows]: the tokens, 0 where none is possible; 1 where one is, else
                0; and the bits of the confidences, float32. The confidence is off by about 1e-4 of
                itself times the scale, for its sum is made of `noise.rough_gumbel`.
            filters: whether any parameter set has some; False is faster.
            advance: added to the positions: those of a later token of the same chains.
        """
        passes = RowPasses(
            *(logits, tensors["all_params"], tensors["draws"], self._part),
            filters=filters,
            children=True,
            advance=advance,
        )
        for rows, drawn, peaks, _, roughs, sums, _, kept in passes.chunks(self._filtered_rows):
            found = (drawn, advance, peaks, roughs, sums, *kept)
            passes.launch(child_kernel, (len(drawn),), *found, result[:, rows], result.stride(0))

    # ---- log-probabilities, and the ratio rules ------------------------------------------------

    def log_probs(
        self, logits: Tensor, all_params: Sequence[bytes], params_of: Sequence[int]
    ) -> tuple[Tensor, Sequence[float]]:
        """`NativeSampling.log_probs`, with one host read, that of the peaks.

        Raises:
            ValueError: a parameter set is out of range, or not one is named for every row.
        """
        out, row_peaks = self.start_log_probs(logits, all_params, params_of)
        return out, row_peaks.tolist()

    def start_log_probs(
        self, logits: Tensor, all_params: Sequence[bytes], params_of: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """`log_probs` with the largest logits left on the device, float32 [num_rows]."""
        count, vocab = logits.shape
        if len(params_of) != count or any(
            not 0 <= params < len(all_params) for params in params_of
        ):
            raise ValueError(
                f"params_of must name one of {len(all_params)} parameter sets for each of "
                f"{count} rows, got {list(params_of)}"
            )
        table = np.zeros((count, DRAW), np.int64)
        table[:, 0], table[:, 1] = params_of, np.arange(count)
        arrays = {
            "all_params": np.frombuffer(b"".join(all_params), np.int64),
            "draws": table.ravel(),
        }
        tensors = on_device(arrays, logits.device)
        passes = RowPasses(
            *(logits, tensors["all_params"], tensors["draws"], self._part),
            filters=has_filters(arrays["all_params"]),
        )
        row_peaks = torch.empty(count, dtype=torch.float32, device=logits.device)
        out = torch.empty((count, vocab), dtype=torch.float32, device=logits.device)
        for rows, drawn, peaks, firsts, _, _, totals, kept in passes.chunks(self._filtered_rows):
            found = (drawn, peaks, firsts, totals, kept.lasts, kept.totals)
            grid = (len(drawn), passes.num_parts)
            passes.launch(write_kernel, grid, *found, out[rows], row_peaks[rows])
        return out, row_peaks

    def start_ratio(self, rule: str, target_probs: Tensor, proposals: PackedProposals) -> Tensor:
        """`run_ratio` for these sequences; the result, for `read_ratio_paths`, is left on the
        device."""
        tensors = on_device(proposals.arrays(), target_probs.device)
        size = result_size(len(proposals), proposals.num_nodes)
        result = torch.empty(size, dtype=torch.int64, device=target_probs.device)
        drafts = proposals.draft_probs(target_probs)
        self.run_ratio(rule, target_probs, drafts, tensors, result, max_nodes=proposals.max_nodes)
        return result

    def run_ratio(
        self,
        rule: str,
        target_probs: Tensor,
        draft_probs: Tensor,
        tensors: dict[str, Tensor],
        result: Tensor,
        *,
        max_nodes: int,
    ) -> None:
        """Verify all sequences. Nothing is read on the host. The verdicts are those of
        `spec.verify` with `KeyedCoins`, as far as float32 sums agree.

        Args:
            rule: "rejection", or "block", which verifies chains.
            target_probs: float32 [*, vocab_size].
            draft_probs: float32 [*, vocab_size], of the drafts of all trees.
            tensors: int64, of `PackedProposals.arrays`.
            result: int64 of `result_size`, as that of `run_verify`, with 0 for the peak.
            max_nodes: of one tree.

        Raises:
            ValueError: another rule, or parameter sets of another size or type.
        """
        vocab, kinds = target_probs.shape[1], {target_probs.dtype, draft_probs.dtype}
        if rule not in ("rejection", "block"):
            raise ValueError(f"rule must be 'rejection' or 'block', got {rule!r}")
        if kinds != {torch.float32} or draft_probs.shape[1] != vocab:
            raise ValueError(
                f"draft_probs must be float32 and cover the target's {vocab} tokens, "
                f"got {draft_probs.shape[1]} and the types {sorted(map(str, kinds))}"
            )
        num_proposals = tensors["proposals"].numel() // PROPOSAL
        scratch = target_probs.new_empty((num_proposals, vocab))
        most = 4096 if self._part is None else self._part
        constants = {"BLOCK": min(most, triton.next_power_of_2(vocab)), "num_warps": NUM_WARPS}
        if rule == "block":
            constants["NODES"] = triton.next_power_of_2(max_nodes + 1)
        launch.launch(
            block_kernel if rule == "block" else rejection_kernel,
            (num_proposals,),
            *(target_probs, target_probs.stride(0), vocab, draft_probs.contiguous()),
            *(tensors["proposals"], tensors["nodes"], scratch, result, num_proposals),
            **constants,
        )


@lru_cache(maxsize=1)
def _runs_on_cards() -> bool:
    return launch.runs_on(torch.device("cuda"))
