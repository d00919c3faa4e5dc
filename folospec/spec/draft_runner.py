"""Defines what a drafter with KV may ask of the worker: rows at slots, on its own model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from folospec.models.forward import ForwardResult, Rows


class ChainSampling(NamedTuple):
    """How the tokens of a chain are drawn, for a runner that draws them by itself."""

    packed: bytes
    """From `sampling_records.pack_sampling`."""
    position: int
    """Of the first token that is drawn; -1 where no noise is in it."""
    scale: float
    """Factor of the scores in the confidence."""
    length: int
    """Tokens that are wanted, at least 1."""
    min_probability: float = 0.0
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
    """A model with KV tensors, indexed by the block tables of the target: its own, or for a
    self-draft model the target's. The worker implements it; drafters never see the tensors."""

    @property
    def vocab_size(self) -> int: ...

    def forward(self, batch: list[Rows], aux_layers: tuple[int, ...] = ()) -> ForwardResult:
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
        chains: Sequence[ChainSampling],
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
