"""Children of a draft node: which tokens, in which order, and whether the distributions are told
truly."""

from collections import Counter
from itertools import permutations, product
from math import prod

import pytest
import torch

from folospec.sampling import noise
from folospec.sampling.noise import Purpose
from folospec.sampling.sampler import draw_target, perturb
from folospec.spec.trees import children as children_module
from folospec.spec.trees.children import CHILDREN, ChildRequest, draw_children

DISTRIBUTION = (0.34, 0.27, 0.19, 0.13, 0.07)
VOCAB_SIZE = len(DISTRIBUTION)
NUM_DRAWS = 5000
FALSE_ALARM, VISIBLE = 1e-9, 1e-12  # a wrong distribution must be seen with a margin


def log_distribution(distribution=DISTRIBUTION, rows=1):
    return torch.tensor([distribution] * rows, dtype=torch.float64).log()


def keys_at(position, count=1):
    return [
        noise.key(11, 0, position, noise.purpose_code(Purpose.DRAFT, 0, draw << 10))
        for draw in range(count)
    ]


def sampled_places(count, num_places, temperature=1.0):
    return [
        ChildRequest(count, keys_at(position, count), temperature) for position in range(num_places)
    ]


def random_log_probs(num_rows, vocab_size=12, seed=5):
    torch.manual_seed(seed)
    return (2 * torch.randn(num_rows, vocab_size, dtype=torch.float64)).log_softmax(-1)


def p_value(outcomes, distribution):
    """The probability with which draws from `distribution` stray at least this far from it."""
    counts = Counter(outcomes)
    assert set(counts) <= set(distribution), "something impossible was drawn"
    cells = [
        (counts[outcome], prob * len(outcomes))
        for outcome, prob in distribution.items()
        if prob > 0
    ]
    assert min(expected for _, expected in cells) >= 5
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    halves = torch.tensor([len(cells) - 1, statistic], dtype=torch.float64) / 2
    return float(torch.special.gammaincc(*halves))


def conditional(distribution, earlier):
    left = [0.0 if token in earlier else prob for token, prob in enumerate(distribution)]
    return [prob / sum(left) for prob in left]


# Without replacement


def test_distributions_without_replacement_are_those_given_the_earlier_siblings():
    for drawn in draw_children(
        "without_replacement", log_distribution(rows=40), sampled_places(4, 40)
    ):
        assert drawn.draft_probs.shape == (4, VOCAB_SIZE)
        assert len(set(drawn.token_ids)) == 4
        for rank, distribution in enumerate(drawn.draft_probs.tolist()):
            earlier = drawn.token_ids[:rank]
            assert distribution == pytest.approx(conditional(DISTRIBUTION, earlier), rel=1e-14)
            assert all(distribution[token] == 0.0 for token in earlier)


def ordered_distribution(count, next_distribution):
    """The distribution of the children in their order, each drawn from `next_law(earlier)`."""
    return {
        tokens: prod(next_distribution(tokens[:rank])[token] for rank, token in enumerate(tokens))
        for tokens in product(range(VOCAB_SIZE), repeat=count)
    }


def outcomes(how, count):
    drawn = draw_children(how, log_distribution(rows=NUM_DRAWS), sampled_places(count, NUM_DRAWS))
    return [tuple(children.token_ids) for children in drawn]


def test_children_without_replacement_follow_the_distributions_they_report():
    distribution = ordered_distribution(2, lambda earlier: conditional(DISTRIBUTION, earlier))
    assert p_value(outcomes("without_replacement", 2), distribution) > FALSE_ALARM


def test_the_distribution_of_the_first_child_for_the_second_is_seen():
    """Control: the distribution reported for every child is that of the node."""
    drawn = outcomes("without_replacement", 2)
    wrong = Counter(tokens[1] for tokens in drawn)
    assert p_value(list(wrong.elements()), dict(enumerate(DISTRIBUTION))) < VISIBLE


def test_children_in_another_order_are_seen():
    """Control: the same tokens, the likeliest first."""
    distribution = ordered_distribution(2, lambda earlier: conditional(DISTRIBUTION, earlier))
    drawn = [tuple(sorted(tokens)) for tokens in outcomes("without_replacement", 2)]
    assert p_value(drawn, distribution) < VISIBLE


def test_a_set_without_replacement_ends_with_the_tokens_there_are():
    distribution = [0.5, 0.0, 0.3, 0.0, 0.2]
    [drawn] = draw_children(
        "without_replacement", log_distribution(distribution), sampled_places(5, 1)
    )
    assert sorted(drawn.token_ids) == [0, 2, 4]
    assert len(drawn.confidence) == len(drawn.draft_probs) == 3
    assert drawn.draft_probs[-1].tolist() == conditional(distribution, drawn.token_ids[:2])


def test_what_rounding_leaves_of_a_distribution_is_no_child():
    distribution = torch.tensor([[1.0, 1e-12, 1e-13]]).log()
    assert distribution.dtype == torch.float32
    [drawn] = draw_children("without_replacement", distribution, sampled_places(3, 1))
    assert drawn.token_ids == [0]
    assert drawn.draft_probs.tolist() == [[1.0, pytest.approx(1e-12), pytest.approx(1e-13)]]


# I.i.d.


def test_independent_children_follow_the_distribution_of_the_node_and_repeat():
    drawn = outcomes("iid", 2)
    assert p_value(drawn, ordered_distribution(2, lambda earlier: DISTRIBUTION)) > FALSE_ALARM
    assert any(first == second for first, second in drawn)


def test_independent_children_with_one_key_for_all_are_seen(monkeypatch):
    """Control: every draw takes the first key, so that siblings are always the same."""

    def with_one_key(log_probs, keys):
        return perturb(log_probs, [keys[0]] * len(keys))

    monkeypatch.setattr(children_module, "perturb", with_one_key)
    drawn = outcomes("iid", 2)
    assert p_value(drawn, ordered_distribution(2, lambda earlier: DISTRIBUTION)) < VISIBLE


def test_equal_independent_children_stay_separate_trials_of_one_distribution():
    [drawn] = draw_children("iid", log_distribution((0.98, 0.02)), sampled_places(4, 1))
    assert drawn.token_ids == [0, 0, 0, 0]
    assert drawn.draft_probs.tolist() == [pytest.approx([0.98, 0.02])] * 4
    assert drawn.confidence == pytest.approx([0.98] * 4)


# Coupled


def test_coupled_children_are_the_best_of_the_distribution_with_the_targets_noise():
    log_probs = random_log_probs(30)
    keys = [noise.key(3, 0, position, Purpose.TARGET) for position in range(30)]
    drawn = draw_children("coupled", log_probs, [ChildRequest(4, [key], 0.7) for key in keys])
    gumbels = noise.gumbel(noise.key_tensor(keys), torch.arange(12))
    for children, row, gumbel in zip(drawn, log_probs, gumbels, strict=True):
        ranked = (row + gumbel).argsort(descending=True)
        assert children.token_ids == ranked[:4].tolist()
        assert children.draft_probs is None
    targets = draw_target(log_probs, keys).tolist()
    assert [children.token_ids[0] for children in drawn] == targets
    likeliest = log_probs.argmax(-1).tolist()
    assert targets != likeliest, "the noise decided nothing"


def test_coupled_children_with_noise_of_their_own_are_seen():
    """Control: they miss the target's token although the distributions are the same."""
    log_probs = random_log_probs(30)
    keys = [noise.key(3, 0, position, Purpose.TARGET) for position in range(30)]
    drawn = draw_children("coupled", log_probs, sampled_places(1, 30))
    missed = [
        children.token_ids != [token]
        for children, token in zip(drawn, draw_target(log_probs, keys).tolist(), strict=True)
    ]
    assert sum(missed) > 10


# All ways


@pytest.mark.parametrize("how", CHILDREN)
def test_greedy_children_are_the_likeliest_tokens_whatever_the_way(how):
    log_probs = random_log_probs(6)
    for children, row in zip(
        draw_children(how, log_probs, [ChildRequest(3, (), 0.0)] * 6), log_probs, strict=True
    ):
        assert children.token_ids == row.argsort(descending=True)[:3].tolist()
        assert children.draft_probs is None
        assert children.confidence == sorted(children.confidence, reverse=True)


def test_top_k_children_look_at_no_noise():
    log_probs = random_log_probs(6)
    drawn = draw_children("top_k", log_probs, sampled_places(3, 6))
    for children, row in zip(drawn, log_probs, strict=True):
        assert children.token_ids == row.argsort(descending=True)[:3].tolist()
        assert children.draft_probs is None


@pytest.mark.parametrize("how", CHILDREN)
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.5])
def test_impossible_tokens_are_never_children(how, temperature):
    log_probs = random_log_probs(3)
    log_probs[0, 2:] = -torch.inf
    log_probs[1] = -torch.inf
    log_probs[:1] = log_probs[:1].log_softmax(-1)
    some, none, all_three = draw_children(how, log_probs, sampled_places(3, 3, temperature))
    assert none.token_ids == none.confidence == []
    assert none.draft_probs is None
    assert len(all_three.token_ids) == 3
    assert set(some.token_ids) <= {0, 1}
    assert len(some.token_ids) == (3 if how == "iid" and temperature > 0 else 2)


@pytest.mark.parametrize("how", CHILDREN)
def test_a_place_gets_as_many_children_as_it_asks_for(how):
    places = [
        ChildRequest(count, keys_at(count, count), temperature)
        for count, temperature in product((1, 2, 5), (0.0, 1.0))
    ]
    drawn = draw_children(how, random_log_probs(len(places)), places)
    assert [len(children.token_ids) for children in drawn] == [place.count for place in places]


@pytest.mark.parametrize("how", CHILDREN)
def test_more_children_than_tokens_are_all_tokens(how):
    [drawn] = draw_children(how, log_distribution(), [ChildRequest(9, keys_at(0, 9), 1.0)])
    if how == "iid":
        assert len(drawn.token_ids) == 9
    else:
        assert sorted(drawn.token_ids) == list(range(VOCAB_SIZE))


@pytest.mark.parametrize("how", CHILDREN)
def test_a_place_gets_the_same_children_alone_and_in_company(how):
    temperatures = (0.0, 1.0, 0.6, 0.0, 1.3)
    log_probs = random_log_probs(5)
    log_probs[2, 4:] = -torch.inf
    places = [
        ChildRequest(1 + index % 3, keys_at(index, 1 + index % 3), temperature)
        for index, temperature in enumerate(temperatures)
    ]
    together = draw_children(how, log_probs, places, sharpness=1.7)
    for index, (place, both) in enumerate(zip(places, together, strict=True)):
        [alone] = draw_children(how, log_probs[index : index + 1], [place], sharpness=1.7)
        assert both.token_ids == alone.token_ids
        assert both.confidence == pytest.approx(alone.confidence, rel=1e-12)
        assert (both.draft_probs is None) == (alone.draft_probs is None)
        if both.draft_probs is not None:
            assert torch.equal(both.draft_probs, alone.draft_probs)


@pytest.mark.parametrize("how", [how for how in CHILDREN if how != "iid"])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
def test_the_confidences_of_siblings_add_up_to_at_most_one(how, temperature):
    for sharpness in (0.3, 1.0, 4.0):
        places = sampled_places(12, 20, temperature)
        for children in draw_children(how, random_log_probs(20), places, sharpness):
            assert all(0.0 <= chance <= 1.0 for chance in children.confidence)
            assert sum(children.confidence) <= 1.0 + 1e-9


def test_a_greater_sharpness_is_a_surer_first_child():
    place = ChildRequest(3, keys_at(4), 0.8)
    first = [
        draw_children("coupled", random_log_probs(1), [place], sharpness)[0].confidence[0]
        for sharpness in (0.5, 1.0, 2.0, 8.0)
    ]
    assert first == sorted(first)
    assert first[0] < first[-1]


def test_the_enumerated_distribution_without_replacement_is_a_distribution():
    distribution = ordered_distribution(2, lambda earlier: conditional(DISTRIBUTION, earlier))
    assert sum(distribution.values()) == pytest.approx(1.0)
    assert {tokens for tokens, prob in distribution.items() if prob > 0} == set(
        permutations(range(VOCAB_SIZE), 2)
    )
