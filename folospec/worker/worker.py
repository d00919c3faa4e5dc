"""Runs the models of an engine, and owns every KV tensor.

What crosses its border are step records, slots and logits.

    execute   the target over the rows of a step, or several passes of it in a row
    apply     copies of blocks and moves of rows, in the KV of every owner
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from folospec.core.kv_moves import KVMoves
from folospec.core.sequence_step import SequenceStep
from folospec.core.token_tree import TokenTree, Verdict
from folospec.kernels.sampling_records import pack_sampling
from folospec.models.forward import ForwardResult, Rows
from folospec.spec.draft_runner import ChainSampling
from folospec.spec.verify_rows import pack_trees
from folospec.worker.model_runner import ModelRunner

if TYPE_CHECKING:
    from folospec.core.kv_cache_manager import BlockCopy

TARGET = "target"
"""The target's name among the owners of KV."""


class Worker:
    """The target, and the draft models with KV of their own.

    Args:
        runners: by owner; the target's is `TARGET`.
        aux_layers: layers whose input every pass of the target returns.
        verifies: a pass that runs as a CUDA graph may draw and verify by itself.
        lengths: how many passes of the target may follow each other in a step, longest first.
    """

    def __init__(
        self,
        runners: Mapping[str, ModelRunner],
        aux_layers: tuple[int, ...] = (),
        *,
        verifies: bool = False,
        lengths: Sequence[int] = (),
    ) -> None:
        self.runners, self.target = runners, runners[TARGET]
        self.aux_layers, self._lengths = aux_layers, (*lengths, 1)
        self._verifies = verifies and self.target.graphs is not None

    def execute(
        self, steps: Sequence[SequenceStep], *, is_multi_step: bool = False
    ) -> ForwardResult:
        """Run the target over all rows, and say in the steps which rows are whose.

        Args:
            is_multi_step: nothing was drafted, and the slots behind the last tokens are for further
                passes of the target. Where only logits and noise decide these are made, and trees
                and verdicts filled in; a sequence without any possible token is left to be
                verified.
        """
        batch = [_rows_of(step) for step in steps]
        _place(steps, batch)
        is_multi_step = is_multi_step and _may_decode_on(steps)
        packed_trees = None
        if self._verifies and not is_multi_step and all(map(_draws_once, steps)):
            packed_trees = pack_trees(steps)
        result = self.target.forward(batch, self.aux_layers, packed_trees)
        if is_multi_step:
            result.num_passes += self._decode_on(steps, result)
        return result

    def _decode_on(self, steps: Sequence[SequenceStep], result: ForwardResult) -> int:
        """Draw what follows a pass over the last token of every sequence; return how many passes
        were made for it."""
        most = max(1 + step.num_draft_slots for step in steps)
        length = next(length for length in self._lengths if length <= most)
        chains = [
            ChainSampling(
                pack_sampling(step.group.seed, step.seq.sample_index, step.group.sampling.filters),
                step.seq.num_tokens,
                1.0,
                min(length, 1 + step.num_draft_slots),
            )
            for step in steps
        ]
        drawn = self.target.draw_chains(
            result.logits,
            [step.seq.num_tokens for step in steps],
            [step.seq.block_table for step in steps],
            chains,
            as_target=True,
        )
        if drawn is None:
            return 0
        for step, token_ids in zip(steps, drawn.token_ids, strict=True):
            if token_ids:
                step.tree = TokenTree.chain(token_ids[:-1])
                path = list(range(len(token_ids) - 1))
                step.verdicts = [Verdict(path, token_ids[-1])]
        return length - 1

    def apply(self, copies: Sequence[BlockCopy] = (), moves: KVMoves | None = None) -> None:
        """Copy blocks in the KV of every owner, and move rows in that of each owner by itself."""
        if copies:
            for runner in self.runners.values():
                assert runner.kv is not None
                runner.kv.copy_blocks(copies)
        for owner, (sources, targets) in moves.of_owner.items() if moves is not None else ():
            kv = self.runners[owner].kv
            assert kv is not None
            kv.move_rows(sources, targets)


def _rows_of(step: SequenceStep) -> Rows:
    seq, tree = step.seq, step.tree
    token_ids = seq.token_ids[step.start : step.start + step.num_tokens]
    wants_all = step.wants_all_logits
    num_logits = step.num_tokens if wants_all else int(step.samples) + len(tree)
    if tree.is_chain:
        token_ids += tree.token_ids
        return Rows(token_ids, step.start, seq.block_table, num_logits)
    parents = [-1, *(parent + 1 for parent in tree.parents)]
    rows = [*token_ids, *tree.token_ids]
    return Rows(rows, step.start, seq.block_table, num_logits, parents)


def _place(steps: Sequence[SequenceStep], batch: Sequence[Rows]) -> None:
    """Say in the steps where their rows are, and which rows of logits they have."""
    row = last = 0
    for step, rows in zip(steps, batch, strict=True):
        step.first_row = row
        row += len(rows.token_ids)
        first, last = last, last + rows.num_logits
        if step.wants_all_logits:
            step.prompt_logits_indices = range(first, last)
        if step.samples:
            step.logits_indices = range(last - 1 - len(step.tree), last)
            pending = step.seq is step.group.sequences[0]
            step.num_draws += step.group.num_pending_siblings if pending else 0


def _may_decode_on(steps: Sequence[SequenceStep]) -> bool:
    """Whether nothing but logits and noise decides, for sequences that all decode."""
    return any(step.num_draft_slots > 0 for step in steps) and all(
        step.samples
        and step.num_tokens == step.num_draws == 1
        and not step.group.sampling.is_constrained
        for step in steps
    )


def _draws_once(step: SequenceStep) -> bool:
    """Whether nothing but logits and noise decides, for one sequence."""
    is_constrained = step.group.sampling.is_constrained
    return len(step.logits_indices) > 0 and step.num_draws == 1 and not is_constrained
