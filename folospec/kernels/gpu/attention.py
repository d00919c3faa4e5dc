"""Computes ragged attention over paged KV: prompts, decoding and token trees in one kernel.

A program takes a tile of rows of one sequence, the query heads of one KV head, and a part of the
keys. Rows times heads are the rows of its matrix products:

    logical keys   0 ........................ context_len ....... context_len + suffix_len
                   through the block table    through suffix_slots
    parts          |  part 0  |  part 1  |  part 2  |  ...
    blocks         | | | | | || | | | | || | | |      each is read once for the whole tile

A part's maximum, sum and weighted values are the softmax of its own keys (online softmax: Milakov,
Gimelshein, arXiv 1805.02867; tiled: Dao et al., arXiv 2205.14135); parts are folded into each other
in order (the split of Flash-Decoding). Scores are kept in base 2.

Two functions launch it, with rows told as `attention.paged_rows.PagedRows`:

    attend(query, kv, rows, positions, block_size=, scale=, window=, softcap=, ordered=) -> out
    attend_suffix(query, kv, rows, positions, scale=, window=, softcap=) -> (out, lse)

The second looks at the suffix only, for backends that see the context through other kernels: `out`
float32 [N, Hq, D], and `lse` float32 [N, Hq], the natural logarithm of the sum of the exponentials
of the row's scores.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from folospec.kernels.gpu import launch
from folospec.kernels.gpu.attention_kernels import attend_kernel, merge_kernel

if TYPE_CHECKING:
    from folospec.attention.paged_rows import PagedRows

PART_LENGTH = 1024
"""Keys of a part where parts lie at fixed places."""
LEAST_PART = 128
"""Keys below which a part is not worth a program, where they do not."""
MOST_PARTS = 64
LOG2E = math.log2(math.e)


def attend(
    query: Tensor,
    kv: tuple[Tensor, Tensor],
    rows: PagedRows,
    positions: Tensor,
    *,
    block_size: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    ordered: bool = False,
    num_parts: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Let every row see its keys. May be captured in a CUDA graph.

    Args:
        query: float16, bfloat16 or float32 [N, Hq, D], the last dimension contiguous.
        kv: keys and values [num_slots, Hkv, D] of any floating type, the last dimension contiguous;
            they are rounded to the query's type. Hkv divides Hq.
        rows: the step's rows. A row that no tile has is not written.
        positions: integers [N].
        block_size: slots of a block of `rows.block_table`.
        scale, window, softcap: see `AttentionBackend.forward`.
        ordered: sum in an order that depends on a row's keys alone; `rows` come without masks, and
            with the same number of rows per tile in every step.
        num_parts: into how many parts the keys are cut at most, each with a program of its own;
            None: by the shapes. `ordered` cuts at fixed places whatever it is: 1 means one program
            for all parts, anything else one for each.
        out: contiguous, of the query's shape and type; None: it is made.

    Returns:
        [N, Hq, D], of the query's type.

    Raises:
        ValueError: the shapes do not fit each other, or `ordered` gets masks.
    """
    _check(query, kv, rows, positions, ordered)
    most_keys = rows.block_table.shape[1] * block_size + rows.suffix_slots.shape[0]
    if num_parts is None:
        programs = rows.tile_seq.shape[0] * kv[0].shape[1]
        num_parts = choose_parts(programs, most_keys, launch.num_processors(query.device))
    if ordered and num_parts > 1:
        num_parts = -(-most_keys // PART_LENGTH)
    options = _options(query, rows, window) | {"PART_LENGTH": PART_LENGTH if ordered else 0}
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    partial: tuple[Tensor | None, ...] = (None, None)
    if num_parts > 1:
        shape = (num_parts, *query.shape)
        partial = (
            query.new_empty(shape, dtype=torch.float32),
            query.new_empty((*shape[:3], 2), dtype=torch.float32),
        )
    _launch(
        query, kv, rows, positions, (out, None, *partial), options, num_parts, scale, softcap,
        context=True, block_size=block_size,
    )  # fmt: skip
    if num_parts > 1:
        _launch_merge(query, rows, positions, (out, *partial), options, num_parts)
    return out


def attend_suffix(
    query: Tensor,
    kv: tuple[Tensor, Tensor],
    rows: PagedRows,
    positions: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Let every row see what it may of its sequence's suffix, and nothing of the context. May be
    captured in a CUDA graph.

    Args: those of `attend`.

    Returns:
        float32 [N, Hq, D]; and float32 [N, Hq], the natural logarithm of the sum of the
        exponentials of a row's scores, to merge with what the context gives. Rows that no tile has
        are not written.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    _check(query, kv, rows, positions, False)
    options = _options(query, rows, window) | {"PART_LENGTH": 0}
    out = query.new_empty(query.shape, dtype=torch.float32)
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    _launch(
        query, kv, rows, positions, (out, lse, None, None), options, 1, scale, softcap,
        context=False, block_size=1,
    )  # fmt: skip
    return out, lse


def choose_parts(programs: int, most_keys: int, num_processors: int) -> int:
    """Into how many parts to cut keys, by the shapes of a step: where there are fewer programs than
    processors, as many parts as give each processor two.

    Args:
        programs: tiles times KV heads. most_keys: no row sees more.
    """
    if programs == 0 or programs >= num_processors:
        return 1
    return max(1, min(2 * num_processors // programs, -(-most_keys // LEAST_PART), MOST_PARTS))


def _check(
    query: Tensor, kv: tuple[Tensor, Tensor], rows: PagedRows, positions: Tensor, ordered: bool
) -> None:
    num_rows, num_heads, head_size = query.shape
    fits = kv[0].shape == kv[1].shape and kv[0].shape[2] == head_size
    if not fits or num_heads % kv[0].shape[1]:
        shapes = [list(tensor.shape) for tensor in (query, *kv)]
        raise ValueError(f"query heads must be a multiple of KV heads of one size, got {shapes}")
    if any(tensor.stride(2) != 1 for tensor in (query, *kv)):
        raise ValueError("the last dimension of query, keys and values must be contiguous")
    if positions.shape != (num_rows,):
        raise ValueError(f"positions must be [{num_rows}], got {list(positions.shape)}")
    if ordered and rows.mask_words.numel():
        raise ValueError(f"ordered rows must have no masks, got {rows.mask_words.numel()} words")


def _options(query: Tensor, rows: PagedRows, window: int | None) -> dict[str, Any]:
    """What both kernels are built for."""
    block_d = triton.next_power_of_2(query.shape[2])
    return {
        "WINDOW": window or 0,
        "LEAST_PART": LEAST_PART,
        "ROWS_PER_TILE": rows.rows_per_tile,
        "HEAD_SIZE": query.shape[2],
        "ROWS": triton.next_power_of_2(rows.rows_per_tile),
        "BLOCK_N": max(16, min(64, (2048 if query.element_size() == 4 else 8192) // block_d)),
        "BLOCK_D": block_d,
    }


def _launch(
    query: Tensor,
    kv: tuple[Tensor, Tensor],
    rows: PagedRows,
    positions: Tensor,
    outputs: tuple[Tensor | None, ...],
    options: dict[str, Any],
    num_parts: int,
    scale: float,
    softcap: float | None,
    *,
    context: bool,
    block_size: int,
) -> None:
    key, value = kv
    fold = query.shape[1] // key.shape[1]
    block_m = max(16, triton.next_power_of_2(rows.rows_per_tile * fold))
    # Of a capped score's tanh, 1 - 2 / (exp(2 x) + 1), the kernel computes the exponential in base
    # two as well.
    inner, outer = scale * LOG2E, 0.0
    if softcap is not None:
        inner, outer = 2 * scale / softcap * LOG2E, softcap * LOG2E
    launch.launch(
        attend_kernel,
        (rows.tile_seq.shape[0], key.shape[1], num_parts),
        query,
        key,
        value,
        *outputs,
        rows.query_start_loc,
        rows.context_lens,
        rows.table_row,
        rows.block_table,
        rows.suffix_start_loc,
        rows.suffix_slots,
        rows.suffix_positions,
        rows.mask_start,
        rows.mask_words,
        rows.tile_seq,
        rows.tile_row,
        positions,
        query.shape[0],
        rows.block_table.stride(0),
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        inner,
        outer,
        **options,
        SOFTCAP=softcap is not None,
        MASKED=rows.mask_words.numel() > 0,
        CONTEXT=context,
        ORDERED=options["PART_LENGTH"] > 0,
        DIRECT=num_parts == 1,
        BLOCK_SIZE=block_size,
        FOLD=fold,
        BLOCK_M=block_m,
        **_occupation(query, block_m, options),
    )


def _occupation(query: Tensor, block_m: int, options: dict[str, Any]) -> dict[str, int]:
    """Warps, so many that hardly a register goes to memory; and stages of loading ahead. A key
    waits for its slot: it takes two stages to have one block of keys more on its way."""
    if query.element_size() == 4:
        return {"num_warps": min(max(block_m // 4, 4), 16), "num_stages": 3}
    # Where parts are folded in registers there are two sums.
    held = block_m * options["BLOCK_D"] * (2 if options["PART_LENGTH"] else 1)
    return {"num_warps": 4 if held <= 4096 else 8, "num_stages": 5 if block_m <= 32 else 3}


def _launch_merge(
    query: Tensor,
    rows: PagedRows,
    positions: Tensor,
    outputs: tuple[Tensor | None, ...],
    options: dict[str, Any],
    num_parts: int,
) -> None:
    launch.launch(
        merge_kernel,
        (rows.tile_seq.shape[0], query.shape[1]),
        *outputs,
        rows.query_start_loc,
        rows.context_lens,
        rows.suffix_start_loc,
        rows.mask_start,
        rows.tile_seq,
        rows.tile_row,
        positions,
        query.shape[0],
        num_parts,
        **options,
        num_warps=4,
    )
