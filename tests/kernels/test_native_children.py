"""The native draw of children is that of the torch form, and a row's is its own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from native_builds import NEON, built_for
from torch import Tensor

from folospec import SamplingParams
from folospec.kernels import native_children
from folospec.kernels.native_children import NO_NOISE, NativeChildren, pack_wanted
from folospec.kernels.sampling_records import pack_filters, pack_sampling
from folospec.sampling import noise
from folospec.sampling.noise import Purpose
from folospec.sampling.pipeline import SamplingRow, process
from folospec.spec.trees.children import Children, ChildRequest, draw_children

NUM_ROWS, SHARPNESS = 24, 1.7
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy, its filters left out": {"temperature": 0.0, "top_k": 2},
    "sampled": {"temperature": 0.8},
    "hot": {"temperature": 1.9},
    "nearly greedy": {"temperature": 1e-3},
    "top_p": {"temperature": 0.8, "top_p": 0.9},
    "top_k": {"temperature": 1.1, "top_k": 3},
    "min_p": {"temperature": 1.0, "min_p": 0.1},
}


@pytest.fixture(scope="module", params=["own", NEON])
def native(request: pytest.FixtureRequest) -> NativeChildren:
    """This machine's kernels; and those for NEON, emulated where it is no Arm."""
    if request.param != "own":
        return NativeChildren(built_for(request.param).library)
    found = native_children.load()
    if found is None:
        pytest.skip("the native kernels do not run here")
    return found


def random_logits(vocab_size: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(NUM_ROWS, vocab_size, generator=torch.Generator().manual_seed(seed))


def oracle(logits: Tensor, params: SamplingParams, count: int, how: str) -> list[Children]:
    rows = [SamplingRow(params=params, is_draft=True) for _ in logits]
    log_probs = process(logits, rows, soften_greedy=True)
    keys = [noise.key(row, 1, 50 + row, Purpose.TARGET) for row in range(len(logits))]
    places = [ChildRequest(count, [key], params.temperature) for key in keys]
    return draw_children(how, log_probs, places, SHARPNESS)


def draw(
    native: NativeChildren,
    logits: Tensor,
    params: SamplingParams,
    count: int,
    how: str = "coupled",
    *,
    late: int = 0,
) -> list[tuple[list[int], list[float]]]:
    filters = pack_filters(params.temperature, params.top_k, params.top_p, params.min_p)
    is_noisy = how == "coupled" and not params.greedy
    sharpened = how == "coupled" or params.greedy
    scale = SHARPNESS * (params.temperature or 1.0) if sharpened else 1.0
    wanted = [
        pack_wanted(row, 50 + row + late if is_noisy else NO_NOISE, count, scale)
        for row in range(len(logits))
    ]
    all_params = [pack_sampling(row, 1, filters) for row in range(len(logits))]
    return native.draw(logits, all_params, wanted, count)


@pytest.mark.parametrize("how", ["coupled", "top_k"])
@pytest.mark.parametrize("options", PARAMS.values(), ids=list(PARAMS))
@pytest.mark.parametrize(("vocab_size", "count"), [(4096, 1), (1003, 4), (5, 5)])
def test_the_children_and_the_confidence_are_those_of_the_torch_form(
    vocab_size: int, count: int, options: dict[str, Any], how: str, native: NativeChildren
) -> None:
    logits, params = random_logits(vocab_size), SamplingParams(**options)
    expected = oracle(logits, params, count, how)
    for (token_ids, confidence), children in zip(
        draw(native, logits, params, count, how), expected, strict=True
    ):
        assert token_ids == children.token_ids
        assert confidence == pytest.approx(children.confidence, rel=1e-3, abs=1e-6)


def test_the_noise_of_another_position_is_noticed(native: NativeChildren) -> None:
    """Control."""
    logits, params = random_logits(1003), SamplingParams(temperature=0.8)
    expected = [children.token_ids for children in oracle(logits, params, 4, "coupled")]
    late = [token_ids for token_ids, _ in draw(native, logits, params, 4, late=1)]
    assert sum(a == b for a, b in zip(late, expected, strict=True)) < NUM_ROWS // 4


@pytest.mark.parametrize("options", [PARAMS["greedy"], PARAMS["sampled"], PARAMS["top_p"]])
def test_a_row_does_not_depend_on_the_others(
    options: dict[str, Any], native: NativeChildren
) -> None:
    logits, params = random_logits(1003), SamplingParams(**options)
    together = draw(native, logits, params, 3)
    halves = [draw(native, logits[:half], params, 3) for half in (NUM_ROWS // 2, 1)]
    assert halves == [together[: len(half)] for half in halves]


def test_of_equal_tokens_the_lowest_come_first(native: NativeChildren) -> None:
    logits = torch.zeros(2, 100)
    logits[1, [90, 17, 40]] = 2.0
    drawn = draw(native, logits, SamplingParams(temperature=0.0), 3)
    assert [token_ids for token_ids, _ in drawn] == [[0, 1, 2], [17, 40, 90]]


@pytest.mark.parametrize("options", [PARAMS["greedy"], PARAMS["sampled"]])
def test_there_are_as_many_children_as_tokens_are_possible(
    options: dict[str, Any], native: NativeChildren
) -> None:
    logits = torch.full((4, 70), -math.inf)
    logits[0, [3, 60]] = torch.tensor([1.0, 2.0])
    logits[2, 5], logits[3, 0] = math.nan, 1.0
    drawn = [token_ids for token_ids, _ in draw(native, logits, SamplingParams(**options), 3)]
    assert sorted(drawn[0]) == [3, 60]
    assert drawn[1:] == [[], [], [0]]


def test_what_the_library_does_not_read_is_not_taken(native: NativeChildren) -> None:
    assert native.takes(torch.zeros(2, 8))
    for other in (torch.zeros(2, 8).double(), torch.zeros(8, 2).T, torch.zeros(2, 0)):
        assert not native.takes(other)
