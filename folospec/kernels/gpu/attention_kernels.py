"""Holds the Triton kernels of `attention`: one for a tile of rows, one that folds parts of keys."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _keys_of_tile(
    seq, first_row, end_row, query_start_loc, context_lens, suffix_start_loc, mask_start,
    positions, WINDOW: tl.constexpr, CONTEXT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The logical keys from the first to the last that some row of a tile sees, and how many of all
    keys are context."""
    context_len = 0
    if CONTEXT:
        context_len = tl.load(context_lens + seq)
    suffix_len = tl.load(suffix_start_loc + seq + 1) - tl.load(suffix_start_loc + seq)
    rows_behind = tl.load(query_start_loc + seq + 1) - end_row
    is_tree = tl.load(mask_start + seq) >= 0
    end = context_len + suffix_len - tl.where(is_tree, 0, rows_behind)
    first = 0
    if WINDOW > 0:
        rows = first_row + tl.arange(0, ROWS)
        where = tl.load(positions + rows, mask=rows < end_row, other=2**31 - 1)
        earliest = tl.min(where, 0).to(tl.int32) - (WINDOW - 1)
        first = tl.minimum(tl.maximum(earliest, 0), context_len)
    return first, end, context_len


@triton.jit
def _parts_of(
    first, end, num_parts, PART_LENGTH: tl.constexpr, LEAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Where part 0 begins, and how long each part is."""
    if PART_LENGTH > 0:
        begin = first // PART_LENGTH * PART_LENGTH
        length = PART_LENGTH
    else:
        begin = first // BLOCK_N * BLOCK_N
        length = tl.maximum(tl.cdiv(end - begin, num_parts), LEAST)
        length = tl.cdiv(length, BLOCK_N) * BLOCK_N
    return begin, length


@triton.jit
def _add_keys(
    q, maximum, total, acc, key, value, slots, loaded, seen, key_slot_stride, value_slot_stride,
    inner, outer, SOFTCAP: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Let a tile see a block of keys: one step of the online softmax."""
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = loaded[:, None] & (column < HEAD_SIZE)
    slots = slots.to(tl.int64)[:, None]
    k = tl.load(key + slots * key_slot_stride + column, mask=inside, other=0.0)
    if k.dtype != q.dtype:
        k = k.to(tl.float32).to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * inner
    if SOFTCAP:
        scores = outer - 2 * outer / (tl.exp2(scores) + 1.0)
    scores = tl.where(seen, scores, float("-inf"))
    highest = tl.maximum(maximum, tl.max(scores, 1))
    # A row that has seen nothing yet has no maximum, and the difference of two would be NaN.
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(scores - base[:, None])
    rescale = tl.exp2(maximum - base)
    # Explicit, so that the compiler does not choose differently for different callers.
    total = tl.fma(total, rescale, tl.sum(weights, 1))
    v = tl.load(value + slots * value_slot_stride + column, mask=inside, other=0.0)
    if v.dtype != q.dtype:
        v = v.to(tl.float32).to(q.dtype)
    acc = tl.dot(weights.to(q.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return highest, total, acc


@triton.jit
def _verify(
    q, begin, stop, first, context_len, last_seen, row_positions, row_words, row_is_node, key,
    value, table, suffix_slots, suffix_positions, mask_words, key_slot_stride, value_slot_stride,
    inner, outer, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
    ORDERED: tl.constexpr, CONTEXT: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The softmax of a tile over the keys from `begin`, a multiple of BLOCK_N, to `stop`."""
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    mixed = begin
    if CONTEXT and not ORDERED:
        # Blocks of context alone. Where bits count, all blocks go the same way.
        mixed = tl.maximum(begin, tl.minimum(stop, context_len) // BLOCK_N * BLOCK_N)
        for start in range(begin, mixed, BLOCK_N):
            keys = start + tl.arange(0, BLOCK_N)
            loaded = tl.full([BLOCK_N], True, tl.int1)
            seen = tl.full([BLOCK_M, BLOCK_N], True, tl.int1)
            if WINDOW > 0:
                loaded = keys >= first
                seen = keys[None, :] > row_positions[:, None] - WINDOW
            slots = tl.load(table + keys // BLOCK_SIZE, mask=loaded, other=0) * BLOCK_SIZE
            slots += keys % BLOCK_SIZE
            maximum, total, acc = _add_keys(
                q, maximum, total, acc, key, value, slots, loaded, seen,
                key_slot_stride, value_slot_stride, inner, outer, SOFTCAP, HEAD_SIZE, BLOCK_D,
            )  # fmt: skip
    for start in range(mixed, stop, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        loaded = (keys >= first) & (keys < stop)
        nth = keys - context_len
        in_suffix = nth >= 0
        slots = tl.load(suffix_slots + nth, mask=loaded & in_suffix, other=0)
        if CONTEXT:
            in_table = loaded & (nth < 0)
            blocks = tl.load(table + keys // BLOCK_SIZE, mask=in_table, other=0)
            slots = tl.where(in_suffix, slots, blocks * BLOCK_SIZE + keys % BLOCK_SIZE)
        seen = keys[None, :] <= last_seen[:, None]
        if MASKED:
            wanted = (loaded & in_suffix)[None, :] & row_is_node[:, None]
            words = tl.load(mask_words + (row_words[:, None] + nth[None, :] // 32), wanted, other=0)
            bits = (words >> (nth % 32)[None, :]) & 1
            seen = seen & ((bits != 0) | ~wanted)
        seen = seen & loaded[None, :]
        if WINDOW > 0:
            where = tl.load(suffix_positions + nth, mask=loaded & in_suffix, other=0)
            where = tl.where(in_suffix, where, keys)
            seen = seen & (where[None, :] > row_positions[:, None] - WINDOW)
        maximum, total, acc = _add_keys(
            q, maximum, total, acc, key, value, slots, loaded, seen,
            key_slot_stride, value_slot_stride, inner, outer, SOFTCAP, HEAD_SIZE, BLOCK_D,
        )  # fmt: skip
    return maximum, total, acc


@triton.jit
def _fold(maximum, total, acc, other_maximum, other_total, other_acc):
    """Put the softmax over some keys and that over others together."""
    highest = tl.maximum(maximum, other_maximum)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    rescale, other_rescale = tl.exp2(maximum - base), tl.exp2(other_maximum - base)
    total = tl.fma(other_total, other_rescale, total * rescale)
    other = tl.broadcast_to(other_rescale[:, None], acc.shape)
    acc = tl.fma(other_acc, other, acc * rescale[:, None])
    return highest, total, acc


@triton.jit(do_not_specialize=["num_rows", "table_width"])
def attend_kernel(
    query, key, value, out, lse, partial_acc, partial_stats, query_start_loc, context_lens,
    table_row, block_table, suffix_start_loc, suffix_slots, suffix_positions, mask_start,
    mask_words, tile_seq, tile_row, positions, num_rows, table_width, query_row_stride,
    query_head_stride, key_slot_stride, key_head_stride, value_slot_stride, value_head_stride,
    inner, outer, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
    CONTEXT: tl.constexpr, ORDERED: tl.constexpr, DIRECT: tl.constexpr, PART_LENGTH: tl.constexpr,
    LEAST_PART: tl.constexpr, BLOCK_SIZE: tl.constexpr, FOLD: tl.constexpr,
    ROWS_PER_TILE: tl.constexpr, HEAD_SIZE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_parts, num_heads = tl.num_programs(2), tl.num_programs(1) * FOLD
    seq = tl.load(tile_seq + tile)
    if seq < 0:
        return
    first_row = tl.load(tile_row + tile)
    end_row = tl.minimum(first_row + ROWS_PER_TILE, tl.load(query_start_loc + seq + 1))
    first, end, context_len = _keys_of_tile(
        seq, first_row, end_row, query_start_loc, context_lens, suffix_start_loc, mask_start,
        positions, WINDOW, CONTEXT, ROWS,
    )  # fmt: skip
    begin, length = _parts_of(first, end, num_parts, PART_LENGTH, LEAST_PART, BLOCK_N)
    if begin + part * length >= end:
        return

    line = tl.arange(0, BLOCK_M)
    row = first_row + line // FOLD
    row_ok = row < end_row
    head = kv_head * FOLD + line % FOLD
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = row_ok[:, None] & (column < HEAD_SIZE)
    place = row.to(tl.int64) * query_row_stride + head * query_head_stride
    q = tl.load(query + place[:, None] + column, mask=inside, other=0.0)

    suffix_start = tl.load(suffix_start_loc + seq)
    suffix_len = tl.load(suffix_start_loc + seq + 1) - suffix_start
    rows_behind = tl.load(query_start_loc + seq + 1) - 1 - row
    last_seen = context_len + suffix_len - 1 - rows_behind
    row_is_node, row_words = row_ok, row
    if MASKED:
        words_start = tl.load(mask_start + seq)
        rank = row - tl.load(query_start_loc + seq)
        row_is_node = tl.where(row_ok, words_start, -1) >= 0
        row_words = words_start + rank * tl.cdiv(suffix_len, 32)
        last_seen = tl.where(row_is_node, end - 1, last_seen)
    row_positions = row
    if WINDOW > 0:
        row_positions = tl.load(positions + row, mask=row_ok, other=2**31 - 1).to(tl.int32)
    table = block_table + tl.load(table_row + seq).to(tl.int64) * table_width
    key += kv_head.to(tl.int64) * key_head_stride
    value += kv_head.to(tl.int64) * value_head_stride
    suffix_slots += suffix_start
    suffix_positions += suffix_start

    first_block = first // BLOCK_N * BLOCK_N
    if DIRECT and PART_LENGTH > 0:
        maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(begin, end, PART_LENGTH):
            stop = tl.minimum(start + PART_LENGTH, end)
            part_maximum, part_total, part_acc = _verify(
                q, tl.maximum(start, first_block), stop, first, context_len, last_seen,
                row_positions, row_words, row_is_node, key, value, table, suffix_slots,
                suffix_positions, mask_words, key_slot_stride, value_slot_stride, inner, outer,
                WINDOW, SOFTCAP, MASKED, ORDERED, CONTEXT, BLOCK_SIZE, HEAD_SIZE, BLOCK_M, BLOCK_N,
                BLOCK_D,
            )  # fmt: skip
            maximum, total, acc = _fold(maximum, total, acc, part_maximum, part_total, part_acc)
    else:
        start = begin + part * length
        stop = tl.minimum(start + length, end)
        maximum, total, acc = _verify(
            q, tl.maximum(start, first_block), stop, first, context_len, last_seen,
            row_positions, row_words, row_is_node, key, value, table, suffix_slots,
            suffix_positions, mask_words, key_slot_stride, value_slot_stride, inner, outer,
            WINDOW, SOFTCAP, MASKED, ORDERED, CONTEXT, BLOCK_SIZE, HEAD_SIZE, BLOCK_M, BLOCK_N,
            BLOCK_D,
        )  # fmt: skip

    index = row.to(tl.int64) * num_heads + head
    if DIRECT:
        total = tl.where(row_ok, total, 1.0)
        result = acc / total[:, None]
        tl.store(out + index[:, None] * HEAD_SIZE + column, result.to(out.dtype.element_ty), inside)
        if lse is not None:
            tl.store(lse + index, (maximum + tl.log2(total)) * 0.6931471805599453, mask=row_ok)
    else:
        index += part * (num_rows.to(tl.int64) * num_heads)
        tl.store(partial_acc + index[:, None] * HEAD_SIZE + column, acc, mask=inside)
        tl.store(partial_stats + 2 * index, maximum, mask=row_ok)
        tl.store(partial_stats + 2 * index + 1, total, mask=row_ok)


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def merge_kernel(
    out, partial_acc, partial_stats, query_start_loc, context_lens, suffix_start_loc, mask_start,
    tile_seq, tile_row, positions, num_rows, num_parts, WINDOW: tl.constexpr,
    PART_LENGTH: tl.constexpr, LEAST_PART: tl.constexpr, ROWS_PER_TILE: tl.constexpr,
    HEAD_SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Fold the parts of a tile's rows, for one query head."""
    tile, head, num_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    seq = tl.load(tile_seq + tile)
    if seq < 0:
        return
    first_row = tl.load(tile_row + tile)
    end_row = tl.minimum(first_row + ROWS_PER_TILE, tl.load(query_start_loc + seq + 1))
    first, end, _ = _keys_of_tile(
        seq, first_row, end_row, query_start_loc, context_lens, suffix_start_loc, mask_start,
        positions, WINDOW, True, ROWS,
    )  # fmt: skip
    begin, length = _parts_of(first, end, num_parts, PART_LENGTH, LEAST_PART, BLOCK_N)
    row = first_row + tl.arange(0, ROWS)
    row_ok = row < end_row
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = row_ok[:, None] & (column < HEAD_SIZE)
    index = row.to(tl.int64) * num_heads + head
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for part in range(0, tl.cdiv(end - begin, length)):
        place = index + part * (num_rows.to(tl.int64) * num_heads)
        part_maximum = tl.load(partial_stats + 2 * place, mask=row_ok, other=0.0)
        part_total = tl.load(partial_stats + 2 * place + 1, mask=row_ok, other=1.0)
        part_acc = tl.load(
            partial_acc + place[:, None] * HEAD_SIZE + column, mask=inside, other=0.0
        )
        maximum, total, acc = _fold(maximum, total, acc, part_maximum, part_total, part_acc)
    result = acc / total[:, None]
    tl.store(out + index[:, None] * HEAD_SIZE + column, result.to(out.dtype.element_ty), inside)
