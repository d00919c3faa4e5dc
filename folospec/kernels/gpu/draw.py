"""Draws tokens from rows of logits on the device: arg-max, probabilities, keyed noise.

    scan     part by part: the peak, where it is, and roughly the best score
    weigh    part by part: the sum of weights, by which the parameter set is normalised
    (narrow, select of `filters`, for rows that have filters)
    draw     row by row: argmax float32(scaled - log_total) + gumbel, of equals the lowest id

A score in float64 costs two logarithms. `scan` takes them in float32, which is off by less than
MARGIN, and `draw` looks only at parts that can still win by that: usually one.

The same kernels draw the child of a draft node and the confidence in it; see
`spec.trees.children`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from folospec.kernels.gpu.filters import id_of_key, load_keys, logit_of_key
from folospec.kernels.gpu.noise import TARGET, gumbel, key_of, rough_gumbel
from folospec.kernels.gpu.params import (
    MOST,
    NEG_INF,
    filters_of,
    has_filters,
    is_finite,
    log_of_weight,
    peak_of,
    scale_down,
    temperature_of,
    total_of,
    weight_of,
)

MARGIN = tl.constexpr(0.015625)
"""More than rough scores near the best can be off, several times over."""


@triton.jit
def _noise_key(params, draw, advance):
    """The key of a draw's noise, and whether it has any."""
    position = tl.load(draw + 2)
    key = key_of(
        tl.load(params), tl.load(params + 1), position + advance, tl.zeros_like(position) + TARGET
    )
    return key, position >= 0


@triton.jit(do_not_specialize=["advance"])
def scan_kernel(
    logits, row_stride, vocab, all_params, draws, advance, peaks, firsts, roughs, sums, num_parts,
    PART: tl.constexpr, CHILDREN: tl.constexpr,
):  # fmt: skip
    """Write of every part, [draws, parts]: its largest logit (NaN if there is one), the first id
    that has it, the best rough score relative to the one without noise of that id, and, for
    CHILDREN, the sum of exp(scale * (score - best))."""
    draw, part = draws + 4 * tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = tl.load(draw)
    if index < 0:
        return
    ids = part * PART + tl.arange(0, PART)
    row = logits + tl.load(draw + 1) * row_stride
    x = tl.load(row + ids, mask=ids < vocab, other=NEG_INF)
    is_nan = tl.max((x != x).to(tl.int32), 0) > 0
    x = tl.where(x != x, NEG_INF, x)
    peak = tl.max(x, 0)
    out = tl.program_id(0).to(tl.int64) * num_parts + part
    tl.store(peaks + out, tl.where(is_nan, float("nan"), peak))
    tl.store(firsts + out, tl.min(tl.where(x == peak, ids, 0x7FFFFFFF), 0))
    params = all_params + 6 * index
    temperature = temperature_of(params, CHILDREN)
    if temperature == 0:
        return
    key, is_noisy = _noise_key(params, draw, advance)
    # As a factor it must be finite, or 0 times it is none; rough scores need no more.
    factor = tl.minimum(1.0 / temperature, 1e300)
    possible = x > NEG_INF
    above = tl.where(possible, x, 0.0).to(tl.float64) - tl.where(is_finite(peak), peak, 0.0)
    rough = tl.maximum(above * factor, -1e30).to(tl.float32) + tl.where(
        is_noisy, rough_gumbel(key, ids), 0.0
    )
    rough = tl.where(possible, rough, NEG_INF)
    best = tl.max(rough, 0)
    tl.store(roughs + out, best)
    if CHILDREN:
        scale = tl.load(draw + 3).to(tl.float64, bitcast=True).to(tl.float32)
        below = tl.where(possible, rough - tl.where(is_finite(best), best, 0.0), 0.0)
        tl.store(sums + out, tl.sum(tl.where(possible, tl.exp(scale * below), 0.0), 0))


@triton.jit
def weigh_kernel(
    logits, row_stride, vocab, all_params, draws, peaks, totals, num_parts,
    PART: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr, CHILDREN: tl.constexpr,
):  # fmt: skip
    """Write the sum of the weights of every part, int64 [draws, parts], before any filter. CHILDREN
    have a use for it only where there are filters."""
    draw, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = tl.load(draws + 4 * draw)
    if index < 0:
        return
    params = all_params + 6 * index
    if CHILDREN & (has_filters(params, vocab) == 0):
        return
    temperature = temperature_of(params, False)
    peak = peak_of(peaks + draw * num_parts, num_parts, PARTS)
    if (temperature == 0) | (is_finite(peak) == 0):
        return
    ids = part * PART + tl.arange(0, PART)
    row = logits + tl.load(draws + 4 * draw + 1) * row_stride
    x = tl.load(row + ids, mask=ids < vocab, other=NEG_INF)
    weights = weight_of(scale_down(x, peak, temperature), BITS)
    tl.store(totals + draw * num_parts + part, tl.sum(weights, 0))


@triton.jit(do_not_specialize=["advance"])
def draw_kernel(
    logits, row_stride, vocab, all_params, draws, advance, peaks, firsts, roughs, totals,
    candidates, counts, lasts, kept_totals, tokens, row_peaks, num_parts,
    PART: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, BITS: tl.constexpr,
    ID_BITS: tl.constexpr, FILTERS: tl.constexpr,
):  # fmt: skip
    """Write the token of every draw, int64, -1 where none is possible, and the largest logit of
    its row, float32, which says why: -inf, or NaN or +inf."""
    number = tl.program_id(0).to(tl.int64)
    draw = draws + 4 * number
    tl.store(tokens + number, tl.full([], -1, tl.int64))
    index = tl.load(draw)
    if index < 0:
        return
    params = all_params + 6 * index
    parts = number * num_parts
    peak = peak_of(peaks + parts, num_parts, PARTS)
    tl.store(row_peaks + number, peak)
    if is_finite(peak) == 0:
        return
    temperature = temperature_of(params, False)
    if temperature == 0:
        token = first_of_row(peaks + parts, firsts + parts, peak, num_parts, PARTS)
    else:
        key, has_noise = _noise_key(params, draw, advance)
        if FILTERS & has_filters(params, vocab):
            token, sum_of_odds = _race_of_kept(
                candidates + parts * PART, counts + parts, params, key, True,
                tl.load(lasts + number), log_of_weight(tl.load(kept_totals + number), BITS),
                peak, temperature, 1.0, num_parts, PART, PARTS, TILE, ID_BITS, False,
            )  # fmt: skip
        else:
            total = total_of(totals + parts, num_parts, PARTS)
            token, best, bounds = _race_of_parts(
                logits + tl.load(draw + 1) * row_stride, vocab, key, True,
                log_of_weight(total, BITS), peaks + parts, roughs + parts, peak, temperature,
                num_parts, PART, PARTS,
            )  # fmt: skip
    tl.store(tokens + number, token)


@triton.jit(do_not_specialize=["advance"])
def child_kernel(
    logits, row_stride, vocab, all_params, draws, advance, peaks, roughs, sums, candidates, counts,
    lasts, kept_totals, result, num_draws, num_parts,
    PART: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, BITS: tl.constexpr,
    ID_BITS: tl.constexpr, FILTERS: tl.constexpr,
):  # fmt: skip
    """Write to `result`, int64 [3, draws]: the child's token, 0 where none is possible; whether
    there is one; the bits of the confidence in it, float32."""
    number = tl.program_id(0).to(tl.int64)
    draw = draws + 4 * number
    none = tl.zeros([], tl.int64)
    tl.store(result + number, none)
    tl.store(result + num_draws + number, none)
    tl.store(result + 2 * num_draws + number, none)
    index = tl.load(draw)
    if index < 0:
        return
    params = all_params + 6 * index
    parts = number * num_parts
    peak = peak_of(peaks + parts, num_parts, PARTS)
    if is_finite(peak) == 0:
        return
    temperature = temperature_of(params, True)
    scale = tl.load(draw + 3).to(tl.float64, bitcast=True).to(tl.float32)
    key, is_noisy = _noise_key(params, draw, advance)
    if FILTERS & has_filters(params, vocab):
        token, total = _race_of_kept(
            candidates + parts * PART, counts + parts, params, key, is_noisy,
            tl.load(lasts + number), log_of_weight(tl.load(kept_totals + number), BITS),
            peak, temperature, scale, num_parts, PART, PARTS, TILE, ID_BITS, True,
        )  # fmt: skip
        chance = 1.0 / total
    else:
        token, best, bounds = _race_of_parts(
            logits + tl.load(draw + 1) * row_stride, vocab, key, is_noisy,
            tl.zeros([], tl.float64), peaks + parts, roughs + parts, peak, temperature,
            num_parts, PART, PARTS,
        )  # fmt: skip
        part = tl.arange(0, PARTS)
        found = tl.load(sums + parts + part, mask=part < num_parts, other=0.0)
        top = tl.max(bounds, 0)
        below = tl.where(bounds > NEG_INF, bounds - top, 0.0)  # 0 times -inf is no number
        total = tl.sum(tl.where(bounds > NEG_INF, found * tl.exp(scale * below), 0.0), 0)
        chance = tl.exp(scale * (best - top)) / total
    tl.store(result + number, token)
    tl.store(result + num_draws + number, none + 1)
    bits = tl.minimum(chance, 1.0).to(tl.int32, bitcast=True)
    tl.store(result + 2 * num_draws + number, bits.to(tl.int64))


@triton.jit
def first_of_row(peaks, firsts, peak, num_parts, PARTS: tl.constexpr):
    """The lowest id of the largest logit."""
    part = tl.arange(0, PARTS)
    found = tl.load(peaks + part, mask=part < num_parts, other=NEG_INF)
    first = tl.load(firsts + part, mask=part < num_parts, other=0)
    return tl.min(tl.where((found == peak) & (part < num_parts), first, 0x7FFFFFFF), 0).to(tl.int64)


@triton.jit
def _race_of_parts(
    row, vocab, key, is_noisy, log_total, peaks, roughs, peak, temperature, num_parts,
    PART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The token with the best score of the row, int64, that score, float32, and the rough best of
    every part, without `log_total`."""
    part = tl.arange(0, PARTS)
    found = tl.load(peaks + part, mask=part < num_parts, other=NEG_INF)
    rough = tl.load(roughs + part, mask=found > NEG_INF, other=0.0)
    bounds = rough + scale_down(found, peak, temperature).to(tl.float32)
    left = bounds
    best = tl.full([], NEG_INF, tl.float32)
    token = tl.full([], MOST, tl.int64)
    top = tl.max(left, 0)
    while (top > NEG_INF) & (top - log_total.to(tl.float32) + MARGIN >= best):
        at = tl.min(tl.where(left == top, part, PARTS), 0)
        ids = at * PART + tl.arange(0, PART)
        x = tl.load(row + ids, mask=ids < vocab, other=NEG_INF)
        score = (scale_down(x, peak, temperature) - log_total).to(tl.float32)
        score += tl.where(is_noisy, gumbel(key, ids), 0.0)
        token, best = better(token, best, score, ids.to(tl.int64))
        left = tl.where(part == at, NEG_INF, left)
        top = tl.max(left, 0)
    return token, best, bounds


@triton.jit
def _race_of_kept(
    candidates, counts, params, key, is_noisy, last, log_total, peak, temperature, scale, num_parts,
    PART: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, ID_BITS: tl.constexpr,
    CHILDREN: tl.constexpr,
):  # fmt: skip
    """The token with the best score of what filters keep, int64, and for CHILDREN the sum of
    exp(scale * (score - best)) over all of that."""
    part = tl.arange(0, PARTS)
    number = tl.load(counts + part, mask=part < num_parts, other=0)
    top_p, floor, top_k = filters_of(params)
    best = tl.full([], NEG_INF, tl.float32)
    token = tl.full([], MOST, tl.int64)
    for at in range(0, tl.max(number, 0), TILE):
        keys = load_keys(candidates, number, at, PART, PARTS, TILE)
        score = _score_of_kept(
            keys, key, is_noisy, last, floor, log_total, peak, temperature, ID_BITS, CHILDREN
        )
        token, best = better(token, best, score, id_of_key(keys, ID_BITS))
    total = tl.zeros([PARTS, TILE], tl.float32)
    if CHILDREN:
        for at in range(0, tl.max(number, 0), TILE):
            keys = load_keys(candidates, number, at, PART, PARTS, TILE)
            score = _score_of_kept(
                keys, key, is_noisy, last, floor, log_total, peak, temperature, ID_BITS, CHILDREN
            )
            possible = score > NEG_INF
            below = tl.where(possible, score - best, 0.0)
            total += tl.where(possible, tl.exp(scale * below), 0.0)
    return token, tl.sum(total)


@triton.jit
def _score_of_kept(
    keys, key, is_noisy, last, floor, log_total, peak, temperature,
    ID_BITS: tl.constexpr, CHILDREN: tl.constexpr,
):  # fmt: skip
    """float32, -inf for what is not kept. A child's counts from the largest log-probability."""
    scaled = scale_down(logit_of_key(keys, ID_BITS), peak, temperature)
    kept = (keys <= last) & (scaled >= floor)
    score = (tl.where(kept, scaled, 0.0) - log_total).to(tl.float32)
    if CHILDREN:
        highest = (-log_total).to(tl.float32)
        score = (score.to(tl.float64) - highest.to(tl.float64)).to(tl.float32)
    score += tl.where(is_noisy, gumbel(key, id_of_key(keys, ID_BITS)), 0.0)
    return tl.where(kept, score, NEG_INF)


@triton.jit
def better(token, best, score, ids):
    """The leader of a race after more have come in; of equals the lowest id."""
    top = tl.max(score)
    first = tl.min(tl.where(score == top, ids, MOST))
    wins = (top > best) | ((top == best) & (first < token))
    return tl.where(wins, first, token), tl.where(wins, top, best)
