"""Runs the rules `rejection` and `block` on the device, a program for each sequence.

They are `verify_rejection` and `verify_block` of `spec.verify`.

    left = the target's law at a node
    child rejected:  left = max(left - draft, 0) / its mass,  kept in the sequence's scratch row
    no child left:   token = argmax log left + gumbel

A row of law is only read, and only as far as it matters: a chain whose drafts are all accepted
reads one number of every row and then races over the last. The coins are those of
`spec.verify.KeyedCoins`: keyed by the position of the root and a row, not by the token's position.
"""

from __future__ import annotations

import triton
import triton.language as tl

from folospec.kernels.gpu import sampling_arrays
from folospec.kernels.gpu.draw import MARGIN, better
from folospec.kernels.gpu.law import MOST, NEG_INF
from folospec.kernels.gpu.noise import (
    ACCEPT,
    RESIDUAL,
    gumbel,
    key_of,
    purpose_code,
    rough_gumbel,
    uniform,
)

TRIAL = tl.constexpr(sampling_arrays.TRIAL)
COLUMNS = tl.constexpr(sampling_arrays.COLUMNS)
EPS = tl.constexpr(1.1920928955078125e-07)
"""Of float32: a residual with no more mass than this is rounding."""


@triton.jit
def _coin_key(trial, kind, row):
    """The key of a coin of a sequence: of the node at `row`, or of the path that ends there."""
    seed, sample_index = tl.load(trial + 4), tl.load(trial + 5)
    return key_of(seed, sample_index, tl.load(trial + 6), purpose_code(kind, row))


@triton.jit
def _accepts(trial, row, probability):
    """Toss the coin of a row: never at 0, always at 1 or more, for uniforms lie between."""
    return uniform(_coin_key(trial, ACCEPT, row), row * 0) < probability


@triton.jit
def _draft_prob(drafts, draft_row, node, token, vocab):
    """The probability with which a node's token was drawn, float64; 1 without laws."""
    at = drafts + (draft_row + node) * vocab + token
    return tl.load(at, mask=draft_row >= 0, other=1.0).to(tl.float64)


@triton.jit
def _left(law, scratch, is_law, ids, vocab):
    """What is left of a law: the law itself where `is_law` is 1, else the scratch row."""
    whole = tl.load(law + ids, mask=ids < vocab * is_law, other=0.0)
    return whole + tl.load(scratch + ids, mask=ids < vocab * (1 - is_law), other=0.0)


@triton.jit
def _excess(left, drafts, draft_row, node, token, ids, vocab):
    """max(left - draft, 0), float32; without draft laws what is left of the other tokens."""
    drafted = drafts + (draft_row + node) * vocab + ids
    draft = tl.load(drafted, mask=ids < tl.where(draft_row < 0, 0, vocab), other=0.0)
    is_drafted = ids == tl.where(draft_row < 0, token, -1)
    return tl.where(is_drafted, 0.0, tl.maximum(left - draft, 0.0))


@triton.jit
def _mass_of_excess(
    law, scratch, is_law, weight, drafts, draft_row, node, token, vocab, BLOCK: tl.constexpr
):
    """The sum of `_excess` of weight * left, float64."""
    mass = tl.zeros([BLOCK], tl.float64)
    for at in range(0, vocab, BLOCK):
        ids = at + tl.arange(0, BLOCK)
        left = weight * _left(law, scratch, is_law, ids, vocab)
        mass += _excess(left, drafts, draft_row, node, token, ids, vocab).to(tl.float64)
    return tl.sum(mass, 0)


@triton.jit
def _reject(
    law, scratch, is_law, weight, drafts, draft_row, node, token, vocab, BLOCK: tl.constexpr
):
    """Take a rejected node's law from what is left, in the scratch row, unless that leaves rounding
    only. Returns whether the law itself still stands."""
    mass = _mass_of_excess(
        law, scratch, is_law, weight, drafts, draft_row, node, token, vocab, BLOCK
    )
    is_rounding = mass <= EPS
    if is_rounding == 0:
        for at in range(0, vocab, BLOCK):
            ids = at + tl.arange(0, BLOCK)
            left = weight * _left(law, scratch, is_law, ids, vocab)
            excess = _excess(left, drafts, draft_row, node, token, ids, vocab)
            tl.store(scratch + ids, excess / mass.to(tl.float32), mask=ids < vocab)
    tl.debug_barrier()  # other threads of the program read what this one has written
    return tl.where(is_rounding, is_law, 0)


@triton.jit
def _race(law, scratch, is_law, key, vocab, BLOCK: tl.constexpr):
    """A token of what is left, int64; -1 where that is nothing."""
    best = tl.full([], NEG_INF, tl.float32)
    token = tl.full([], MOST, tl.int64)
    for at in range(0, vocab, BLOCK):
        ids = at + tl.arange(0, BLOCK)
        left = _left(law, scratch, is_law, ids, vocab)
        possible = left > 0
        left = tl.where(possible, left, 1.0)
        rough = tl.where(possible, tl.log(left) + rough_gumbel(key, ids), NEG_INF)
        top = tl.max(rough, 0)
        if (top > NEG_INF) & (top + MARGIN >= best):
            score = tl.log(left.to(tl.float64)).to(tl.float32) + gumbel(key, ids)
            score = tl.where(possible, score, NEG_INF)
            token, best = better(token, best, score, ids.to(tl.int64))
    return tl.where(best > NEG_INF, token, -1)


@triton.jit
def rejection_kernel(
    laws, row_stride, vocab, drafts, trials, nodes, scratch, result, num_trials,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Judge one tree in each program.

    Args:
        laws: float32 [*, vocab], the target's probabilities.
        drafts: float32 [*, vocab], those of the drafts of all trees.
        trials: int64 [trials, TRIAL]; (root row of `laws`, begin, size, first row of `drafts` or
            -1, seed, sample_index, position of the root).
        nodes: int64; from `begin` on the tokens of a tree's nodes, -1 for one that is not to be
            judged, then their parents.
        scratch: float32 [trials, vocab].
        result: int64 [COLUMNS * trials + nodes], as `walk.walk_kernel` has it, but 0 for the peak.
    """
    number = tl.program_id(0).to(tl.int64)
    trial = trials + TRIAL * number
    begin, size, draft_row = tl.load(trial + 1), tl.load(trial + 2), tl.load(trial + 3)
    tokens = nodes + begin
    left = scratch + number * vocab
    path = result + COLUMNS * num_trials + begin // 2
    law = laws + tl.load(trial) * row_stride
    is_law = tl.full([], 1, tl.int32)
    node = size * 0 - 1
    length = size * 0
    child = size * 0
    while child < size:
        token, parent = tl.load(tokens + child), tl.load(tokens + size + child)
        accepted = size < 0
        if (parent == node) & (token >= 0):
            drafted = _draft_prob(drafts, draft_row, child, token, vocab)
            if drafted > 0:
                kept = _left(law, left, is_law, token, vocab)
                accepted = _accepts(trial, child + 1, kept.to(tl.float64) / drafted)
                if accepted == 0:
                    is_law = _reject(
                        law, left, is_law, 1.0, drafts, draft_row, child, token, vocab, BLOCK
                    )
        if accepted:
            # Its children come behind it, and no sibling of it is tried any more.
            tl.store(path + length, child)
            length += 1
            node = child
            law = laws + (tl.load(trial) + child + 1) * row_stride
            is_law = tl.full([], 1, tl.int32)
        child += 1
    key = _coin_key(trial, RESIDUAL, node + 1)
    out = result + COLUMNS * number
    tl.store(out, _race(law, left, is_law, key, vocab, BLOCK))
    tl.store(out + 1, length)
    tl.store(out + 2, size * 0)


@triton.jit
def block_kernel(
    laws, row_stride, vocab, drafts, trials, nodes, scratch, result, num_trials,
    BLOCK: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """Judge one chain in each program; the arguments are those of `rejection_kernel`, and NODES, a
    power of two, at least 1 + the nodes of any chain."""
    number = tl.program_id(0).to(tl.int64)
    trial = trials + TRIAL * number
    root, begin, size = tl.load(trial), tl.load(trial + 1), tl.load(trial + 2)
    draft_row = tl.load(trial + 3)
    tokens = nodes + begin
    left = scratch + number * vocab
    prefix = tl.arange(0, NODES)
    drafted_tokens = tl.load(tokens + prefix, mask=prefix < size, other=-1)
    judged = tl.min(tl.where(drafted_tokens < 0, prefix, NODES), 0).to(tl.int64)

    weight = tl.full([], 1.0, tl.float64)
    weights = tl.full([NODES], 1.0, tl.float64)
    for node in range(0, judged):
        token = tl.load(tokens + node)
        drafted = _draft_prob(drafts, draft_row, node, token, vocab)
        kept = tl.load(laws + (root + node) * row_stride + token).to(tl.float64)
        ratio = weight * kept / tl.where(drafted > 0, drafted, 1.0)
        weight = tl.where(drafted > 0, tl.minimum(ratio, 1.0), 0.0)
        weights = tl.where(prefix == node + 1, weight, weights)

    whole = tl.full([], 1, tl.int32)  # nothing has been taken from a law so far
    # The longest prefix that wins is the first one met from the far end.
    length = judged
    searching = length > 0
    while searching:
        weight = tl.sum(tl.where(prefix == length, weights, 0.0), 0)
        accept = weight
        if length < judged:
            excess = _mass_of_excess(
                laws + (root + length) * row_stride, left, whole, weight.to(tl.float32), drafts,
                draft_row, length, tl.load(tokens + length), vocab, BLOCK,
            )  # fmt: skip
            either = excess + 1.0 - weight
            accept = tl.where(either <= 0, 1.0, excess / tl.where(either <= 0, 1.0, either))
        wins = _accepts(trial, length, accept)
        length = tl.where(wins, length, length - 1)
        searching = (wins == 0) & (length > 0)

    law, is_law = laws + (root + length) * row_stride, whole
    if length < judged:
        weight = tl.sum(tl.where(prefix == length, weights, 0.0), 0)
        is_law = _reject(
            law, left, is_law, weight.to(tl.float32), drafts, draft_row, length,
            tl.load(tokens + length), vocab, BLOCK,
        )  # fmt: skip
    out = result + COLUMNS * number
    tl.store(out, _race(law, left, is_law, _coin_key(trial, RESIDUAL, length), vocab, BLOCK))
    tl.store(out + 1, length)
    tl.store(out + 2, size * 0)
    path = result + COLUMNS * num_trials + begin // 2
    tl.store(path + prefix, prefix.to(tl.int64), mask=prefix < length)
