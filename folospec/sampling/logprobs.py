"""Computes the logprobs that a request asks for: of chosen and of most likely tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from folospec.outputs import Logprob
from folospec.sampling.pipeline import keep_largest, log_total, sort_descending

_MAX_CELLS = 1 << 22
"""Rows are worked off in pieces of this many numbers, to keep a long prompt's memory small."""


def log_softmax(logits: Tensor) -> Tensor:
    """Log-softmax of every row, row-independent bit for bit.

    Args:
        logits: float32 or float64 [num_rows, vocab_size].

    Returns:
        The same shape and type, computed in float64.
    """
    shifted = logits.double() - logits.amax(-1, keepdim=True)
    return (shifted - log_total(shifted)).to(logits.dtype)


def gather_logprobs(
    logits: Tensor,
    token_ids: Sequence[int],
    num_top: int | Sequence[int],
    *,
    processed: bool = False,
) -> list[dict[int, Logprob]]:
    """Look up the logprob and rank of one token per row and of the row's most likely tokens.

    Args:
        logits: float32 or float64 [num_rows, vocab_size], the model's own, or `pipeline.process`'s
            result with `processed`.
        token_ids: the token of each row.
        num_top: how many of the most likely tokens to add, for all rows or for each.
        processed: take the rows as log-probabilities; their impossible tokens are never among the
            most likely.

    Returns:
        Per row a map from token ids to logprobs: the row's token first, then the most likely ones
        in order, of equals the lowest id first. A rank is 1 + the number of tokens with a strictly
        greater logprob.
    """
    num_rows, vocab_size = logits.shape
    tops = [num_top] * num_rows if isinstance(num_top, int) else list(num_top)
    step = max(1, _MAX_CELLS // vocab_size)
    rows: list[dict[int, Logprob]] = []
    for start in range(0, num_rows, step):
        piece = logits[start : start + step]
        log_probs = piece if processed else log_softmax(piece)
        rows += _gather(log_probs, token_ids[start : start + step], tops[start : start + step])
    return rows


def _gather(
    log_probs: Tensor, token_ids: Sequence[int], tops: list[int]
) -> list[dict[int, Logprob]]:
    chosen = torch.as_tensor(list(token_ids), device=log_probs.device)[:, None]
    values = log_probs.gather(-1, chosen)
    ranks = (log_probs > values).sum(-1) + 1
    pairs = zip(token_ids, values[:, 0].tolist(), ranks.tolist(), strict=True)
    rows = [{int(t): Logprob(value, rank)} for t, value, rank in pairs]
    if any(tops):
        for row, most_likely in zip(rows, _most_likely(log_probs, tops), strict=True):
            # All greater ones are before it in the list; equal ones share the first one's rank.
            rank, last = 0, None
            for place, (token_id, value) in enumerate(most_likely, start=1):
                rank = rank if value == last else place
                last = value
                row.setdefault(token_id, Logprob(value, rank))
    return rows


def _most_likely(log_probs: Tensor, tops: list[int]) -> list[list[tuple[int, float]]]:
    """Token ids and logprobs of each row's `tops[row]` most likely possible tokens, in order."""
    count = torch.tensor(tops, device=log_probs.device)[:, None].clamp(max=log_probs.shape[1])
    wanted = keep_largest(log_probs, sort_descending(log_probs), count.clamp(min=1))
    wanted &= (count > 0) & (log_probs > float("-inf"))
    row_ids, token_ids = wanted.nonzero(as_tuple=True)
    found: list[list[tuple[int, float]]] = [[] for _ in tops]
    values = log_probs[row_ids, token_ids].tolist()
    for row, token_id, value in zip(row_ids.tolist(), token_ids.tolist(), values, strict=True):
        found[row].append((token_id, value))
    return [sorted(row, key=lambda item: (-item[1], item[0])) for row in found]
