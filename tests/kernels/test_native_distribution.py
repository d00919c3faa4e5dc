"""What the native kernels draw has the parameter set of the pipeline."""

from collections.abc import Sequence

import pytest
import torch
from chi_square import FALSE_ALARM, chi_square_p_value

from folospec.kernels import native_sampling
from folospec.kernels.sampling_records import PackedTrees, pack_sampling
from folospec.sampling.pipeline import SamplingRow, pack_filters, process
from folospec.sampling_params import SamplingParams

NUM_DRAWS = 60_000
LOGITS = torch.tensor([[1.0, -2.0, 0.5, 0.0, -8.0, 2.0, 0.0, 1.5]])
PARAMS = {
    "plain": SamplingParams(),
    "warm": SamplingParams(temperature=1.7),
    "filtered": SamplingParams(temperature=0.7, top_p=0.9, min_p=0.05),
    "top_k": SamplingParams(top_k=3),
}


def counts(params: SamplingParams, positions: Sequence[int]) -> torch.Tensor:
    native = native_sampling.load()
    if native is None:
        pytest.skip("there are no native kernels here")
    packed_trees, params = PackedTrees(), pack_sampling(3, 0, pack_filters(params))
    for position in positions:
        packed_trees.add(params, 0, position)
    tokens = [
        draw_and_verify.token_id for draw_and_verify in native.draw_and_verify(LOGITS, packed_trees)
    ]
    return torch.bincount(torch.tensor(tokens), minlength=LOGITS.shape[1])


@pytest.mark.parametrize("name", PARAMS)
def test_draws_at_many_positions_have_the_pipelines_distribution(name: str) -> None:
    params = PARAMS[name]
    expected = process(LOGITS, [SamplingRow(params)])[0].exp() * NUM_DRAWS
    observed = counts(params, range(NUM_DRAWS))
    assert chi_square_p_value(observed, expected) > FALSE_ALARM


def test_a_slightly_warmer_distribution_is_told_apart() -> None:
    expected = process(LOGITS / 1.1, [SamplingRow(PARAMS["plain"])])[0].exp() * NUM_DRAWS
    assert chi_square_p_value(counts(PARAMS["plain"], range(NUM_DRAWS)), expected) < FALSE_ALARM


def test_noise_that_repeats_is_told_apart() -> None:
    repeating = [position % 100 for position in range(NUM_DRAWS)]
    expected = process(LOGITS, [SamplingRow(PARAMS["plain"])])[0].exp() * NUM_DRAWS
    assert chi_square_p_value(counts(PARAMS["plain"], repeating), expected) < FALSE_ALARM
