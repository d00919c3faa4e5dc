"""Runs the rules `rejection` and `block` on the device, a program for each sequence.

They are `verify_rejection` and `verify_block` of `spec.verify`.

    left = the target's distribution at a node
    child rejected:  left = max(left - draft, 0) / its mass,  kept in the sequence's scratch row
    no child left:   token = argmax log left + gumbel

A row of probabilities is only read, and only as far as it matters: a chain whose drafts are all
accepted reads one number of every row and then races over the last. The coins are those of
`spec.verify.KeyedCoins`: keyed by the position of the root and a row, not by the token's position.
"""

from __future__ import annotations

import triton
import triton.language as tl

from folospec.kernels.gpu import sampling_arrays
from folospec.kernels.gpu.draw import MARGIN, better
from folospec.kernels.gpu.noise import (
    ACCEPT,
    RESIDUAL,
    gumbel,
    key_of,
    purpose_code,
    rough_gumbel,
    uniform,
)
from folospec.kernels.gpu.params import MOST, NEG_INF

PROPOSAL = tl.constexpr(sampling_arrays.PROPOSAL)
COLUMNS = tl.constexpr(sampling_arrays.COLUMNS)
EPS = tl.constexpr(1.1920928955078125e-07)
"""Of float32: a residual with no more mass than this is rounding."""


@triton.jit
def _coin_key(proposal, kind, row):
    """The key of a coin of a sequence: of the node at `row`, or of the path that ends there."""
    seed, sample_index = tl.load(proposal + 4), tl.load(proposal + 5)
    return key_of(seed, sample_index, tl.load(proposal + 6), purpose_code(kind, row))


@triton.jit
def _accepts(proposal, row, probability):
    """Toss the coin of a row: never at 0, always at 1 or more, for uniforms lie between."""
    return uniform(_coin_key(proposal, ACCEPT, row), row * 0) < probability


@triton.jit
def _draft_prob(drafts, draft_row, node, token, vocab):
    """The probability with which a node's token was drawn, float64; 1 without distributions."""
    at = drafts + (draft_row + node) * vocab + token
    return tl.load(at, mask=draft_row >= 0, other=1.0).to(tl.float64)


@triton.jit
def _left(probs, scratch, is_target, ids, vocab):
    """What is left of a distribution: the distribution itself where `is_target` is 1, else the
    scratch row."""
    whole = tl.load(probs + ids, mask=ids < vocab * is_target, other=0.0)
    return whole + tl.load(scratch + ids, mask=ids < vocab * (1 - is_target), other=0.0)


@triton.jit
def _excess(left, drafts, draft_row, node, token, ids, vocab):
    """max(left - draft, 0), float32; without draft distributions what is left of the other
    tokens."""
    drafted = drafts + (draft_row + node) * vocab + ids
    draft = tl.load(drafted, mask=ids < tl.where(draft_row < 0, 0, vocab), other=0.0)
    is_drafted = ids == tl.where(draft_row < 0, token, -1)
    return tl.where(is_drafted, 0.0, tl.maximum(left - draft, 0.0))


@triton.jit
def _mass_of_excess(
    probs, scratch, is_target, weight, drafts, draft_row, node, token, vocab, BLOCK: tl.constexpr
):
    """The sum of `_excess` of weight * left, float64."""
    mass = tl.zeros([BLOCK], tl.float64)
    for at in range(0, vocab, BLOCK):
        ids = at + tl.arange(0, BLOCK)
        left = weight * _left(probs, scratch, is_target, ids, vocab)
        mass += _excess(left, drafts, draft_row, node, token, ids, vocab).to(tl.float64)
    return tl.sum(mass, 0)


@triton.jit
def _reject(
    probs, scratch, is_target, weight, drafts, draft_row, node, token, vocab, BLOCK: tl.constexpr
):
    """Take a rejected node's distribution from what is left, in the scratch row, unless that leaves
    rounding only. Returns whether the distribution itself still stands."""
    mass = _mass_of_excess(
        probs, scratch, is_target, weight, drafts, draft_row, node, token, vocab, BLOCK
    )
    is_rounding = mass <= EPS
    if is_rounding == 0:
        for at in range(0, vocab, BLOCK):
            ids = at + tl.arange(0, BLOCK)
            left = weight * _left(probs, scratch, is_target, ids, vocab)
            excess = _excess(left, drafts, draft_row, node, token, ids, vocab)
            tl.store(scratch + ids, excess / mass.to(tl.float32), mask=ids < vocab)
    tl.debug_barrier()  # other threads of the program read what this one has written
    return tl.where(is_rounding, is_target, 0)


@triton.jit
def _race(probs, scratch, is_target, key, vocab, BLOCK: tl.constexpr):
    """A token of what is left, int64; -1 where that is nothing."""
    best = tl.full([], NEG_INF, tl.float32)
    token = tl.full([], MOST, tl.int64)
    for at in range(0, vocab, BLOCK):
        ids = at + tl.arange(0, BLOCK)
        left = _left(probs, scratch, is_target, ids, vocab)
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
    target_probs, row_stride, vocab, drafts, proposals, nodes, scratch, result, num_proposals,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Verify one tree in each program.

    Args:
        target_probs: float32 [*, vocab], the target's probabilities.
        drafts: float32 [*, vocab], those of the drafts of all trees.
        proposals: int64 [num_proposals, PROPOSAL]; (root row of `target_probs`, begin, size, first
            row of `drafts` or -1, seed, sample_index, position of the root).
        nodes: int64; from `begin` on the tokens of a tree's nodes, -1 for one that is not to be
            verified, then their parents.
        scratch: float32 [num_proposals, vocab].
        result: int64 [COLUMNS * num_proposals + nodes], as `coupled.verify_kernel` has it, but 0
            for the peak.
    """
    number = tl.program_id(0).to(tl.int64)
    proposal = proposals + PROPOSAL * number
    begin, size, draft_row = tl.load(proposal + 1), tl.load(proposal + 2), tl.load(proposal + 3)
    tokens = nodes + begin
    left = scratch + number * vocab
    path = result + COLUMNS * num_proposals + begin // 2
    probs = target_probs + tl.load(proposal) * row_stride
    is_target = tl.full([], 1, tl.int32)
    node = size * 0 - 1
    length = size * 0
    child = size * 0
    while child < size:
        token, parent = tl.load(tokens + child), tl.load(tokens + size + child)
        accepted = size < 0
        if (parent == node) & (token >= 0):
            drafted = _draft_prob(drafts, draft_row, child, token, vocab)
            if drafted > 0:
                kept = _left(probs, left, is_target, token, vocab)
                accepted = _accepts(proposal, child + 1, kept.to(tl.float64) / drafted)
                if accepted == 0:
                    is_target = _reject(
                        probs, left, is_target, 1.0, drafts, draft_row, child, token, vocab, BLOCK
                    )
        if accepted:
            # Its children come behind it, and no sibling of it is tried any more.
            tl.store(path + length, child)
            length += 1
            node = child
            probs = target_probs + (tl.load(proposal) + child + 1) * row_stride
            is_target = tl.full([], 1, tl.int32)
        child += 1
    key = _coin_key(proposal, RESIDUAL, node + 1)
    out = result + COLUMNS * number
    tl.store(out, _race(probs, left, is_target, key, vocab, BLOCK))
    tl.store(out + 1, length)
    tl.store(out + 2, size * 0)


@triton.jit
def block_kernel(
    target_probs, row_stride, vocab, drafts, proposals, nodes, scratch, result, num_proposals,
    BLOCK: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """Verify one chain in each program; the arguments are those of `rejection_kernel`, and NODES, a
    power of two, at least 1 + the nodes of any chain."""
    number = tl.program_id(0).to(tl.int64)
    proposal = proposals + PROPOSAL * number
    root, begin, size = tl.load(proposal), tl.load(proposal + 1), tl.load(proposal + 2)
    draft_row = tl.load(proposal + 3)
    tokens = nodes + begin
    left = scratch + number * vocab
    prefix = tl.arange(0, NODES)
    drafted_tokens = tl.load(tokens + prefix, mask=prefix < size, other=-1)
    num_candidates = tl.min(tl.where(drafted_tokens < 0, prefix, NODES), 0).to(tl.int64)

    weight = tl.full([], 1.0, tl.float64)
    weights = tl.full([NODES], 1.0, tl.float64)
    for node in range(0, num_candidates):
        token = tl.load(tokens + node)
        drafted = _draft_prob(drafts, draft_row, node, token, vocab)
        kept = tl.load(target_probs + (root + node) * row_stride + token).to(tl.float64)
        ratio = weight * kept / tl.where(drafted > 0, drafted, 1.0)
        weight = tl.where(drafted > 0, tl.minimum(ratio, 1.0), 0.0)
        weights = tl.where(prefix == node + 1, weight, weights)

    whole = tl.full([], 1, tl.int32)  # nothing has been taken from a distribution so far
    # The longest prefix that wins is the first one met from the far end.
    length = num_candidates
    searching = length > 0
    while searching:
        weight = tl.sum(tl.where(prefix == length, weights, 0.0), 0)
        accept = weight
        if length < num_candidates:
            excess = _mass_of_excess(
                target_probs + (root + length) * row_stride, left, whole, weight.to(tl.float32),
                drafts, draft_row, length, tl.load(tokens + length), vocab, BLOCK,
            )  # fmt: skip
            either = excess + 1.0 - weight
            accept = tl.where(either <= 0, 1.0, excess / tl.where(either <= 0, 1.0, either))
        wins = _accepts(proposal, length, accept)
        length = tl.where(wins, length, length - 1)
        searching = (wins == 0) & (length > 0)

    probs, is_target = target_probs + (root + length) * row_stride, whole
    if length < num_candidates:
        weight = tl.sum(tl.where(prefix == length, weights, 0.0), 0)
        is_target = _reject(
            probs, left, is_target, weight.to(tl.float32), drafts, draft_row, length,
            tl.load(tokens + length), vocab, BLOCK,
        )  # fmt: skip
    out = result + COLUMNS * number
    tl.store(
        out, _race(probs, left, is_target, _coin_key(proposal, RESIDUAL, length), vocab, BLOCK)
    )
    tl.store(out + 1, length)
    tl.store(out + 2, size * 0)
    path = result + COLUMNS * num_proposals + begin // 2
    tl.store(path + prefix, prefix.to(tl.int64), mask=prefix < length)
