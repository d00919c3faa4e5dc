"""What a drafter with KV may ask of the worker: run these rows, at these slots, on my model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from folospec.kernels.native_sampling import Walk


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
    vocab_size] (float64 for a float64 model). `taps` maps a layer to the residual stream before it:
    [num_rows, hidden_size]. Both hold until the runner's next pass.

    Where the pass has drawn and verified too, `walked` waits for what came of it.
    """

    logits: Tensor
    taps: dict[int, Tensor] = field(default_factory=dict)
    walked: Callable[[], list[Walk]] | None = None
    num_passes: int = 1
    """Passes that were made in a row: more than one where the target has decoded several tokens."""


class ChainLaw(NamedTuple):
    """How the tokens of a chain are drawn, for a runner that draws them by itself."""

    packed: bytes
    """From `native_sampling.pack_law`."""
    position: int
    """Of the first token that is drawn; -1 where no noise is in it."""
    scale: float
    """Factor of the scores in the confidence."""
    length: int
    """Tokens that are wanted, at least 1."""
    least: float = 0.0
    """A chain whose joint confidence is below may end there; a runner may draw on all the same."""


class DrawnChains(NamedTuple):
    """For each chain its tokens, fewer than wanted where none was possible, and the confidence in
    each."""

    token_ids: list[list[int]]
    confidence: list[list[float]]


class Chains(Protocol):
    """Sequences that go on by a token in every pass, each behind the one before."""

    def forward(self, token_ids: Sequence[int]) -> Tensor:
        """Run the next token of every sequence, write its KV, and return the logits after it:
        float [num_seqs, vocab_size].

        Raises:
            ValueError: a sequence has no slot for it.
        """
        ...

    def keep(self, chosen: Sequence[int]) -> None:
        """Go on with these sequences alone, given by their indices, in this order."""
        ...


class DraftRunner(Protocol):
    """A model with KV tensors, indexed by the block tables of the target: its own, or for a view of
    the target the target's. The worker implements it; drafters never see the tensors."""

    @property
    def vocab_size(self) -> int: ...

    def forward(self, batch: list[Rows], taps: tuple[int, ...] = ()) -> ForwardResult:
        """Run the rows, writing their KV, in passes of at most the engine's token budget."""
        ...

    def chains(self, starts: Sequence[int], block_tables: Sequence[Sequence[int]]) -> Chains:
        """Sequences whose first token goes to slot index `starts[i]` of their table, which is its
        position too, and sees all that lies before it.

        Raises:
            ValueError: a sequence has no slot for it.
        """
        ...

    def draw_chains(
        self,
        logits: Tensor,
        starts: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        laws: Sequence[ChainLaw],
    ) -> DrawnChains | None:
        """Draw whole chains, and run all tokens but the last of each, without coming back to the
        host in between.

        Args:
            logits: float32 [num_seqs, vocab_size], of the rows that the first tokens follow; of as
                many tokens as may be drafted.
            starts, block_tables: as for `chains`, of the first token.

        Returns:
            None where this runner cannot; then nothing was run.

        Raises:
            ValueError: a chain has no slots for the tokens that are run.
        """
        ...

    def warm_up_chains(self, max_num_seqs: int, length: int, vocab_size: int) -> None:
        """Prepare for `draw_chains` of up to so many sequences and tokens, and for the passes that
        come before, if that takes time once."""
        ...


class RowChains:
    """`Chains` of a runner that has only `forward`: every pass is made from rows."""

    def __init__(
        self, runner: DraftRunner, starts: Sequence[int], block_tables: Sequence[Sequence[int]]
    ) -> None:
        self.runner = runner
        self._starts, self._tables = list(starts), list(block_tables)

    def forward(self, token_ids: Sequence[int]) -> Tensor:
        """See `Chains.forward`."""
        rows = zip(token_ids, self._starts, self._tables, strict=True)
        logits = self.runner.forward([Rows([t], start, table) for t, start, table in rows]).logits
        self._starts = [start + 1 for start in self._starts]
        return logits

    def keep(self, chosen: Sequence[int]) -> None:
        """See `Chains.keep`."""
        self._starts = [self._starts[index] for index in chosen]
        self._tables = [self._tables[index] for index in chosen]
