"""Drafts whole chains of tokens in one call of the native CPU kernels.

See `cpu/chains.h`.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from folospec.attention.base import LayerKV
from folospec.kernels import native
from folospec.kernels.checked import array_pointer, check_all_ids, pack_ids, pointer
from folospec.kernels.native_children import pack_wanted
from folospec.kernels.sampling_records import check_packed_sampling
from folospec.models.native_decoder import NativeDecoder


@dataclass(slots=True)
class ChainBatch:
    """Chains, of at least one token each; every list has an entry for each chain."""

    starts: Sequence[int]
    """Position of the first token, and its index in the block table: a chain has slots for all its
    tokens but the last."""
    block_table: NDArray[np.int32]
    """[chains, blocks]."""
    block_size: int
    all_params: Sequence[bytes]
    """From `sampling_records.pack_sampling`."""
    positions: Sequence[int]
    """Of the first token in its noise, or `native_children.NO_NOISE`."""
    scales: Sequence[float]
    """Factors of the scores in the confidence."""
    lengths: Sequence[int]
    """Tokens that are wanted."""
    min_probability: Sequence[float]
    """A chain whose joint confidence is below does not go on."""


@dataclass(slots=True)
class ChainResult:
    """What was drawn: for each chain its tokens and the confidence in each, and how many passes the
    model made."""

    token_ids: list[list[int]]
    confidence: list[list[float]]
    num_passes: int


def draw_chains(
    decoder: NativeDecoder, logits: Tensor, kv: Sequence[LayerKV], batch: ChainBatch
) -> ChainResult:
    """Draw chains, and write the KV of all tokens of each but its last.

    Args:
        logits: float32 [chains, vocab_size], of the rows that the first tokens follow.

    Raises:
        ValueError: a length is below 1, a slot is not there, or something is of another size.
    """
    last = _check(batch, kv[0].key.shape[0])
    count, most = len(batch.starts), max(batch.lengths)
    decoder.point_at(kv)
    cos, sin, _ = decoder.angles(max(1, last) - 1)
    starts, lengths = pack_ids("starts", batch.starts), pack_ids("lengths", batch.lengths)
    windows = pack_ids("windows", decoder.windows)
    min_probability = array("d", batch.min_probability)
    wanted = b"".join(
        pack_wanted(index, position, 1, scale)
        for index, (position, scale) in enumerate(zip(batch.positions, batch.scales, strict=True))
    )
    tokens, chances = array("q", bytes(8 * count * most)), array("f", bytes(4 * count * most))
    found = array("q", bytes(8 * count))
    all_params = b"".join(batch.all_params)
    job = native.Chains(
        _attention(decoder, kv[0], batch),
        ctypes.pointer(decoder.lm_head),
        cos,
        sin,
        windows.buffer_info()[0],
        len(windows),
        starts.buffer_info()[0],
        _address(all_params),
        _address(wanted),
        lengths.buffer_info()[0],
        min_probability.buffer_info()[0],
        most,
        pointer("logits", logits, torch.float32, (count, decoder.lm_head.out_size)),
        *(each.buffer_info()[0] for each in (tokens, chances, found)),
        None,
        torch.get_num_threads(),
    )
    model = ctypes.byref(decoder.model)
    job.scratch = decoder.room(decoder.library.chain_floats(model, ctypes.byref(job)))
    num_passes = decoder.library.chains(model, ctypes.byref(job))
    spans = [slice(most * chain, most * chain + found[chain]) for chain in range(count)]
    return ChainResult(
        [tokens[span].tolist() for span in spans],
        [chances[span].tolist() for span in spans],
        num_passes,
    )


def _check(batch: ChainBatch, num_slots: int) -> int:
    """Check that every chain is described, and that its slots are there; return where the longest
    ends."""
    count = len(batch.starts)
    given = (batch.all_params, batch.positions, batch.scales, batch.lengths, batch.min_probability)
    if count < 1 or min(batch.lengths) < 1 or any(len(each) != count for each in given):
        raise ValueError(
            f"there must be a parameter set, position, scale, least chance and length of at least "
            f"1 for each of {count} chains, got {[len(each) for each in given]} and lengths "
            f"{batch.lengths}"
        )
    check_packed_sampling(batch.all_params)
    ends = [start + n - 1 for start, n in zip(batch.starts, batch.lengths, strict=True)]
    room = batch.block_table.shape[1] * batch.block_size
    check_all_ids(
        ("starts", np.array(batch.starts), room + 1),
        ("ends of chains", np.array(ends), room + 1),
        ("block ids", batch.block_table, num_slots // batch.block_size),
    )
    return max(ends)


def _attention(decoder: NativeDecoder, kv: LayerKV, batch: ChainBatch) -> native.AttentionStep:
    """What all passes have in common; the kernels number the rows of each."""
    rows, width = batch.block_table.shape
    return native.AttentionStep(
        rows=rows,
        heads=decoder.decoder.num_heads,
        kv_heads=decoder.decoder.num_kv_heads,
        head_size=decoder.decoder.head_size,
        block_size=batch.block_size,
        table_width=width,
        block_table=array_pointer(
            "block_table", batch.block_table, np.int32, (len(batch.starts), None)
        ),
        scale=decoder.decoder.head_size**-0.5,
        kv_format=native.FORMATS[kv.key.dtype],
    )


def _address(packed: bytes) -> int | None:
    """Where bytes lie, which the caller keeps."""
    return ctypes.cast(ctypes.c_char_p(packed), ctypes.c_void_p).value
