"""Drawing with keyed noise follows the distribution, and the same key gives the same token
anywhere."""

import math

import pytest
import torch
from chi_square import FALSE_ALARM, chi_square_p_value

from folospec.sampling import noise
from folospec.sampling.noise import Purpose, key, key_tensor
from folospec.sampling.pipeline import SamplingRow, process
from folospec.sampling.sampler import NO_TOKEN, draw_target, perturb
from folospec.sampling_params import SamplingParams

NUM_DRAWS = 60_000
LOGITS = torch.tensor([1.0, -2.0, 0.5, 0.0, -8.0, 2.0])
NEG_INF = float("-inf")


def target_keys(positions, seeds=range(NUM_DRAWS)):
    return [key_tensor([key(s, 0, p, int(Purpose.TARGET)) for s in seeds]) for p in positions]


@pytest.fixture(scope="module")
def keys():
    return target_keys((10, 11))


def draw(logits, keys):
    log_probs = torch.log_softmax(logits.double(), -1).float()
    return draw_target(log_probs.expand(len(keys), -1), keys)


def test_frequencies_equal_softmax(keys):
    observed = torch.bincount(draw(LOGITS, keys[0]), minlength=6)
    assert chi_square_p_value(observed, LOGITS.softmax(-1) * NUM_DRAWS) > FALSE_ALARM


def test_frequencies_are_not_those_of_a_slightly_warmer_softmax(keys):
    observed = torch.bincount(draw(LOGITS, keys[0]), minlength=6)
    assert chi_square_p_value(observed, (LOGITS / 1.1).softmax(-1) * NUM_DRAWS) < FALSE_ALARM


def pair_counts(first, second):
    return torch.bincount(first * 6 + second, minlength=36)


def test_pairs_of_consecutive_positions_are_independent(keys):
    probs = LOGITS.softmax(-1)
    observed = pair_counts(draw(LOGITS, keys[0]), draw(LOGITS, keys[1]))
    expected = torch.outer(probs, probs) * NUM_DRAWS
    assert chi_square_p_value(observed, expected) > FALSE_ALARM


def test_the_same_key_for_two_positions_is_caught(keys):
    probs = LOGITS.softmax(-1)
    observed = pair_counts(draw(LOGITS, keys[0]), draw(LOGITS, keys[0]))
    assert chi_square_p_value(observed, torch.outer(probs, probs) * NUM_DRAWS) < FALSE_ALARM


def test_the_pipelines_distribution_is_drawn_with_filters(keys):
    params = SamplingParams(temperature=0.7, top_p=0.9, min_p=0.05)
    params = process(LOGITS[None], [SamplingRow(params)])
    observed = torch.bincount(draw_target(params.expand(NUM_DRAWS, -1), keys[0]), minlength=6)
    assert chi_square_p_value(observed, params[0].exp() * NUM_DRAWS) > FALSE_ALARM


def test_the_k_largest_are_draws_without_replacement(keys):
    order = perturb(LOGITS.log_softmax(-1).expand(NUM_DRAWS, -1), keys[0]).topk(2).indices
    probs = LOGITS.double().softmax(-1)
    expected = torch.outer(probs, probs) / (1 - probs[:, None])
    expected.fill_diagonal_(0)
    assert chi_square_p_value(pair_counts(*order.T), expected * NUM_DRAWS) > FALSE_ALARM


@pytest.mark.parametrize("num_possible", [1, 2, 40, 300, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_and_full_look_up_draw_alike(num_possible, dtype):
    generator = torch.Generator().manual_seed(num_possible)
    log_probs = torch.full((5, 1000), NEG_INF, dtype=dtype)
    for row in range(5):
        at = torch.randperm(1000, generator=generator)[:num_possible]
        log_probs[row, at] = torch.randn(num_possible, generator=generator, dtype=dtype)
    (keys,) = target_keys((3,), range(5))
    expected = log_probs + noise.gumbel(keys, torch.arange(1000))
    assert torch.equal(perturb(log_probs, keys), expected)
    assert torch.equal(draw_target(log_probs, keys), expected.argmax(-1))


def test_a_row_draws_the_same_token_alone_and_in_any_batch():
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(24, 997, generator=generator).log_softmax(-1)
    log_probs[::3, 50:] = NEG_INF  # some sparse, some full, some one-hot
    log_probs[::4] = NEG_INF
    log_probs[::4, 5] = 0.0
    (keys,) = target_keys((3,), range(24))
    tokens = draw_target(log_probs, keys)
    for row in range(24):
        assert draw_target(log_probs[row : row + 1], keys[row : row + 1]) == tokens[row]
    shuffled = torch.randperm(24, generator=generator)
    assert torch.equal(draw_target(log_probs[shuffled], keys[shuffled]), tokens[shuffled])


def test_a_reduced_vocabulary_finds_the_winner_with_the_same_noise():
    log_probs = torch.randn(64, 500, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    (keys,) = target_keys((3,), range(64))
    reduced = torch.tensor([7, 3, 499, 250, 100, 20])
    restricted = torch.full_like(log_probs, NEG_INF)
    restricted[:, reduced] = log_probs[:, reduced]
    best = (log_probs[:, reduced] + noise.gumbel(keys, reduced)).argmax(-1)
    assert torch.equal(reduced[best], draw_target(restricted, keys))


def test_greedy_rows_ignore_the_noise():
    logits = torch.randn(8, 100, generator=torch.Generator().manual_seed(2))
    row = SamplingRow(SamplingParams(temperature=0.0))
    for seed in range(3):
        (keys,) = target_keys((seed,), range(8))
        tokens = draw_target(process(logits, [row] * 8), keys)
        assert torch.equal(tokens, logits.argmax(-1))


def test_a_logprob_that_rounds_to_zero_does_not_silence_the_others():
    log_probs = torch.full((NUM_DRAWS, 2), -8.0)
    log_probs[:, 0] = 0.0
    (keys,) = target_keys((1,))
    expected = torch.tensor([1.0, math.exp(-8)]).div(1 + math.exp(-8)) * NUM_DRAWS
    observed = torch.bincount(draw_target(log_probs, keys), minlength=2)
    assert chi_square_p_value(observed, expected) > FALSE_ALARM
    assert observed[1] > 0


def test_a_row_without_a_possible_token_draws_none():
    log_probs = torch.full((2, 10), NEG_INF)
    log_probs[1] = torch.zeros(10).log_softmax(-1)
    (keys,) = target_keys((1,), range(2))
    first, second = draw_target(log_probs, keys).tolist()
    assert first == NO_TOKEN
    assert 0 <= second < 10


def test_keys_may_be_a_list():
    log_probs = torch.zeros(2, 10).log_softmax(-1)
    keys = [key(1, 0, 5, 0), key(1, 0, 6, 0)]
    assert torch.equal(draw_target(log_probs, keys), draw_target(log_probs, key_tensor(keys)))
