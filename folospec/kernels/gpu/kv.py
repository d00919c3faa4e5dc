"""Writes paged KV: the keys and values of a step, and accepted rows at their final slots.

The product of a row with the query, key and value matrices becomes its query and its KV in one
launch. The halves of a head rotate together, value heads do not:

    heads of a row    q0  q1  q2  q3 | k0  k1 | v0  v1
    norm (Qwen3)      x   x   x   x    x   x
    rotation          x   x   x   x    x   x
    goes to           the query        slot     slot
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from folospec.kernels.gpu import kv_kernels, launch

HEADS = 4
"""Heads of a program: with 16 bytes a thread, four heads of 128 keep a warp busy."""
MOST_MOVES = 256
"""Most rows that a program of `move_slots` holds in registers; more go by way of a copy."""
FEW_MOVES = 32
MOVED_WORDS = 32
"""Words of a row that a program of `move_slots` moves."""
WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16}
"""Rows are moved as integers, by bytes."""


def write_kv(key: Tensor, value: Tensor, slot_mapping: Tensor, kv: tuple[Tensor, Tensor]) -> None:
    """Write keys and values at their rows' slots, rounded to the cache's type.

    Args:
        key, value: [N, Hkv, D] floats; rows and heads may be strided.
        slot_mapping: integers [N]; a row with slot -1 is not written.
        kv: keys and values [num_slots, Hkv, D], contiguous, changed in place.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    num_rows, num_kv_heads, size = key.shape
    _check_cache(kv, num_kv_heads, size)
    if value.shape != key.shape or key.stride(2) != 1 or value.stride(2) != 1:
        raise ValueError(
            f"value must have the key's shape {list(key.shape)} and both whole heads, got "
            f"{list(value.shape)} with strides {value.stride()} and {key.stride()}"
        )
    launch.launch(
        kv_kernels.write_kv,
        (num_rows, triton.cdiv(num_kv_heads, HEADS)),
        *(key, value, slot_mapping, *kv),
        *(key.stride(0), key.stride(1), value.stride(0), value.stride(1), num_kv_heads),
        SIZE=size,
        BLOCK=triton.next_power_of_2(size),
        HEADS=HEADS,
        num_warps=1,
    )


def rotate_and_write(
    heads: Tensor,
    num_heads: int,
    positions: Tensor,
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv: tuple[Tensor, Tensor],
    qk_norm: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Norm and rotate queries and keys, write keys and raw values at their slots; all in float32,
    rounded once.

    Args:
        heads: [N, Hq + 2 Hkv, D], the heads of queries, keys and values; rows and heads may be
            strided.
        num_heads: Hq.
        positions: integers [N], below L; a row of padding may have any, and is 0 from L on.
        slot_mapping: integers [N]; a row with slot -1 is not written.
        cos, sin: float32 [L, D / 2] of the angles of every position, contiguous.
        kv: keys and values [num_slots, Hkv, D], contiguous, changed in place.
        qk_norm: [D] each, weights of the RMS norms of every query and every key head.
        eps: of those norms.

    Returns:
        The queries, [N, Hq, D] contiguous, of the type of `heads`.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    num_rows, all_heads, size = heads.shape
    num_kv_heads, odd = divmod(all_heads - num_heads, 2)
    half = size // 2
    if odd or size % 2 or heads.stride(2) != 1:
        raise ValueError(
            f"heads must be [N, {num_heads} + 2 Hkv, an even size] with whole heads, got "
            f"{list(heads.shape)} with strides {heads.stride()}"
        )
    if cos.shape != sin.shape or any(
        t.dtype != torch.float32 or t.shape[1:] != (half,) for t in (cos, sin)
    ):
        raise ValueError(
            f"cos and sin must be float32 [L, {half}], got {list(cos.shape)} of {cos.dtype} and "
            f"{list(sin.shape)} of {sin.dtype}"
        )
    _check_cache(kv, num_kv_heads, size)
    query = torch.empty(num_rows, num_heads, size, dtype=heads.dtype, device=heads.device)
    launch.launch(
        kv_kernels.rotate_and_write,
        (num_rows, triton.cdiv(all_heads, HEADS)),
        *(heads, positions, slot_mapping, cos, sin),
        *((heads, heads) if qk_norm is None else qk_norm),
        *(query, *kv),
        *(heads.stride(0), heads.stride(1), len(cos), num_heads, num_kv_heads, eps),
        HAS_NORM=qk_norm is not None,
        HALF=half,
        BLOCK=triton.next_power_of_2(half),
        HEADS=HEADS,
        num_warps=1,
    )
    return query


def move_slots(
    tensors: Sequence[Tensor],
    sources: Sequence[int] | Tensor,
    targets: Sequence[int] | Tensor,
) -> None:
    """Copy row `sources[i]` to row `targets[i]` in every tensor, for every i; all rows are read
    before any is written. Tensors with rows of one size are moved in one launch.

    A graph can capture it once it has run for the same tensors, whose addresses are kept then.

    Args:
        tensors: [num_slots, ...] each, contiguous, on one device, rows of an even number of bytes;
            all layers' keys and values.
        sources: slots, on the host or the device; they may be among the targets, and repeat.
        targets: as many slots, no two alike.

    Raises:
        ValueError: the lists differ in length, or a tensor is not contiguous.
    """
    if len(sources) != len(targets):
        raise ValueError(
            f"sources and targets must be as many, got {len(sources)} and {len(targets)}"
        )
    if len(sources) == 0 or not tensors:
        return
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError(
            f"tensors must be contiguous, got strides {[tensor.stride() for tensor in tensors]}"
        )
    device = tensors[0].device
    slots = _on_device(sources, device), _on_device(targets, device)
    by_row: dict[int, list[int]] = {}
    for tensor in tensors:
        row_bytes = tensor.stride(0) * tensor.element_size()
        by_row.setdefault(row_bytes, []).append(tensor.data_ptr())
    for row_bytes, pointers in by_row.items():
        _move_rows(tuple(pointers), row_bytes, *slots)


def _move_rows(pointers: tuple[int, ...], row_bytes: int, sources: Tensor, targets: Tensor) -> None:
    device, num_moves = sources.device, len(sources)
    word_bytes = math.gcd(8, row_bytes, *pointers)
    table = _table(pointers, device)
    if num_moves <= MOST_MOVES:
        _copy(table, table, sources, targets, row_bytes, word_bytes)
        return
    order = torch.arange(num_moves, device=device)
    words = triton.cdiv(num_moves * row_bytes, 8)
    copies = torch.empty(len(pointers), words, dtype=torch.int64, device=device)
    starts = torch.arange(len(pointers), device=device) * (8 * words) + copies.data_ptr()
    _copy(table, starts, sources, order, row_bytes, word_bytes)
    _copy(starts, table, order, targets, row_bytes, word_bytes)


def _copy(
    from_table: Tensor,
    to_table: Tensor,
    sources: Tensor,
    targets: Tensor,
    row_bytes: int,
    word_bytes: int,
) -> None:
    """One launch; rows may overlap only while there are MOST_MOVES at most, which a program holds.
    Few need fewer registers."""
    num_moves, row_words = len(sources), row_bytes // word_bytes
    moves = FEW_MOVES if num_moves <= FEW_MOVES else MOST_MOVES
    blocks = triton.cdiv(row_words, MOVED_WORDS), triton.cdiv(num_moves, moves)
    launch.launch(
        kv_kernels.copy_slots,
        (len(from_table), *blocks),
        *(from_table, to_table, sources, targets, num_moves, row_words),
        WORD=WORDS[word_bytes],
        MOVES=moves,
        WORDS=MOVED_WORDS,
        num_warps=4 if moves == FEW_MOVES else 8,
    )


@cache
def _table(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    """Addresses where a kernel can read them. They are kept: a captured graph may read them again,
    and a pool's are a few hundred bytes."""
    return torch.tensor(pointers, dtype=torch.int64, device=device)


def _on_device(slots: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    if isinstance(slots, Tensor):
        return slots.to(device, non_blocking=True)
    pinned = device.type == "cuda"
    host = torch.tensor(slots, dtype=torch.int64, pin_memory=pinned)
    return host.to(device, non_blocking=True)


def _check_cache(kv: tuple[Tensor, Tensor], num_kv_heads: int, size: int) -> None:
    """Raise ValueError unless keys and values are [num_slots, num_kv_heads, size]."""
    for tensor in kv:
        if tensor.shape[1:] != (num_kv_heads, size) or not tensor.is_contiguous():
            raise ValueError(
                f"kv must be [num_slots, {num_kv_heads}, {size}] and contiguous, got "
                f"{list(tensor.shape)} with strides {tensor.stride()}"
            )
