"""Sampling and verification on the device are those of the torch pipeline, and every rule of the
kernels matters."""

import random

import pytest
import torch

pytest.importorskip("triton")

import gpu_cases_sampling  # noqa: E402
import gpu_cases_verification  # noqa: E402
from gpu_mutants import mutant  # noqa: E402

from folospec.kernels.gpu import (  # noqa: E402
    coupled,
    draw,
    filters,
    launch,
    log_probs,
    noise,
    params,
    ratio,
    row_passes,
    sampling,
)
from folospec.kernels.gpu.sampling import DeviceSampling  # noqa: E402
from folospec.kernels.gpu.sampling_arrays import (  # noqa: E402
    PackedProposals,
    child_arrays,
    on_device,
)
from folospec.kernels.native_children import pack_wanted  # noqa: E402
from folospec.kernels.sampling_records import PackedTrees, pack_filters, pack_sampling  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROOMS = (gpu_cases_sampling, gpu_cases_verification)
ROOM_OF = {name: room for room in ROOMS for name in room.BUILDS}
LAYERS = [noise, params, filters, draw, log_probs, coupled, ratio, row_passes, sampling]
"""Each behind those it imports."""
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid|divide):RuntimeWarning")


def case_of(name, made=DeviceSampling):
    return ROOM_OF[name].case(name, DEVICE, 0, made)


@pytest.mark.parametrize("name", ROOM_OF)
def test_it_is_the_oracle(name):
    case_of(name).check()


FEW = "children: few, 13, plain"
EVEN = "log_probs: flat, 32, filtered"
MIXED = "log_probs: wide, 23, mixed"
ONE = "log_probs: one, 1, mixed"
IMPOSSIBLE = "draws: impossible"
PATHS = "paths: 88"
REJECTION = "rejection: 5"
BLOCK = "block: 5"
BROKEN = [
    # The hash and its key.
    (FEW, noise, "0xBF58476D1CE4E5B9", "0xBF58476D1CE4E5B7"),
    (FEW, noise, "0x94D049BB133111EB", "0x94D049BB133111E9"),
    (FEW, noise, "0x9E3779B97F4A7C15", "0x9E3779B97F4A7C13"),
    (FEW, noise, "x >> 30", "x >> 29"),
    (FEW, noise, "x >> 27", "x >> 26"),
    (FEW, noise, "x >> 31", "x >> 32"),
    (FEW, noise, "0x2C1B3C6D", "0x2C1B3C6F"),
    (FEW, noise, "0x297A2D39", "0x297A2D3B"),
    (FEW, noise, "(x ^ (x >> 15)) *", "(x ^ (x >> 14)) *"),
    (FEW, noise, "x >> 12", "x >> 13"),
    (FEW, noise, "return x ^ (x >> 15)", "return x ^ (x >> 17)"),
    (FEW, noise, "* 0, seed)", "* 0, seed & 0xFFFFFFFF)"),
    (FEW, noise, "_absorb(state, sample_index)", "_absorb(state, sample_index * 0)"),
    (FEW, noise, "_absorb(state, position)", "_absorb(state, position + 1)"),
    (REJECTION, noise, "_absorb(state, purpose)", "_absorb(state, purpose * 0)"),
    (FEW, noise, "ids.to(tl.uint32) ^ low", "ids.to(tl.uint32) ^ high"),
    (FEW, noise, "^ low) ^ high)", "^ low) ^ low)"),
    (REJECTION, noise, "8 * (row + 1)", "8 * row"),
    (BLOCK, noise, "ACCEPT = tl.constexpr(2)", "ACCEPT = tl.constexpr(1)"),
    (REJECTION, noise, "RESIDUAL = tl.constexpr(3)", "RESIDUAL = tl.constexpr(1)"),
    (FEW, noise, "TARGET = tl.constexpr(0)", "TARGET = tl.constexpr(1)"),
    (FEW, noise, "v * v * (0.5", "v * (0.5"),
    # The parameter set of a row.
    (FEW, params, "tl.load(params + 3)", "tl.load(params + 4)"),
    (FEW, params, "tl.load(params + 4)", "tl.load(params + 3)"),
    (EVEN, params, "(top_k < vocab))", "(top_k < 7))"),
    (
        "children: ties, 37, filtered",
        params,
        "tl.float64, bitcast=True) > 0)",
        "tl.float64, bitcast=True) < 9)",
    ),
    (
        "children: holes, 33, plain",
        params,
        "- peak.to(tl.float64)) / t",
        "- peak.to(tl.float64)) * t",
    ),
    (EVEN, params, "mask=part < num_parts, other=0)", "mask=part < 1, other=0)"),
    (IMPOSSIBLE, params, 'tl.where(is_nan, float("nan"), peak)', "peak"),
    (IMPOSSIBLE, params, ' & (x < float("inf"))', ""),
    ("log_probs: few, 13, plain", params, "0.5**BITS", "0.5 ** (BITS - 1)"),
    # Filters.
    (EVEN, filters, "tl.where(logits == 0, 0.0, logits)", "logits"),
    (EVEN, filters, "raw & 0xFFFFFFFF, 0x7FFFFFFF - raw", "raw & 0xFFFFFFFF, raw"),
    ("children: one, 1, mixed", filters, "| ids.to(tl.int64)", "| (ids.to(tl.int64) ^ 1)"),
    (EVEN, filters, "inside.to(tl.int32), 0) >= count", "inside.to(tl.int32), 0) >= 2"),
    (
        "log_probs: ties, 37, filtered",
        filters,
        ".to(tl.float64) >= bound",
        ".to(tl.float64) > bound",
    ),
    (EVEN, filters, ".to(tl.float64) >= bound", ".to(tl.float64) > bound"),
    (
        "draws: ties, 37, filtered",
        filters,
        ">= least) & (scaled >= floor)",
        ">= least) & (scaled > floor)",
    ),
    (EVEN, filters, "/ (2.0 * vocab)", "* 0.5"),
    (ONE, filters, "kept = (keys <= last)", "kept = (keys < last)"),
    (MIXED, filters, "top_p * total", "total * (1 - top_p)"),
    (ONE, filters, "            total = total_of(", "            total = 0 * total_of("),
    (MIXED, filters, "mask=ids < vocab", "mask=ids <= vocab"),
    (ONE, filters, "place < counts[:, None]", "place < counts[:, None] - 1"),
    (MIXED, filters, "tl.cumsum(keep.to(tl.int32), 0) - 1", "tl.cumsum(keep.to(tl.int32), 0) // 2"),
    # The race.
    (
        "log_probs: few, 13, plain",
        draw,
        "other=NEG_INF)\n    is_nan",
        "other=9.0)\n    is_nan",
    ),
    (IMPOSSIBLE, draw, 'tl.where(is_nan, float("nan"), peak))', "peak)"),
    (
        "log_probs: ties, 45, plain",
        draw,
        "tl.min(tl.where(x == peak, ids",
        "tl.min(tl.where(x > 9, ids",
    ),
    (
        "log_probs: ties, 45, plain",
        draw,
        "tl.min(tl.where((found == peak)",
        "tl.max(tl.where((found == peak)",
    ),
    (
        "children: ties, 45, plain",
        draw,
        "bounds = rough + scale_down(",
        "bounds = rough + 0 * scale_down(",
    ),
    ("children: ties, 45, plain", draw, "(first < token)", "(first > token)"),
    ("children: ties, 45, plain", draw, "ids = at * PART +", "ids = 0 * at +"),
    (
        MIXED,
        log_probs,
        "out + number * vocab + ids",
        "out + number * vocab + vocab - 1 - ids",
    ),
    (
        "children: one, 1, mixed",
        draw,
        "token, best = better(token, best, score, id_of_key(keys, ID_BITS))",
        "token, best = better(token, best, score, keys)",
    ),
    (
        "children: one, 1, mixed",
        draw,
        "kept = (keys <= last) & (scaled >= floor)",
        "kept = scaled >= floor",
    ),
    (
        "log_probs: wide, 40, filtered",
        log_probs,
        "kept = in_order & (scaled >= floor)",
        "kept = in_order",
    ),
    (
        FEW,
        draw,
        "tl.load(params + 1), position + advance",
        "tl.load(params + 1), position",
    ),
    # The walk.
    (PATHS, coupled, "nodes + begin + size + row", "nodes + begin + row"),
    (PATHS, coupled, "& (token == next_token)", ""),
    (PATHS, coupled, "(tl.gather(level, parent, 0) > 0)", "(parent == end)"),
    ("paths: 512", coupled, "ancestor == first", "ancestor >= first"),
    (PATHS, coupled, "first_row = first_node + tree", "first_row = first_node"),
    (PATHS, coupled, "(end - 1).to", "end.to"),
    (PATHS, coupled, "row_peaks + first_row + end", "row_peaks + first_row"),
    # The ratio rules.
    (REJECTION, ratio, "(parent == node) & (token >= 0)", "(parent == node)"),
    (REJECTION, ratio, "if (parent == node) & ", "if "),
    (REJECTION, ratio, "kept.to(tl.float64) / drafted", "kept.to(tl.float64) + 0 * drafted"),
    (REJECTION, ratio, "tl.maximum(left - draft, 0.0)", "left"),
    (REJECTION, ratio, "tl.where(draft_row < 0, token, -1)", "-1"),
    (REJECTION, ratio, "tl.where(is_rounding, is_target, 0)", "is_target"),
    ("rejection: 37", ratio, "excess / mass.to(tl.float32)", "excess * mass.to(tl.float32)"),
    (REJECTION, ratio, "(tl.load(proposal) + child + 1) * row_stride", "child * row_stride"),
    (BLOCK, ratio, "(draft_row + node) * vocab + token", "draft_row * vocab + token"),
    (BLOCK, ratio, "tl.where(drafted_tokens < 0, prefix", "tl.where(prefix >= size, prefix"),
    (
        "block: 11",
        ratio,
        "length = tl.where(wins, length, length - 1)",
        "length = length - 1 + 0 * wins",
    ),
    ("block: 11", ratio, "accept = weight\n", "accept = weight * 0\n"),
    (BLOCK, ratio, "excess + 1.0 - weight", "excess - weight"),
    (BLOCK, ratio, "weight * kept / tl.where", "kept / tl.where"),
]
"""The smallest case that shows it, and what is broken."""


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: f"{broken[0]}: {broken[2]}")
def test_a_broken_rule_is_seen(broken, tmp_path):
    name, module, old, new = broken
    changed = mutant(module, old, new, tmp_path, LAYERS[LAYERS.index(module) + 1 :])
    case = case_of(name, changed.DeviceSampling)
    with pytest.raises((AssertionError, IndexError)):
        case.check()


NOT_WRITTEN = -54321


def scratch_of(sampling, monkeypatch, children):
    """Draw two rows without filters and two with some, into memory that says what was written.

    Returns:
        What was drawn; and for the scratch of every kernel that has to do with filters alone, in
        which rows it was written.
    """
    params_of = [0, 1, 0, 2]
    all_params = [
        pack_sampling(5, 0, pack_filters(0.8, k, p, 0.0)) for k, p in ((0, 1.0), (9, 1.0), (0, 0.7))
    ]
    rows, written = gpu_cases_sampling.Rows("wide", 40, params_of), {}
    logits = gpu_cases_sampling.logits_of(rows, random.Random(4)).to(DEVICE)
    outputs = {"narrow_kernel": slice(-3, -1), "select_kernel": slice(-3, -1)}
    outputs |= {"weigh_kernel": slice(-2, -1)} if children else {}
    real = launch.launch

    def watched(kernel, grid, *args, **options):
        out = args[outputs.get(kernel.__name__, slice(0))]
        for tensor in out:
            tensor.fill_(NOT_WRITTEN)
        real(kernel, grid, *args, **options)
        for place, tensor in enumerate(out):
            touched = tensor.reshape(len(tensor), -1) != NOT_WRITTEN
            written[kernel.__name__, place] = touched.any(1).tolist()

    wanted = [pack_wanted(params, 7, 1, 1.0) for params in params_of]
    tensors = on_device(child_arrays(all_params, wanted), DEVICE)
    made = sampling(part=64)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "launch", watched)
        if children:
            result = torch.empty((3, 4), dtype=torch.int64, device=DEVICE)
            made.draw_next(logits, tensors, result)
            return result[0, ::2].tolist(), written
        tokens, _ = made.draw_tokens(logits, tensors["all_params"], tensors["draws"])
    return tokens[::2].tolist(), written


@pytest.mark.parametrize("children", [False, True])
def test_rows_without_filters_leave_their_kernels_alone(children, monkeypatch, tmp_path):
    """Though the kernels are launched: nothing is written for them, and poison is not read."""
    with_filters = [False, True, False, True]
    tokens, written = scratch_of(DeviceSampling, monkeypatch, children)
    assert len(written) == (5 if children else 4)
    assert all(rows == with_filters for rows in written.values())
    everywhere = mutant(params, "return some & (", "return (some | True) & (", tmp_path, LAYERS[2:])
    same, more = scratch_of(everywhere.DeviceSampling, monkeypatch, children)
    assert same == tokens
    assert all(all(rows) for rows in more.values())


def test_a_row_depends_on_itself_alone():
    """Among others, in another place of the step and cut in other parts, bit by bit."""
    rng = random.Random(3)
    rows = gpu_cases_sampling.Rows("wide", 40, [None] * 5)
    logits = gpu_cases_sampling.logits_of(rows, rng).to(DEVICE)
    all_params = [
        pack_sampling(0, 0, pack_filters(0.8, k, p, 0.0)) for k, p in ((0, 1.0), (9, 0.8))
    ]
    whole, _ = DeviceSampling(part=16).start_log_probs(logits, all_params, [0, 1, 0, 1, 1])
    for row, distribution_id in ((3, 1), (2, 0)):
        alone, _ = DeviceSampling(part=64).start_log_probs(
            logits[row : row + 1], all_params, [distribution_id]
        )
        assert torch.equal(whole[row], alone[0])


def test_rows_that_are_not_there_are_refused():
    packed_trees = PackedTrees()
    packed_trees.add(pack_sampling(1, 0, pack_filters(1.0, 0, 1.0, 0.0)), 2, 0)
    with pytest.raises(ValueError, match="there are 2 rows of logits, not 3"):
        DeviceSampling().draw_and_verify(torch.zeros(2, 5, device=DEVICE), packed_trees)


def test_distributions_that_do_not_fit_are_refused():
    sampled, probs = DeviceSampling(), torch.full((2, 4), 0.25, device=DEVICE)
    with pytest.raises(ValueError, match="params_of must name one of 0 parameter sets"):
        sampled.log_probs(probs, [], [0, 0])
    with pytest.raises(ValueError, match="one child can be drawn"):
        sampled.draw(probs, [], [], most=2)
    with pytest.raises(ValueError, match="rule must be 'rejection' or 'block', got 'coupled'"):
        sampled.start_ratio("coupled", probs, PackedProposals())
    proposals = PackedProposals()
    proposals.add((1, 0, 0), 0, [1], [-1], torch.full((1, 3), 1 / 3))
    with pytest.raises(ValueError, match="cover the target's 4 tokens, got 3"):
        sampled.start_ratio("rejection", probs, proposals)


def test_interpreted_kernels_take_rows_only_if_asked_to(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    logits = torch.zeros(2, 5)
    monkeypatch.setenv("FOLOSPEC_KERNELS", "auto")
    assert not DeviceSampling.takes(logits)
    monkeypatch.setenv("FOLOSPEC_KERNELS", "triton")
    assert DeviceSampling.takes(logits)
    for other in (logits.double(), logits[0], logits.T, logits[:, :0]):
        assert not DeviceSampling.takes(other)
