"""Applies top_k, top_p and min_p on the device, without sorting a row.

Each keeps a prefix of one order (logit falling, then id rising). A token's place in that order is
its *order key*, an integer: the bits of the logit so that they rise as it falls, then the id. The
last key that is kept is found by bisection, for which it is enough to count, or to sum weights, up
to a key; ties are no matter, for no two tokens have the same key.

    narrow   part by part: leave out what cannot be kept, and close the ranks
    select   row by row: bisect what is left, usually a small share of the row

Weights are integers (`params.weight_of`), so their sums have no order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from folospec.kernels.gpu.params import (
    MOST,
    NEG_INF,
    filters_of,
    has_filters,
    is_finite,
    peak_of,
    scale_down,
    temperature_of,
    total_of,
    weight_of,
)


@triton.jit
def order_key(logits, ids, ID_BITS: tl.constexpr):
    """Ascending in these is descending in logits, of equals ascending in ids. -0 and 0 are equals.
    int64, at least 0."""
    logits = tl.where(logits == 0, 0.0, logits)
    raw = logits.to(tl.int32, bitcast=True).to(tl.int64)
    falling = tl.where(raw < 0, raw & 0xFFFFFFFF, 0x7FFFFFFF - raw)
    return (falling << ID_BITS) | ids.to(tl.int64)


@triton.jit
def logit_of_key(keys, ID_BITS: tl.constexpr):
    """The logit that an order key was made of, float32."""
    falling = keys >> ID_BITS
    raw = tl.where(falling > 0x7FFFFFFF, falling, 0x7FFFFFFF - falling)
    return raw.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def id_of_key(keys, ID_BITS: tl.constexpr):
    return keys & ((1 << ID_BITS) - 1)


@triton.jit
def load_keys(candidates, counts, at, PART: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr):
    """Order keys `at` to `at + TILE` of every part, [PARTS, TILE]; MOST beyond what a part has."""
    place = at + tl.arange(0, TILE)[None, :]
    offset = tl.arange(0, PARTS)[:, None] * PART + place
    return tl.load(candidates + offset, mask=place < counts[:, None], other=MOST)


@triton.jit
def narrow_kernel(
    logits, row_stride, vocab, all_params, draws, peaks, totals, candidates, counts, num_parts,
    PART: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr, ID_BITS: tl.constexpr,
):  # fmt: skip
    """Write the order keys of a part that filters may keep to `candidates` [draws, parts, PART],
    and how many there are to `counts` [draws, parts]. Rows without filters are left alone."""
    draw, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = tl.load(draws + 4 * draw)
    if index < 0:
        return
    params = all_params + 6 * index
    if has_filters(params, vocab) == 0:
        return
    peak = peak_of(peaks + draw * num_parts, num_parts, PARTS)
    if is_finite(peak) == 0:
        return
    ids = part * PART + tl.arange(0, PART)
    row = logits + tl.load(draws + 4 * draw + 1) * row_stride
    x = tl.load(row + ids, mask=ids < vocab, other=NEG_INF)
    top_p, floor, top_k = filters_of(params)
    keys = order_key(x, ids, ID_BITS)
    keep = x > NEG_INF
    if (top_k > 0) & (top_k < vocab):
        keep &= keys <= _last_of_part(keys, keep, top_k)
    else:
        # What lies beyond top_p weighs less than the share that it leaves out. Half of that is
        # safe from the rounding of the bound.
        scaled = scale_down(x, peak, temperature_of(params, False))
        spare = tl.maximum(1.0 - top_p - 1e-12, 0.0) / (2.0 * vocab)
        total = total_of(totals + draw * num_parts, num_parts, PARTS)
        least = (spare * total.to(tl.float64)).to(tl.int64)
        keep &= (weight_of(scaled, BITS) >= least) & (scaled >= floor)
    place = tl.cumsum(keep.to(tl.int32), 0) - 1
    out = draw * num_parts + part
    tl.store(candidates + out * PART + place, keys, mask=keep)
    tl.store(counts + out, tl.sum(keep.to(tl.int32), 0))


@triton.jit
def _last_of_part(keys, possible, count):
    """The key of the `count`-th token of a part in order, or of the last that is possible."""
    low = tl.min(tl.where(possible, keys, MOST), 0)
    high = tl.max(tl.where(possible, keys, -1), 0)
    while low < high:
        middle = low + ((high - low) >> 1)
        inside = possible & (keys <= middle)
        enough = tl.sum(inside.to(tl.int32), 0) >= count
        below = tl.max(tl.where(inside, keys, -1), 0)
        above = tl.min(tl.where(possible & (keys > middle), keys, MOST), 0)
        high = tl.where(enough, below, high)
        low = tl.where(enough, low, above)
    return high


@triton.jit
def select_kernel(
    vocab, all_params, draws, peaks, totals, candidates, counts, lasts, kept_totals, num_parts,
    PART: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, BITS: tl.constexpr,
    ID_BITS: tl.constexpr,
):  # fmt: skip
    """Write the last key that top_k and top_p keep of a row, and the weight of what all filters
    keep, to `lasts` and `kept_totals`, int64 [draws]. Rows without filters are left alone."""
    draw = tl.program_id(0).to(tl.int64)
    index = tl.load(draws + 4 * draw)
    if index < 0:
        return
    params = all_params + 6 * index
    if has_filters(params, vocab) == 0:
        return
    peak = peak_of(peaks + draw * num_parts, num_parts, PARTS)
    if is_finite(peak) == 0:
        return
    part = tl.arange(0, PARTS)
    number = tl.load(counts + draw * num_parts + part, mask=part < num_parts, other=0)
    rows = candidates + draw * num_parts * PART
    temperature = temperature_of(params, False)
    top_p, floor, top_k = filters_of(params)
    last = _last_in_row(rows, number, PART, PARTS, TILE)
    if (top_k > 0) & (top_k < vocab):
        last = _last_up_to(
            rows, number, last, top_k.to(tl.float64), peak, temperature, False,
            PART, PARTS, TILE, BITS, ID_BITS,
        )  # fmt: skip
    if top_p < 1:
        total = _weight_up_to(
            rows, number, last, NEG_INF, peak, temperature, PART, PARTS, TILE, BITS, ID_BITS
        )
        if (top_k <= 0) | (top_k >= vocab):
            # Of the whole row: what `narrow` left out counts in it.
            total = total_of(totals + draw * num_parts, num_parts, PARTS)
        last = _last_up_to(
            rows, number, last, top_p * total.to(tl.float64), peak, temperature, True,
            PART, PARTS, TILE, BITS, ID_BITS,
        )  # fmt: skip
    kept = _weight_up_to(
        rows, number, last, floor, peak, temperature, PART, PARTS, TILE, BITS, ID_BITS
    )
    tl.store(lasts + draw, last)
    tl.store(kept_totals + draw, kept)


@triton.jit
def _last_in_row(candidates, counts, PART: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr):
    last = tl.full([PARTS, TILE], -1, tl.int64)
    for at in range(0, tl.max(counts, 0), TILE):
        keys = load_keys(candidates, counts, at, PART, PARTS, TILE)
        last = tl.maximum(last, tl.where(keys < MOST, keys, -1))
    return tl.max(last)


@triton.jit
def _weight_up_to(
    candidates, counts, last, floor, peak, temperature,
    PART: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, BITS: tl.constexpr,
    ID_BITS: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([PARTS, TILE], tl.int64)
    for at in range(0, tl.max(counts, 0), TILE):
        keys = load_keys(candidates, counts, at, PART, PARTS, TILE)
        scaled = scale_down(logit_of_key(keys, ID_BITS), peak, temperature)
        kept = (keys <= last) & (scaled >= floor)
        total += tl.where(kept, weight_of(tl.where(kept, scaled, NEG_INF), BITS), 0)
    return tl.sum(total)


@triton.jit
def _last_up_to(
    candidates, counts, high, bound, peak, temperature, BY_WEIGHT: tl.constexpr,
    PART: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, BITS: tl.constexpr,
    ID_BITS: tl.constexpr,
):  # fmt: skip
    """The last key of the shortest prefix whose number of tokens, or weight, reaches `bound`; at
    most `high`, a key that is there. Both ends of the search are keys that are there, so that it
    ends as soon as one is left."""
    low = high * 0
    while low < high:
        middle = low + ((high - low) >> 1)
        value = tl.zeros([PARTS, TILE], tl.int64)
        below = tl.full([PARTS, TILE], -1, tl.int64)
        above = tl.full([PARTS, TILE], MOST, tl.int64)
        for at in range(0, tl.max(counts, 0), TILE):
            keys = load_keys(candidates, counts, at, PART, PARTS, TILE)
            inside = keys <= middle
            if BY_WEIGHT:
                scaled = scale_down(logit_of_key(keys, ID_BITS), peak, temperature)
                value += tl.where(inside, weight_of(tl.where(inside, scaled, NEG_INF), BITS), 0)
            else:
                value += inside.to(tl.int64)
            below = tl.maximum(below, tl.where(inside, keys, -1))
            above = tl.minimum(above, tl.where(inside, MOST, keys))
        reached = tl.sum(value).to(tl.float64) >= bound
        high = tl.where(reached, tl.max(below), high)
        low = tl.where(reached, low, tl.min(above))
    return high
