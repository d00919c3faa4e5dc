"""Holds the Triton kernels of `kv`.

A program of the kernels that write has some heads of one row.
"""

import triton
import triton.language as tl


@triton.jit
def write_kv(
    key,
    value,
    slots,
    key_cache,
    value_cache,
    key_row_stride,
    key_head_stride,
    value_row_stride,
    value_head_stride,
    num_kv_heads,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        inside = (head < num_kv_heads) & (column < SIZE)
        place = (slot * num_kv_heads + head) * SIZE + column
        source = row * key_row_stride + head * key_head_stride + column
        keys = tl.load(key + source, mask=inside, other=0.0).to(tl.float32)
        tl.store(key_cache + place, keys.to(key_cache.dtype.element_ty), mask=inside)
        source = row * value_row_stride + head * value_head_stride + column
        values = tl.load(value + source, mask=inside, other=0.0).to(tl.float32)
        tl.store(value_cache + place, values.to(value_cache.dtype.element_ty), mask=inside)


@triton.jit
def rotate_and_write(
    heads,
    positions,
    slots,
    cos,
    sin,
    query_norm,
    key_norm,
    query,
    key_cache,
    value_cache,
    row_stride,
    head_stride,
    num_positions,
    num_heads,
    num_kv_heads,
    eps,
    HAS_NORM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    first_key, first_value = num_heads, num_heads + num_kv_heads
    in_half = column < HALF
    inside = (head < first_value + num_kv_heads) & in_half
    source = heads + row * row_stride + head * head_stride + column
    raw_first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    raw_second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    first, second = raw_first, raw_second
    if HAS_NORM:
        squares = tl.sum(first * first + second * second, axis=1)[:, None]
        factor = 1.0 / tl.sqrt(squares / (2 * HALF) + eps)
        weight = tl.where(head < first_key, query_norm, key_norm) + column
        first = first * factor * tl.load(weight, mask=inside, other=0.0).to(tl.float32)
        second = second * factor * tl.load(weight + HALF, mask=inside, other=0.0).to(tl.float32)

    position = tl.load(positions + row).to(tl.int64)
    has_angle = column < tl.where(position < num_positions, HALF, 0)
    c = tl.load(cos + position * HALF + column, mask=has_angle, other=0.0)
    s = tl.load(sin + position * HALF + column, mask=has_angle, other=0.0)
    turned_first = first * c - second * s
    turned_second = second * c + first * s

    is_query = inside & (head < first_key)
    queries = query + (row * num_heads + head) * (2 * HALF) + column
    tl.store(queries, turned_first.to(query.dtype.element_ty), mask=is_query)
    tl.store(queries + HALF, turned_second.to(query.dtype.element_ty), mask=is_query)

    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        is_key = inside & (head >= first_key) & (head < first_value)
        place = (slot * num_kv_heads + head - first_key) * (2 * HALF) + column
        kind = key_cache.dtype.element_ty
        tl.store(key_cache + place, turned_first.to(kind), mask=is_key)
        tl.store(key_cache + place + HALF, turned_second.to(kind), mask=is_key)
        is_value = inside & (head >= first_value)
        place = (slot * num_kv_heads + head - first_value) * (2 * HALF) + column
        raw_kind = value_cache.dtype.element_ty
        tl.store(value_cache + place, raw_first.to(raw_kind), mask=is_value)
        tl.store(value_cache + place + HALF, raw_second.to(raw_kind), mask=is_value)


@triton.jit(do_not_specialize=["num_moves"])
def copy_slots(
    from_table,
    to_table,
    sources,
    targets,
    num_moves,
    row_words,
    WORD: tl.constexpr,
    MOVES: tl.constexpr,
    WORDS: tl.constexpr,
):
    tensor = tl.program_id(0)
    word = (tl.program_id(1) * WORDS + tl.arange(0, WORDS))[None, :]
    move = tl.program_id(2) * MOVES + tl.arange(0, MOVES)
    is_move = move < num_moves
    source = tl.load(sources + move, mask=is_move, other=0).to(tl.int64)[:, None]
    target = tl.load(targets + move, mask=is_move, other=0).to(tl.int64)[:, None]
    inside = is_move[:, None] & (word < row_words)
    start = tl.load(from_table + tensor).to(tl.pointer_type(WORD))
    rows = tl.load(start + source * row_words + word, mask=inside, other=0)
    tl.debug_barrier()  # another thread's target may be this one's source
    start = tl.load(to_table + tensor).to(tl.pointer_type(WORD))
    tl.store(start + target * row_words + word, rows, mask=inside)
