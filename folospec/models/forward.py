"""Defines what goes into a forward pass, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from folospec.kernels.sampling_records import VerifiedPath


@dataclass(slots=True)
class Rows:
    """Consecutive rows of one sequence in a forward pass.

    Row r is written at slot index `start + r` of the block table and sees the KV of the slots below
    `start`, its ancestors among the rows, and itself. Its position is `start` plus its depth among
    the rows.
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    num_logits: int = 1
    """Logits are computed for this many rows, the last ones."""
    parents: Sequence[int] | None = None
    """Parent row of each row, -1 for row 0; None is a chain, where row r's parent is row r - 1."""
    num_computed: int = 0
    """This many leading rows have their KV from an earlier pass: they are seen, and not run. Only
    with `parents`."""

    @property
    def num_run(self) -> int:
        """Rows that the pass computes."""
        return len(self.token_ids) - self.num_computed


@dataclass(slots=True)
class ForwardResult:
    """`logits` holds the wanted rows of all sequences, one after the other: float32 [num_logits,
    vocab_size] (float64 for a float64 model). `aux_hidden_states` maps a layer to the residual
    stream before it: [num_rows, hidden_size]. Both hold until the runner's next pass.

    Where the pass has drawn and verified too, `verified` waits for what came of it.
    """

    logits: Tensor
    aux_hidden_states: dict[int, Tensor] = field(default_factory=dict)
    verified: Callable[[], list[VerifiedPath]] | None = None
    num_passes: int = 1
    """Passes that were made in a row: more than one where the target has decoded several tokens."""
