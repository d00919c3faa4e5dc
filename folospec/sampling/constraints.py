"""Applies the sampling stages that look at token ids and at a row's own history.

In their order: allowed ids, bad words, min_tokens, bias, penalties, the user's processors. They
change logits; temperature and the filters come after them (`pipeline`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from folospec.sampling_params import SamplingParams

NEG_INF = float("-inf")


class TokenCounts:
    """How often each token occurs in a list that grows at its end; every token is counted once."""

    def __init__(self) -> None:
        self._counts: np.ndarray | None = None
        self._num_counted = 0

    def of(self, token_ids: Sequence[int], vocab_size: int) -> np.ndarray:
        """The counts, int64 [vocab_size]; not to be changed."""
        if self._counts is None:
            self._counts = np.zeros(vocab_size, dtype=np.int64)
        new = token_ids[self._num_counted :]
        np.add.at(self._counts, np.array(new, dtype=np.int64), 1)
        self._num_counted += len(new)
        return self._counts


@dataclass(slots=True)
class SamplingRow:
    """One row of logits to be sampled from: whose it is, and which tokens come before it.

    The lists are read, never changed or kept, so rows may share them. The nodes of a draft tree
    share `output_token_ids` and put the drafts above them, root side first and themselves last,
    into `draft_token_ids`; they count as output in every stage. A row with drafts is hypothetical:
    when nothing can follow it, that is no error (see `process`).
    """

    params: SamplingParams
    prompt_token_ids: Sequence[int] = ()
    output_token_ids: Sequence[int] = ()
    draft_token_ids: Sequence[int] = ()
    bad_words_token_ids: Sequence[Sequence[int]] = ()
    """Every tokenization of `params.bad_words` that is to be prevented."""
    stop_ids: frozenset[int] = frozenset()
    """EOS and stop token ids, which may not come before `params.min_tokens` tokens."""
    is_draft: bool = False
    """The row is a drafter's: it is hypothetical even without drafts above it."""
    prompt_counts: TokenCounts | None = None
    output_counts: TokenCounts | None = None
    """Of the two lists, kept from step to step; without them the lists are counted anew."""

    @property
    def hypothetical(self) -> bool:
        """Whether plain decoding might never come to this row."""
        return self.is_draft or len(self.draft_token_ids) > 0

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids) + len(self.draft_token_ids)

    @property
    def history(self) -> list[int]:
        """The tokens generated before this row, drafts included: a new list."""
        return [*self.output_token_ids, *self.draft_token_ids]

    def last(self, count: int) -> list[int]:
        """The last `count` tokens of `history`, or all if it has fewer."""
        drafts = list(self.draft_token_ids[-count:]) if count else []
        missing = count - len(drafts)
        return [*self.output_token_ids[-missing:], *drafts] if missing else drafts


class NoTokenError(ValueError):
    """No token can follow a row: options exclude each other, or the logits are not finite.

    `row` is its index among the rows of the call, so that the one request can be ended and the
    others go on.
    """

    def __init__(self, row: int, message: str) -> None:
        super().__init__(message)
        self.row = row


def check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    """Refuse a request that names token ids which the model does not have.

    Raises:
        ValueError: an id of allowed_token_ids, logit_bias or stop_token_ids is out of range.
    """
    for name in ("allowed_token_ids", "logit_bias", "stop_token_ids"):
        for token_id in getattr(params, name) or ():
            if not 0 <= token_id < vocab_size:
                raise ValueError(
                    f"{name} must be token ids between 0 and {vocab_size - 1}, got {token_id}"
                )


def is_constrained(row: SamplingRow) -> bool:
    """Whether `constrain` may change the row's logits."""
    return any(uses(row) for uses, _ in _STAGES)


def constrain(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Apply the stages above to the rows that use them.

    Args:
        logits: float32 or float64 [num_rows, vocab_size]; not changed.
        rows: what is asked of each row.

    Returns:
        The constrained logits, of the same shape and type, -inf where a token is excluded; `logits`
        itself when no row uses any of the stages.

    Raises:
        NoTokenError: a user's processor returned something other than a row of logits, and the row
        has no drafts.
    """
    used = [(stage, indices) for uses, stage in _STAGES if (indices := _where(uses, rows))]
    if used:
        logits = logits.clone()
    for stage, indices in used:
        stage(logits, rows, indices)
    return logits


def _where(uses: Callable[[SamplingRow], bool], rows: Sequence[SamplingRow]) -> list[int]:
    return [index for index, row in enumerate(rows) if uses(row)]


def _uses_allowed_ids(row: SamplingRow) -> bool:
    return row.params.allowed_token_ids is not None


def _allow_ids(logits: Tensor, rows: Sequence[SamplingRow], indices: list[int]) -> None:
    excluded_of: dict[
        int, Tensor
    ] = {}  # by the identity of the list, which siblings and nodes share
    for index in indices:
        allowed = rows[index].params.allowed_token_ids
        assert allowed is not None
        if id(allowed) not in excluded_of:
            excluded = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
            excluded[torch.as_tensor(list(allowed), device=logits.device)] = False
            excluded_of[id(allowed)] = excluded
        logits[index].masked_fill_(excluded_of[id(allowed)], NEG_INF)


def _uses_bad_words(row: SamplingRow) -> bool:
    return bool(row.bad_words_token_ids)


def _ban_bad_words(logits: Tensor, rows: Sequence[SamplingRow], indices: list[int]) -> None:
    cells = []
    for index in indices:
        row = rows[index]
        longest = max(map(len, row.bad_words_token_ids))
        tail = row.last(longest - 1)
        for word in row.bad_words_token_ids:
            *head, last = word
            if not head or tail[-len(head) :] == head:
                cells.append((index, last))
    _exclude(logits, cells)


def _uses_min_tokens(row: SamplingRow) -> bool:
    return row.params.min_tokens > row.num_output_tokens and bool(row.stop_ids)


def _ban_stops(logits: Tensor, rows: Sequence[SamplingRow], indices: list[int]) -> None:
    _exclude(logits, [(i, token_id) for i in indices for token_id in rows[i].stop_ids])


def _exclude(logits: Tensor, cells: list[tuple[int, int]]) -> None:
    if cells:
        at = torch.tensor(cells, device=logits.device)
        logits[at[:, 0], at[:, 1]] = NEG_INF


def _uses_bias(row: SamplingRow) -> bool:
    return bool(row.params.logit_bias)


def _add_bias(logits: Tensor, rows: Sequence[SamplingRow], indices: list[int]) -> None:
    biases = [(i, *item) for i in indices for item in (rows[i].params.logit_bias or {}).items()]
    row_ids, token_ids, values = zip(*biases, strict=True)
    at = torch.tensor([row_ids, token_ids], device=logits.device)
    logits[at[0], at[1]] += torch.tensor(values, dtype=logits.dtype, device=logits.device)


def _uses_penalties(row: SamplingRow) -> bool:
    p = row.params
    return p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0


def _penalize(logits: Tensor, rows: Sequence[SamplingRow], indices: list[int]) -> None:
    def column(name: str) -> Tensor:
        values = [getattr(rows[i].params, name) for i in indices]
        return torch.tensor(values, dtype=logits.dtype, device=logits.device)[:, None]

    vocab_size = logits.shape[1]
    used = [rows[i] for i in indices]
    in_prompt = _counts([(r.prompt_token_ids, r.prompt_counts, ()) for r in used], vocab_size)
    in_output = _counts(
        [(r.output_token_ids, r.output_counts, r.draft_token_ids) for r in used], vocab_size
    )
    counts = torch.from_numpy(in_output).to(logits.device)
    seen = (counts > 0) | torch.from_numpy(in_prompt > 0).to(logits.device)
    repetition = column("repetition_penalty")
    at = torch.tensor(indices, device=logits.device)
    old = logits if len(indices) == len(rows) else logits.index_select(0, at)
    new = torch.where(seen, torch.where(old > 0, old / repetition, old * repetition), old)
    new = new - column("frequency_penalty") * counts
    new = new - column("presence_penalty") * (counts > 0)
    logits.index_copy_(0, at, new)


def _counts(
    histories: list[tuple[Sequence[int], TokenCounts | None, Sequence[int]]], vocab_size: int
) -> np.ndarray:
    """How often each token occurs, int64 [num_rows, vocab_size].

    The nodes of a tree share the long part of their history, which is counted once.
    """
    counted: dict[int, np.ndarray] = {}
    counts = np.empty((len(histories), vocab_size), dtype=np.int64)
    for row, (base, kept, path) in enumerate(histories):
        if id(base) not in counted:
            counted[id(base)] = (kept or TokenCounts()).of(base, vocab_size)
        counts[row] = counted[id(base)]
        for token_id in path:
            counts[row, token_id] += 1
    return counts


def _uses_processors(row: SamplingRow) -> bool:
    return bool(row.params.logits_processors)


def _call_processors(logits: Tensor, rows: Sequence[SamplingRow], indices: list[int]) -> None:
    for index in indices:
        row = rows[index]
        values = logits[index]
        for ordinal, processor in enumerate(row.params.logits_processors):
            try:
                values = processor(row.history, values)
                _check_row(values, logits.shape[1])
                logits[index] = values.detach()  # fails for a sparse row, or one without data
            except Exception as error:
                # Plain decoding might never ask for what follows a draft, so its failure must not
                # be seen there.
                if not row.hypothetical:
                    name = f"logits_processors[{ordinal}]"
                    raise NoTokenError(index, f"{name} failed: {error!r}") from error
                logits[index] = NEG_INF
                break


def _check_row(values: object, vocab_size: int) -> None:
    if not isinstance(values, Tensor):
        what = f"a value of type {type(values).__name__}"
    elif values.shape != (vocab_size,) or values.is_complex():
        what = f"{values.dtype} of shape {tuple(values.shape)}"
    else:
        return
    raise ValueError(f"must return a row of {vocab_size} logits, returned {what}")


_Stage = Callable[[Tensor, Sequence[SamplingRow], list[int]], None]
_STAGES: tuple[tuple[Callable[[SamplingRow], bool], _Stage], ...] = (
    (_uses_allowed_ids, _allow_ids),
    (_uses_bad_words, _ban_bad_words),
    (_uses_min_tokens, _ban_stops),
    (_uses_bias, _add_bias),
    (_uses_penalties, _penalize),
    (_uses_processors, _call_processors),
)
