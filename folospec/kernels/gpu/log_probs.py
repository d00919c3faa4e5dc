"""Computes the log-probabilities of a row from the same passes as a draw; see `gpu.draw`."""

from __future__ import annotations

import triton
import triton.language as tl

from folospec.kernels.gpu.draw import first_of_row
from folospec.kernels.gpu.filters import order_key
from folospec.kernels.gpu.params import (
    NEG_INF,
    filters_of,
    has_filters,
    is_finite,
    log_of_weight,
    peak_of,
    scale_down,
    temperature_of,
    total_of,
)


@triton.jit
def write_kernel(
    logits, row_stride, vocab, all_params, draws, peaks, firsts, totals, lasts, kept_totals, out,
    row_peaks, num_parts,
    PART: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr, ID_BITS: tl.constexpr,
    FILTERS: tl.constexpr,
):  # fmt: skip
    """Write the log-probabilities that `draw_kernel` draws from, float32 [draws, vocab], -inf where
    a token is impossible, and the largest logit of every row, float32."""
    number, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    draw = draws + 4 * number
    params = all_params + 6 * tl.load(draw)
    parts = number * num_parts
    peak = peak_of(peaks + parts, num_parts, PARTS)
    if part == 0:
        tl.store(row_peaks + number, peak)
    ids = part * PART + tl.arange(0, PART)
    inside = ids < vocab
    temperature = temperature_of(params, False)
    value = tl.full([PART], NEG_INF, tl.float32)
    if is_finite(peak):
        if temperature == 0:
            first = first_of_row(peaks + parts, firsts + parts, peak, num_parts, PARTS)
            value = tl.where(ids == first, 0.0, value)
        else:
            row = logits + tl.load(draw + 1) * row_stride
            x = tl.load(row + ids, mask=inside, other=NEG_INF)
            scaled = scale_down(x, peak, temperature)
            total = total_of(totals + parts, num_parts, PARTS)
            kept = inside
            if FILTERS & has_filters(params, vocab):
                total = tl.load(kept_totals + number)
                top_p, floor, top_k = filters_of(params)
                in_order = order_key(x, ids, ID_BITS) <= tl.load(lasts + number)
                kept = in_order & (scaled >= floor)
            log_prob = (scaled - log_of_weight(total, BITS)).to(tl.float32)
            value = tl.where(kept, log_prob, NEG_INF)
    tl.store(out + number * vocab + ids, value, mask=inside)
