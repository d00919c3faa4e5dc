"""Sampling and verification on the device are those of the torch pipeline, and every rule of the
kernels matters."""

import random

import pytest
import torch

pytest.importorskip("triton")

import gpu_cases_sampling as room  # noqa: E402
from gpu_mutants import mutant  # noqa: E402

from folospec.kernels.gpu import (  # noqa: E402
    draw,
    filters,
    law,
    noise,
    ratio,
    row_passes,
    sampling,
    walk,
)
from folospec.kernels.gpu.sampling import DeviceSampling, Trials  # noqa: E402
from folospec.kernels.native_sampling import Walks, pack_filters, pack_law  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = {case.name: case for case in room.cases(DEVICE)}
LAYERS = [noise, law, filters, draw, walk, ratio, row_passes, sampling]
"""Each behind those it imports."""
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid|divide):RuntimeWarning")


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_oracle(name):
    CASES[name].check()


FLAT, WIDE, HOLES = (f"{kind}, plain" for kind in ("flat, 40", "wide, 61", "holes, 33"))
SHARP, EVEN = "wide, 40, filtered", "ties, 37, filtered"
BROKEN = [
    # The hash and its key.
    (f"draws: {FLAT}", noise, "0xBF58476D1CE4E5B9", "0xBF58476D1CE4E5B7"),
    (f"draws: {FLAT}", noise, "0x94D049BB133111EB", "0x94D049BB133111E9"),
    (f"draws: {FLAT}", noise, "0x9E3779B97F4A7C15", "0x9E3779B97F4A7C13"),
    (f"draws: {FLAT}", noise, "x >> 30", "x >> 29"),
    (f"draws: {FLAT}", noise, "x >> 27", "x >> 26"),
    (f"draws: {FLAT}", noise, "x >> 31", "x >> 32"),
    (f"draws: {FLAT}", noise, "0x2C1B3C6D", "0x2C1B3C6F"),
    (f"draws: {FLAT}", noise, "0x297A2D39", "0x297A2D3B"),
    (f"draws: {FLAT}", noise, "(x ^ (x >> 15)) *", "(x ^ (x >> 14)) *"),
    (f"draws: {FLAT}", noise, "x >> 12", "x >> 13"),
    (f"draws: {FLAT}", noise, "return x ^ (x >> 15)", "return x ^ (x >> 17)"),
    (f"draws: {FLAT}", noise, "* 0, seed)", "* 0, seed & 0xFFFFFFFF)"),
    (f"draws: {FLAT}", noise, "_absorb(state, sample_index)", "_absorb(state, sample_index * 0)"),
    (f"draws: {FLAT}", noise, "_absorb(state, position)", "_absorb(state, position + 1)"),
    ("rejection", noise, "_absorb(state, purpose)", "_absorb(state, purpose * 0)"),
    (f"draws: {FLAT}", noise, "ids.to(tl.uint32) ^ low", "ids.to(tl.uint32) ^ high"),
    (f"draws: {FLAT}", noise, "^ low) ^ high)", "^ low) ^ low)"),
    ("rejection", noise, "8 * (row + 1)", "8 * row"),
    ("block", noise, "ACCEPT = tl.constexpr(2)", "ACCEPT = tl.constexpr(1)"),
    ("rejection", noise, "RESIDUAL = tl.constexpr(3)", "RESIDUAL = tl.constexpr(1)"),
    (f"draws: {FLAT}", noise, "TARGET = tl.constexpr(0)", "TARGET = tl.constexpr(1)"),
    (f"children: {WIDE}", noise, "v * v * (0.5", "v * (0.5"),
    # The law of a row.
    (f"laws: {SHARP}", law, "tl.load(law + 3)", "tl.load(law + 4)"),
    (f"laws: {SHARP}", law, "tl.load(law + 4)", "tl.load(law + 3)"),
    (f"laws: {EVEN}", law, "(top_k < vocab))", "(top_k < 7))"),
    (f"children: {SHARP}", law, "tl.float64, bitcast=True) > 0)", "tl.float64, bitcast=True) < 9)"),
    (f"laws: {WIDE}", law, "- peak.to(tl.float64)) / t", "- peak.to(tl.float64)) * t"),
    (f"laws: {WIDE}", law, "mask=part < num_parts, other=0)", "mask=part < 1, other=0)"),
    ("draws: impossible", law, 'tl.where(is_nan, float("nan"), peak)', "peak"),
    ("draws: impossible", law, ' & (x < float("inf"))', ""),
    (f"laws: {WIDE}", law, "0.5**BITS", "0.5 ** (BITS - 1)"),
    # Filters.
    ("laws: flat, 32, filtered", filters, "tl.where(logits == 0, 0.0, logits)", "logits"),
    (f"laws: {SHARP}", filters, "raw & 0xFFFFFFFF, 0x7FFFFFFF - raw", "raw & 0xFFFFFFFF, raw"),
    ("laws: flat, 32, filtered", filters, "| ids.to(tl.int64)", "| (ids.to(tl.int64) ^ 1)"),
    (f"laws: {SHARP}", filters, "inside.to(tl.int32), 0) >= count", "inside.to(tl.int32), 0) >= 2"),
    (f"laws: {EVEN}", filters, ".to(tl.float64) >= bound", ".to(tl.float64) > bound"),
    ("laws: flat, 32, filtered", filters, ".to(tl.float64) >= bound", ".to(tl.float64) > bound"),
    (f"laws: {SHARP}", filters, ">= least) & (scaled >= floor)", ">= least) & (scaled > floor)"),
    (f"laws: {SHARP}", filters, "/ (2.0 * vocab)", "* 0.5"),
    (f"laws: {SHARP}", filters, "kept = (keys <= last)", "kept = (keys < last)"),
    (f"laws: {SHARP}", filters, "top_p * total", "total * (1 - top_p)"),
    (
        f"laws: {SHARP}",
        filters,
        "            total = total_of(",
        "            total = 0 * total_of(",
    ),
    (f"draws: {SHARP}", filters, "mask=ids < vocab", "mask=ids <= vocab"),
    (f"laws: {SHARP}", filters, "place < counts[:, None]", "place < counts[:, None] - 1"),
    (f"laws: {SHARP}", filters, "tl.cumsum(keep.to(tl.int32), 0) - 1", "tl.arange(0, PART)"),
    # The race.
    (f"draws: {WIDE}", draw, "other=NEG_INF)\n    is_nan", "other=9.0)\n    is_nan"),
    ("draws: impossible", draw, 'tl.where(is_nan, float("nan"), peak))', "peak)"),
    (
        "draws: ties, 45, plain",
        draw,
        "tl.min(tl.where(x == peak, ids",
        "tl.min(tl.where(x > 9, ids",
    ),
    (
        "draws: ties, 45, plain",
        draw,
        "tl.min(tl.where((found == peak)",
        "tl.max(tl.where((found == peak)",
    ),
    (f"children: {WIDE}", draw, "bounds = rough + scale_down(", "bounds = rough + 0 * scale_down("),
    ("children: ties, 45, plain", draw, "(first < token)", "(first > token)"),
    (f"draws: {WIDE}", draw, "ids = at * PART +", "ids = 0 * at +"),
    (f"laws: {WIDE}", draw, "out + number * vocab + ids", "out + number * vocab + (ids ^ 1)"),
    (
        f"draws: {SHARP}",
        draw,
        "token, best = better(token, best, score, id_of_key(keys, ID_BITS))",
        "token, best = better(token, best, score, keys)",
    ),
    (
        f"draws: {SHARP}",
        draw,
        "kept = (keys <= last) & (scaled >= floor)",
        "kept = scaled >= floor",
    ),
    (f"laws: {SHARP}", draw, "kept = in_order & (scaled >= floor)", "kept = in_order"),
    (
        f"children: {WIDE}",
        draw,
        "tl.load(law + 1), position + advance",
        "tl.load(law + 1), position",
    ),
    # The walk.
    ("walks: small", walk, "nodes + begin + size + row", "nodes + begin + row"),
    ("walks: large", walk, "& (token == next_token)", ""),
    ("walks: twins", walk, "(tl.gather(level, parent, 0) > 0)", "(parent == end)"),
    ("walks: twins", walk, "ancestor == first", "ancestor >= first"),
    ("walks: small", walk, "first_row = first_node + walk", "first_row = first_node"),
    ("walks: small", walk, "(end - 1).to", "end.to"),
    ("walks: large", walk, "row_peaks + first_row + end", "row_peaks + first_row"),
    # The ratio rules.
    ("rejection", ratio, "(parent == node) & (token >= 0)", "(parent == node)"),
    ("rejection", ratio, "if (parent == node) & ", "if "),
    ("rejection", ratio, "kept.to(tl.float64) / drafted", "kept.to(tl.float64) + 0 * drafted"),
    ("rejection", ratio, "tl.maximum(left - draft, 0.0)", "left"),
    ("rejection", ratio, "tl.where(draft_row < 0, token, -1)", "-1"),
    ("rejection", ratio, "tl.where(is_rounding, is_law, 0)", "is_law"),
    ("rejection", ratio, "excess / mass.to(tl.float32)", "excess * mass.to(tl.float32)"),
    ("rejection", ratio, "(tl.load(trial) + child + 1) * row_stride", "child * row_stride"),
    ("block", ratio, "(draft_row + node) * vocab + token", "draft_row * vocab + token"),
    ("block", ratio, "tl.where(drafted_tokens < 0, prefix", "tl.where(prefix >= size, prefix"),
    (
        "block",
        ratio,
        "length = tl.where(wins, length, length - 1)",
        "length = length - 1 + 0 * wins",
    ),
    ("block", ratio, "accept = weight\n", "accept = weight * 0\n"),
    ("block", ratio, "excess + 1.0 - weight", "excess - weight"),
    ("block", ratio, "weight * kept / tl.where", "kept / tl.where"),
]


def check_all(cases):
    for case in cases:
        case.check()


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: f"{broken[0]}: {broken[2]}")
def test_a_broken_rule_is_seen(broken, tmp_path):
    name, module, old, new = broken
    users = LAYERS[LAYERS.index(module) + 1 :]
    changed = mutant(module, old, new, tmp_path, users)
    made = room.cases(DEVICE, 0, changed.DeviceSampling)
    cases = [case for case in made if case.name.startswith(name)]
    assert cases
    with pytest.raises((AssertionError, IndexError)):
        check_all(cases)


def test_a_row_depends_on_itself_alone():
    """Among others, in another place of the step and cut in other parts, bit by bit."""
    rng = random.Random(3)
    logits = room.logits_of("wide", 5, 40, rng).to(DEVICE)
    laws = [pack_law(0, 0, pack_filters(0.8, k, p, 0.0)) for k, p in ((0, 1.0), (9, 0.8))]
    whole, _ = DeviceSampling(part=16).start_log_probs(logits, laws, [0, 1, 0, 1, 1])
    for row, law_id in ((3, 1), (2, 0)):
        alone, _ = DeviceSampling(part=64).start_log_probs(logits[row : row + 1], laws, [law_id])
        assert torch.equal(whole[row], alone[0])


def test_rows_that_are_not_there_are_refused():
    walks = Walks()
    walks.add(pack_law(1, 0, pack_filters(1.0, 0, 1.0, 0.0)), 2, 0)
    with pytest.raises(ValueError, match="there are 2 rows of logits, not 3"):
        DeviceSampling().walk(torch.zeros(2, 5, device=DEVICE), walks)


def test_laws_that_do_not_fit_are_refused():
    sampled, probs = DeviceSampling(), torch.full((2, 4), 0.25, device=DEVICE)
    with pytest.raises(ValueError, match="law_of must name one of 0 laws"):
        sampled.log_probs(probs, [], [0, 0])
    with pytest.raises(ValueError, match="one child can be drawn"):
        sampled.draw(probs, [], [], most=2)
    with pytest.raises(ValueError, match="rule must be 'rejection' or 'block', got 'coupled'"):
        sampled.verify_ratio("coupled", probs, Trials())
    trials = Trials()
    trials.add((1, 0, 0), 0, [1], [-1], torch.full((1, 3), 1 / 3))
    with pytest.raises(ValueError, match="cover the target's 4 tokens, got 3"):
        sampled.verify_ratio("rejection", probs, trials)


def test_interpreted_kernels_take_rows_only_if_asked_to(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    logits = torch.zeros(2, 5)
    monkeypatch.setenv("FOLOSPEC_KERNELS", "auto")
    assert not DeviceSampling.takes(logits)
    monkeypatch.setenv("FOLOSPEC_KERNELS", "triton")
    assert DeviceSampling.takes(logits)
    for other in (logits.double(), logits[0], logits.T, logits[:, :0]):
        assert not DeviceSampling.takes(other)
