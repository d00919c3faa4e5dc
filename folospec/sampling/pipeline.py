"""Turns logits into the distribution that a token is drawn from.

Plain and speculative steps use this one pipeline.

The order is fixed: allowed ids, bad words, min_tokens, bias, penalties, user processors
(`constraints`), then temperature, top_k, top_p, min_p, each on the probabilities that the stage
before it left. All rows are done at once, and a row's result does not depend, bit for bit, on the
other rows: float operations are elementwise, and sums over the vocabulary are sums of integers,
which have no order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from folospec.kernels import sampling_records
from folospec.kernels.native_sampling import NativeSampling
from folospec.kernels.sampling import kernels_for
from folospec.sampling.constraints import NEG_INF, NoTokenError, SamplingRow, constrain
from folospec.sampling_params import SamplingParams

if TYPE_CHECKING:
    from folospec.kernels.gpu.sampling import DeviceSampling

__all__ = [
    "NoTokenError",
    "SamplingRow",
    "keep_largest",
    "log_total",
    "no_token_error",
    "pack_filters",
    "process",
    "sort_descending",
]

_MASKING_OPTIONS = (
    "allowed_token_ids",
    "bad_words",
    "min_tokens",
    "logit_bias",
    "logits_processors",
)


def process(logits: Tensor, rows: Sequence[SamplingRow], *, soften_greedy: bool = False) -> Tensor:
    """Log-probabilities of the distribution that each row's token is drawn from.

    Args:
        logits: float32 or float64 [num_rows, vocab_size], of the model; not changed.
        rows: what is asked of each row, and its history.
        soften_greedy: give greedy rows the distribution at temperature 1, without filters, in which
            drafters look for the second and third choice.

    Returns:
        [num_rows, vocab_size] of the type of `logits`, normalised; -inf marks what cannot be drawn.
        A greedy row has 0 at its arg-max (the lowest id of equals) and -inf elsewhere. A row below
        drafts after which nothing can follow is -inf throughout, because plain decoding might never
        have come there.

    Raises:
        NoTokenError: (a ValueError) nothing can follow a row without drafts; the message names the
        request's options. ValueError: another type, or another number of rows.
    """
    if logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logits must be float32 or float64, got {logits.dtype}")
    if logits.dim() != 2 or logits.shape[0] != len(rows):
        raise ValueError(f"logits must have {len(rows)} rows, got the shape {tuple(logits.shape)}")
    logits = constrain(logits, rows)
    kernels = kernels_for(logits)
    if kernels is not None:
        return _process_by_kernels(kernels, logits, rows, soften_greedy)
    peak = logits.amax(-1, keepdim=True)
    possible = torch.isfinite(peak)
    all_possible = bool(possible.all())
    if not all_possible:
        _require_token(possible[:, 0].tolist(), peak[:, 0].tolist(), rows)
        logits = logits.masked_fill(~possible, 0.0)
        peak = peak.masked_fill(~possible, 0.0)
    log_probs = _by_kind(logits, peak, [row.params for row in rows], soften_greedy)
    return log_probs if all_possible else log_probs.masked_fill_(~possible, NEG_INF)


def _process_by_kernels(
    kernels: NativeSampling | DeviceSampling,
    logits: Tensor,
    rows: Sequence[SamplingRow],
    soften_greedy: bool,
) -> Tensor:
    all_params: dict[int, bytes] = {}  # by the identity of the parameters, which many rows share
    for row in rows:
        if id(row.params) not in all_params:
            softened = soften_greedy and row.params.greedy
            filters = _SOFTENED if softened else pack_filters(row.params)
            all_params[id(row.params)] = sampling_records.pack_sampling(0, 0, filters)
    places = {params: place for place, params in enumerate(all_params)}
    params_of = [places[id(row.params)] for row in rows]
    log_probs, peaks = kernels.log_probs(logits, list(all_params.values()), params_of)
    _require_token([math.isfinite(peak) for peak in peaks], peaks, rows)
    return log_probs


_SOFTENED = sampling_records.pack_filters(1.0, 0, 1.0, 0.0)


def pack_filters(params: SamplingParams) -> bytes:
    """Temperature, top_k, top_p and min_p as the native kernels read them."""
    return sampling_records.pack_filters(
        params.temperature, params.top_k, params.top_p, params.min_p
    )


def _require_token(
    possible: Sequence[bool], peaks: Sequence[float], rows: Sequence[SamplingRow]
) -> None:
    for index, row in enumerate(rows):
        if not (possible[index] or row.hypothetical):
            raise no_token_error(index, row, peaks[index])


def no_token_error(index: int, row: SamplingRow, peak: float) -> NoTokenError:
    """What is wrong with row `index`, whose largest logit is -inf, or no number to draw by."""
    if peak != NEG_INF:
        return NoTokenError(index, f"logits must not be NaN or +inf, got {peak}")
    names = [n for n in _MASKING_OPTIONS if getattr(row.params, n)]
    what = f"{', '.join(names)} must leave a token possible" if names else "logits must be finite"
    return NoTokenError(index, f"{what}, got none after {row.num_output_tokens} output tokens")


def _by_kind(
    logits: Tensor, peak: Tensor, params: list[SamplingParams], soften_greedy: bool
) -> Tensor:
    """Greedy, filtered and other rows apart: no row pays for a stage that it does not use."""
    kinds: dict[Callable[..., Tensor], list[int]] = {}
    for index, p in enumerate(params):
        kind = _softened if soften_greedy and p.greedy else _kind(p)
        kinds.setdefault(kind, []).append(index)
    if len(kinds) == 1:
        return next(iter(kinds))(logits, peak, params)
    log_probs = torch.empty_like(logits)
    for kind, indices in kinds.items():
        at = torch.tensor(indices, device=logits.device)
        chosen = logits.index_select(0, at), peak.index_select(0, at)
        log_probs.index_copy_(0, at, kind(*chosen, [params[i] for i in indices]))
    return log_probs


def _kind(params: SamplingParams) -> Callable[..., Tensor]:
    if params.greedy:
        return _one_hot
    return _filtered if params.top_k > 0 or params.top_p < 1 or params.min_p > 0 else _tempered


def _one_hot(logits: Tensor, peak: Tensor, params: list[SamplingParams]) -> Tensor:
    best = logits.argmax(-1, keepdim=True)
    return torch.full_like(logits, NEG_INF).scatter_(-1, best, 0.0)


def _softened(logits: Tensor, peak: Tensor, params: list[SamplingParams]) -> Tensor:
    return logits.log_softmax(-1)


def _tempered(logits: Tensor, peak: Tensor, params: list[SamplingParams]) -> Tensor:
    scaled = _apply_temperature(logits, peak, params)
    total = _weights(scaled).sum(-1, keepdim=True)
    return (scaled - _log_of_weight(total, logits.shape[1])).to(logits.dtype)


def _filtered(logits: Tensor, peak: Tensor, params: list[SamplingParams]) -> Tensor:
    """top_k, top_p and min_p: each keeps some most likely tokens, so the least number decides."""
    vocab_size = logits.shape[1]
    ordered = sort_descending(logits)
    scaled = _apply_temperature(ordered, peak, params)
    weights = _weights(scaled)
    top_k = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
    count = _column(top_k, logits, torch.int64)
    sums = weights.cumsum(-1)
    if any(p.top_p < 1 for p in params):
        # A token is kept if those before it have not reached top_p of what top_k left.
        share = _column([p.top_p if p.top_p < 1 else math.inf for p in params], logits)
        bound = share * sums.gather(-1, count - 1)
        reached = ((sums - weights).double() < bound).sum(-1, keepdim=True)
        count = torch.minimum(count, reached)
    if any(p.min_p > 0 for p in params):
        floor = _column([math.log(p.min_p) if p.min_p > 0 else NEG_INF for p in params], logits)
        count = torch.minimum(count, (scaled >= floor).sum(-1, keepdim=True))
    log_total_weight = _log_of_weight(sums.gather(-1, count - 1), vocab_size)
    log_probs = _apply_temperature(logits, peak, params).sub_(log_total_weight).to(logits.dtype)
    return torch.where(keep_largest(logits, ordered, count), log_probs, NEG_INF)


def _apply_temperature(logits: Tensor, peak: Tensor, params: list[SamplingParams]) -> Tensor:
    # The peak goes first: a tiny temperature then makes -inf of the others, and never inf - inf.
    scaled = logits.double() - peak
    if all(p.temperature == 1 for p in params):
        return scaled
    return scaled.div_(_column([p.temperature for p in params], logits))


def _column(values: list, like: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]


def sort_descending(values: Tensor) -> Tensor:
    """The values of every row in descending order, [num_rows, vocab_size]; none may be NaN."""
    if values.device.type == "cpu":  # several times faster than torch.sort, and the same values
        return torch.from_numpy(np.sort(values.neg().numpy(), axis=-1)).neg_()
    return values.sort(-1, descending=True).values


def keep_largest(values: Tensor, ordered: Tensor, count: Tensor) -> Tensor:
    """Which tokens are among the `count` largest of their row; of equals the lowest ids.

    Args:
        values: float [num_rows, vocab_size].
        ordered: the same, every row in descending order (at least its first `count` values).
        count: int64 [num_rows, 1], at least 1.

    Returns:
        bool [num_rows, vocab_size] with `count` True per row.
    """
    least = ordered.gather(-1, count - 1)
    keep = values >= least
    surplus = keep.sum(-1, keepdim=True) - count
    # On a device, to ask is slower than to do it for nothing.
    if values.device.type != "cpu" or bool((surplus > 0).any()):
        equal = values == least
        num_kept = equal.sum(-1, keepdim=True) - surplus
        keep &= ~equal | (equal.cumsum(-1) <= num_kept)
    return keep


def log_total(shifted: Tensor) -> Tensor:
    """log-sum-exp, float64 [num_rows, 1], of rows whose maximum is 0; no sum has an order."""
    return _log_of_weight(_weights(shifted).sum(-1, keepdim=True), shifted.shape[1])


def _weights(scaled: Tensor) -> Tensor:
    """exp as fixed-point integers, int64.

    The sum of a row fits 62 bits; rounding moves it by at most vocab_size^2 * 2^-62 of itself.
    """
    return scaled.exp().mul_(2.0 ** _fraction_bits(scaled.shape[1])).round_().long()


def _log_of_weight(weight: Tensor, vocab_size: int) -> Tensor:
    return weight.double().mul_(2.0 ** -_fraction_bits(vocab_size)).log_()


def _fraction_bits(vocab_size: int) -> int:
    return 62 - vocab_size.bit_length()
