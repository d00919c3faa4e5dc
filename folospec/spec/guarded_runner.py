"""Guards the models of a drafter: checks every argument before it is used.

Rows run only for the requests of the call of `propose` that is in progress.

    model        its KV           rows may run at the slots
    draft        the drafter's    0 .. root + num_slots
    self-draft   the target's     root .. root + num_slots: verification writes these again, and
                                  never those before the root

So a drafter cannot change the target's KV of committed tokens, nor the KV of another sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any, NamedTuple

from torch import Tensor

from folospec.kernels.sampling_records import check_filters
from folospec.models.base import ModelSpec, check_aux_layers
from folospec.models.forward import ForwardResult, Rows
from folospec.spec.checks import take_ints, take_list
from folospec.spec.draft_runner import Chains, ChainSampling, DraftRunner, DrawnChains
from folospec.spec.drafters.base import check_count
from folospec.spec.read_only import ReadOnlyList


class SlotRange(NamedTuple):
    """Where rows of one sequence may run: up to `num_slots` slots behind the root."""

    block_table: tuple[int, ...]
    root: int
    num_slots: int

    @property
    def end(self) -> int:
        return self.root + 1 + self.num_slots


class RunnerAccess:
    """What one drafter may run at the moment, on all of its models."""

    def __init__(self) -> None:
        self.runners: list[DraftRunner] = []
        """The models that the drafter has loaded, in order."""
        self.kv_owners: set[str] = set()
        """The names under which it has loaded models with KV of their own."""
        self.ranges: dict[int, SlotRange] = {}
        """By the id of the block table, which the range keeps alive."""
        self.lock = RLock()
        """Held during a pass: no pass outlasts the call that allows it, in whatever thread."""

    @contextmanager
    def granted(self, ranges: Iterable[SlotRange]) -> Iterator[None]:
        """Allow rows of these sequences, in these slots, inside the `with` block."""
        if self.runners:
            self.ranges = {id(one.block_table): one for one in ranges}
        try:
            yield
        finally:
            with self.lock:
                self.ranges = {}

    def take_tables(self, block_tables: Sequence[object]) -> list[SlotRange]:
        """The slots of sequences, each of which may be named once.

        Raises:
            ValueError: there are none, one is there twice, or one was not handed out in this call.
        """
        if not block_tables or len({*map(id, block_tables)}) < len(block_tables):
            raise ValueError(
                f"a pass must have rows of at least one sequence, and of each once, got "
                f"{len(block_tables)}"
            )
        found = [self.ranges.get(id(table)) for table in block_tables]
        if None in found:
            raise ValueError(
                "block_table must be that of a DraftRequest, the object itself, inside the call of "
                f"propose that hands it out, got {block_tables[found.index(None)]!r:.60}"
            )
        return found  # type: ignore[return-value]


class GuardedRunner:
    """Implements `DraftRunner` by a runner that trusts its caller.

    Args:
        spec: of the runner's model.
        is_self_draft: the KV is the target's.
    """

    def __init__(
        self, runner: DraftRunner, spec: ModelSpec, access: RunnerAccess, *, is_self_draft: bool
    ) -> None:
        self._runner, self._spec, self._access = runner, spec, access
        self._is_self_draft = is_self_draft
        access.runners.append(runner)

    @property
    def vocab_size(self) -> int:
        return self._spec.vocab_size

    def forward(self, batch: list[Rows], aux_layers: tuple[int, ...] = ()) -> ForwardResult:
        """See `DraftRunner.forward`.

        Raises:
            ValueError: a value has a wrong type, or is out of range; nothing has run then.
        """
        with self._access.lock:
            batch = list(take_list("batch", batch))
            for rows in batch:
                if type(rows) is not Rows:
                    raise ValueError(f"batch must be of Rows, got a {type(rows).__name__}")
            slots = self._access.take_tables([rows.block_table for rows in batch])
            checked = [self._take_rows(*pair) for pair in zip(batch, slots, strict=True)]
            aux_layers = take_ints("aux_layers", aux_layers)
            check_aux_layers(aux_layers, self._spec.num_layers)
            return self._runner.forward(checked, aux_layers)

    def chains(self, starts: Sequence[int], block_tables: Sequence[Sequence[int]]) -> Chains:
        """See `DraftRunner.chains`.

        Raises:
            ValueError: as for `forward`.
        """
        with self._access.lock:
            places = self._take_places(starts, block_tables)
            for slots, start in places:
                self._check_slots(slots, start, 1, 1)
            return _GuardedChains(self, places)

    def draw_chains(
        self,
        logits: Tensor,
        starts: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        chains: Sequence[ChainSampling],
    ) -> DrawnChains | None:
        """See `DraftRunner.draw_chains`.

        Raises:
            ValueError: as for `forward`.
        """
        with self._access.lock:
            places = self._take_places(starts, block_tables)
            chains = [_take_distribution(chain) for chain in take_list("all_params", chains)]
            _check_per_sequence("all_params", len(chains), len(places))
            for (slots, start), chain in zip(places, chains, strict=True):
                self._check_slots(slots, start, chain.length - 1, chain.length - 1)
            _check_logits(logits, len(places))
            tables = [slots.block_table for slots, _ in places]
            return self._runner.draw_chains(logits, [start for _, start in places], tables, chains)

    def warm_up_chains(self, max_num_seqs: int, length: int, vocab_size: int) -> None:
        """See `DraftRunner.warm_up_chains`.

        Raises:
            ValueError: a number is no integer, or below 1.
        """
        check_count("max_num_seqs", max_num_seqs)
        check_count("length", length)
        check_count("vocab_size", vocab_size)
        self._runner.warm_up_chains(max_num_seqs, length, vocab_size)

    def _take_rows(self, rows: Rows, slots: SlotRange) -> Rows:
        token_ids = self._take_token_ids(rows.token_ids)
        size, parents = len(token_ids), rows.parents
        counts = (rows.start, rows.num_logits, rows.num_computed)
        start, num_logits, num_computed = take_ints("start, num_logits and num_computed", counts)
        most_computed = 0 if parents is None else size - 1
        if not (0 <= num_computed <= most_computed and 0 <= num_logits <= size - num_computed):
            raise ValueError(
                f"num_computed must be in [0, {most_computed}], and num_logits at most the number "
                f"of rows that are run, got {num_computed} and {num_logits} of {size} rows"
            )
        num_positions = size
        if parents is not None:
            parents = take_ints("parents", parents)
            _check_per_sequence("parents", len(parents), size)
            num_positions = _num_levels(parents)
        self._check_slots(slots, start, size, num_positions)
        return Rows(token_ids, start, slots.block_table, num_logits, parents, num_computed)

    def _take_token_ids(self, values: Any) -> tuple[int, ...]:
        token_ids = take_ints("token_ids", values[:] if type(values) is ReadOnlyList else values)
        if not token_ids or min(token_ids) < 0 or max(token_ids) >= self._spec.vocab_size:
            raise ValueError(
                f"token_ids must be at least one id in [0, {self._spec.vocab_size}), got "
                f"{token_ids!r:.60}"
            )
        return token_ids

    def _take_places(self, starts: Any, block_tables: Any) -> list[tuple[SlotRange, int]]:
        slots = self._access.take_tables(take_list("block_tables", block_tables))
        starts = take_ints("starts", starts)
        _check_per_sequence("starts", len(starts), len(slots))
        return list(zip(slots, starts, strict=True))

    def _check_slots(self, slots: SlotRange, start: int, num_rows: int, num_positions: int) -> None:
        first = slots.root if self._is_self_draft else 0
        if start < first or start + num_rows > slots.end:
            raise ValueError(
                f"rows must be at the slots {first} to {slots.end - 1}, got {num_rows} from {start}"
            )
        if start + num_positions > self._spec.max_model_len:
            raise ValueError(
                f"positions must be below {self._spec.max_model_len}, got {num_positions} from "
                f"{start}"
            )


class _GuardedChains:
    """Implements `Chains`; usable while its tables are those of the call in progress."""

    def __init__(self, guard: GuardedRunner, places: list[tuple[SlotRange, int]]) -> None:
        self._guard, self._access = guard, guard._access
        self._ranges = self._access.ranges
        self._places, self._num_run = places, 0
        starts = [start for _, start in places]
        self._chains = guard._runner.chains(starts, [slots.block_table for slots, _ in places])

    def forward(self, token_ids: Sequence[int]) -> Tensor:
        """See `Chains.forward`.

        Raises:
            ValueError: as for `GuardedRunner.forward`.
        """
        with self._access.lock:
            self._check_in_call()
            token_ids = self._guard._take_token_ids(token_ids)
            _check_per_sequence("token_ids", len(token_ids), len(self._places))
            for slots, start in self._places:
                self._guard._check_slots(slots, start + self._num_run, 1, 1)
            self._num_run += 1
            return self._chains.forward(token_ids)

    def keep(self, chosen: Sequence[int]) -> None:
        """See `Chains.keep`.

        Raises:
            ValueError: `chosen` is empty, or has something twice, or no index of a sequence.
        """
        with self._access.lock:
            self._check_in_call()
            kept, count = take_ints("chosen", chosen), len(self._places)
            is_once = len(set(kept)) == len(kept) > 0
            if not (is_once and min(kept) >= 0 and max(kept) < count):
                raise ValueError(f"chosen must be indices below {count}, each once, got {kept}")
            self._chains.keep(kept)
            self._places = [self._places[index] for index in kept]

    def _check_in_call(self) -> None:
        if self._access.ranges is not self._ranges:
            raise ValueError("chains must be used inside the call of propose that began them")


def _check_per_sequence(name: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise ValueError(f"{name} must have {wanted} entries, got {found}")


def _num_levels(parents: Sequence[int]) -> int:
    """How many positions the rows of a tree take."""
    depths: list[int] = []
    for row, parent in enumerate(parents):
        if not -1 <= parent < row:
            raise ValueError(f"parents[{row}] must be in [-1, {row}), got {parent}")
        depths.append(depths[parent] + 1 if parent >= 0 else 1)
    return max(depths)


def _check_logits(logits: object, num_rows: int) -> None:
    if type(logits) is not Tensor or not logits.is_floating_point():
        raise ValueError(f"logits must be a Tensor of floats, got a {type(logits).__name__}")
    if logits.dim() != 2 or logits.shape[0] != num_rows or logits.shape[1] < 1:
        raise ValueError(
            f"logits must be of the shape [{num_rows}, vocab_size], got {list(logits.shape)}"
        )


def _take_distribution(chain: object) -> ChainSampling:
    if type(chain) is not ChainSampling:
        raise ValueError(f"distributions must be of ChainSampling, got a {type(chain).__name__}")
    if type(chain.packed) is not bytes:
        raise ValueError(f"packed must be bytes, got a {type(chain.packed).__name__}")
    check_filters(chain.packed)
    position, length = take_ints("position and length", (chain.position, chain.length))
    if not (-1 <= position < 2**62 and length >= 1):
        raise ValueError(
            f"position must be at least -1 and length at least 1, got {position} and {length}"
        )
    for name in ("scale", "min_probability"):
        value = getattr(chain, name)
        if type(value) is not float or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite float, got {value!r}")
    return ChainSampling(chain.packed, position, chain.scale, length, chain.min_probability)
