"""What each stage does, in which order, and what happens when nothing is left."""

import math

import pytest
import torch

from folospec.sampling.constraints import TokenCounts, check_token_ids
from folospec.sampling.pipeline import NoTokenError, SamplingRow, process
from folospec.sampling_params import SamplingParams

NEG_INF = float("-inf")


def distribution(logits, prompt=(), output=(), drafts=(), bad_words=(), stop_ids=(), **options):
    row = SamplingRow(
        SamplingParams(**options), prompt, output, drafts, bad_words, frozenset(stop_ids)
    )
    return process(torch.tensor([logits]), [row])[0].exp().tolist()


def kept(*args, **options):
    return [token for token, prob in enumerate(distribution(*args, **options)) if prob > 0]


def log_ratio(*args, **options):
    """How far token 0 lies above token 1, in nats."""
    first, second, *_ = distribution(*args, **options)
    return math.log(first / second)


# -- the order ----------------------------------------------------------------------------------


def test_bias_comes_before_penalties():
    bias = {0: 1.0}
    ratio = log_ratio([1.0, 0.0], output=[0], logit_bias=bias, repetition_penalty=2.0)
    assert ratio == pytest.approx((1 + 1) / 2)  # 1 / 2 + 1 the other way round


def test_repetition_comes_before_the_other_penalties():
    options = {"repetition_penalty": 2.0, "frequency_penalty": 0.5, "presence_penalty": 0.25}
    assert log_ratio([4.0, 0.0], output=[0, 0], **options) == pytest.approx(4 / 2 - 2 * 0.5 - 0.25)


def test_processors_see_masks_bias_and_penalties_but_no_temperature():
    seen = []

    def processor(output_token_ids, logits):
        seen.append(logits.tolist())
        return logits

    options = {
        "logit_bias": {0: 1.0},
        "frequency_penalty": 0.5,
        "allowed_token_ids": [0, 1, 2],
        "temperature": 0.1,
        "top_k": 1,
        "logits_processors": [processor],
        "min_tokens": 5,
    }
    distribution([1.0, 1.0, 1.0, 1.0], output=[1], stop_ids=[2], **options)
    assert seen == [[2.0, 0.5, NEG_INF, NEG_INF]]


def test_temperature_comes_after_processors():
    halve = [lambda ids, row: row / 2]
    assert log_ratio([4.0, 0.0], temperature=0.5, logits_processors=halve) == pytest.approx(4.0)


def test_processors_run_in_the_order_given():
    double, increment = (lambda ids, row: row * 2), (lambda ids, row: row + torch.eye(2)[0])
    assert log_ratio([1.0, 0.0], logits_processors=[double, increment]) == pytest.approx(3.0)
    assert log_ratio([1.0, 0.0], logits_processors=[increment, double]) == pytest.approx(4.0)


LOG_PROBS = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]


def test_top_p_verifies_probabilities_after_temperature():
    assert kept(LOG_PROBS, top_p=0.6) == [0, 1]
    assert kept(LOG_PROBS, top_p=0.6, temperature=5.0) == [0, 1, 2]


def test_top_p_verifies_what_top_k_left():
    assert kept(LOG_PROBS, top_k=2, top_p=0.5) == [0]  # 0.4 / 0.7 alone reaches one half


def test_min_p_comes_after_top_p():
    log_probs = [math.log(p) for p in (0.5, 0.3, 0.2)]
    # With min_p first, 0.5 / 0.8 alone would reach 0.6.
    assert kept(log_probs, top_p=0.6, min_p=0.5) == [0, 1]


# -- the stages ---------------------------------------------------------------------------------


def test_everything_but_the_allowed_ids_is_impossible():
    assert kept([5.0, 1.0, 0.0, -3.0], allowed_token_ids=[3, 1]) == [1, 3]


def test_allowed_ids_bind_greedy_rows():
    assert kept([5.0, 1.0, 0.0, -3.0], allowed_token_ids=[3, 1], temperature=0.0) == [1]


@pytest.mark.parametrize(
    ("output", "drafts", "banned"),
    [
        ([], [], False),  # too short to hold the word's head
        ([1], [], False),
        ([1, 2], [], True),
        ([0, 1, 2], [], True),
        ([1, 2, 0], [], False),  # the head has passed
        ([1], [2], True),  # the head runs over the root
        ([1, 2], [1], False),
        ([], [1, 2], True),
        ([2, 2], [], False),
    ],
)
def test_a_bad_word_of_three_tokens_is_banned_at_its_last_one(output, drafts, banned):
    left = kept([0.0] * 4, output=output, drafts=drafts, bad_words=[[1, 2, 3]])
    assert left == ([0, 1, 2] if banned else [0, 1, 2, 3])


def test_a_bad_word_of_one_token_is_always_banned():
    assert kept([0.0] * 3, bad_words=[[1]]) == [0, 2]


def test_the_prompt_does_not_start_a_bad_word():
    assert kept([0.0] * 3, prompt=[1], bad_words=[[1, 2]]) == [0, 1, 2]


@pytest.mark.parametrize(("num_output", "num_drafts"), [(0, 0), (2, 0), (1, 1), (3, 0), (2, 1)])
def test_min_tokens_bans_stops_until_there_are_enough(num_output, num_drafts):
    left = kept(
        [0.0] * 4, output=[0] * num_output, drafts=[0] * num_drafts, stop_ids=[1, 3], min_tokens=3
    )
    assert left == ([0, 2] if num_output + num_drafts < 3 else [0, 1, 2, 3])


def test_bias_is_added():
    assert log_ratio([1.0, 0.5], logit_bias={0: -2.0, 1: 0.25}) == pytest.approx(-1.75)


def test_bias_does_not_bring_back_what_is_excluded():
    assert kept([0.0] * 3, allowed_token_ids=[0], logit_bias={1: 100.0}) == [0]


@pytest.mark.parametrize(("logit", "expected"), [(2.0, 1.0), (-2.0, -4.0), (0.0, 0.0)])
def test_repetition_divides_positive_and_multiplies_negative_logits(logit, expected):
    for where in ({"prompt": [0]}, {"output": [0, 0]}, {"drafts": [0]}):
        ratio = log_ratio([logit, 0.0], repetition_penalty=2.0, **where)
        assert ratio == pytest.approx(expected)


def test_presence_and_frequency_count_the_output_alone():
    options = {"presence_penalty": 0.5, "frequency_penalty": 0.25}
    assert log_ratio([0.0, 0.0], prompt=[0, 0], **options) == pytest.approx(0.0)
    ratio = log_ratio([0.0, 0.0], output=[0, 0], drafts=[0], **options)
    assert ratio == pytest.approx(-0.5 - 3 * 0.25)


def test_every_node_is_penalised_for_its_own_path():
    params = SamplingParams(frequency_penalty=1.0)
    output = [0]
    paths = [(), (1,), (1, 1), (2,), (2, 0)]
    rows = [SamplingRow(params, (), output, path) for path in paths]
    log_probs = process(torch.zeros(len(rows), 3), rows)
    counts = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 2, 0], [1, 0, 1], [2, 0, 1]])
    torch.testing.assert_close(log_probs, (-counts.float()).log_softmax(-1))
    assert output == [0]


def test_a_path_in_the_output_or_in_the_drafts_is_the_same_history():
    params = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.2, min_tokens=3)
    logits = torch.randn(1, 6, generator=torch.Generator().manual_seed(0))
    split = SamplingRow(params, [5], [1, 2], [2, 3], [[3, 4]], frozenset({0}))
    whole = SamplingRow(params, [5], [1, 2, 2, 3], (), [[3, 4]], frozenset({0}))
    assert torch.equal(process(logits, [split]), process(logits, [whole]))


def test_processors_are_called_once_per_node_with_its_own_history():
    seen = []

    def processor(output_token_ids, logits):
        seen.append(list(output_token_ids))
        output_token_ids.append(99)  # the list is the processor's own
        return logits

    params = SamplingParams(logits_processors=[processor])
    output = [4, 5]
    paths = [(), (6,), (7,), (7, 8)]
    process(torch.zeros(4, 10), [SamplingRow(params, [1], output, path) for path in paths])
    assert seen == [[4, 5], [4, 5, 6], [4, 5, 7], [4, 5, 7, 8]]
    assert output == [4, 5]


def test_a_processor_touches_its_own_row_alone_and_never_the_models_logits():
    def wipe(output_token_ids, logits):
        logits.fill_(0.0)
        return logits

    logits = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    before = logits.clone()
    rows = [SamplingRow(SamplingParams(logits_processors=[wipe])), SamplingRow(SamplingParams())]
    log_probs = process(logits, rows)
    assert torch.equal(logits, before)
    torch.testing.assert_close(log_probs[0], torch.zeros(2).log_softmax(-1))
    torch.testing.assert_close(log_probs[1], logits[1].log_softmax(-1))


def test_greedy_takes_the_lowest_of_equal_ids():
    assert distribution([1.0, 3.0, 3.0], temperature=0.0) == [0.0, 1.0, 0.0]


def test_top_k_keeps_the_lowest_ids_of_equals():
    assert kept([1.0, 2.0, 1.0, 1.0, 2.0], top_k=3) == [0, 1, 4]
    assert kept([1.0, 1.0, 1.0, 1.0], top_k=2) == [0, 1]


@pytest.mark.parametrize("top_k", [-1, 0, 4, 1000])
def test_top_k_without_effect(top_k):
    assert kept(LOG_PROBS, top_k=top_k) == [0, 1, 2, 3]


def test_top_p_keeps_the_token_that_crosses_the_threshold():
    assert kept(LOG_PROBS, top_p=0.41) == [0, 1]
    assert kept(LOG_PROBS, top_p=0.39) == [0]
    assert kept(LOG_PROBS, top_p=1e-9) == [0]


def test_top_p_that_is_met_exactly_keeps_no_more():
    assert kept([0.0] * 4, top_p=0.5) == [0, 1]


def test_min_p_keeps_what_equals_the_bound():
    assert kept([1.0, 0.0, 1.0, 0.5], min_p=1.0) == [0, 2]
    assert kept(LOG_PROBS, min_p=0.45) == [0, 1, 2]


def test_one_possible_token_survives_every_filter():
    options = {"top_k": 3, "top_p": 0.01, "min_p": 1.0, "temperature": 0.3}
    assert distribution([9.0, 1.0, 2.0], allowed_token_ids=[1], **options) == [0.0, 1.0, 0.0]


def test_filters_never_bring_back_what_is_excluded():
    assert kept([0.0] * 6, allowed_token_ids=[4, 2], top_k=5, top_p=0.999) == [2, 4]


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e-6])
def test_a_tiny_temperature_is_greedy_and_finite(temperature):
    assert distribution([1.0, 3.0, 2.0], temperature=temperature) == [0.0, 1.0, 0.0]
    assert kept([1.0, 3.0, 3.0], temperature=temperature, top_p=0.9) == [1, 2]


def test_a_huge_temperature_is_uniform():
    assert distribution([1.0, 30.0], temperature=1e300) == pytest.approx([0.5, 0.5])


# -- nothing left, bad input --------------------------------------------------------------------


def mask_all(output_token_ids, logits):
    return torch.full_like(logits, NEG_INF)


def raise_error(output_token_ids, logits):
    raise KeyError("no such state")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_processor_that_masks_everything_is_an_error_that_names_it(temperature, top_p):
    params = SamplingParams(temperature=temperature, top_p=top_p, logits_processors=[mask_all])
    rows = [SamplingRow(SamplingParams()), SamplingRow(params)]
    with pytest.raises(ValueError, match="logits_processors") as caught:
        process(torch.zeros(2, 4), rows)
    assert isinstance(caught.value, NoTokenError)
    assert caught.value.row == 1


def test_a_processor_that_raises_is_named_and_its_error_kept():
    row = SamplingRow(SamplingParams(logits_processors=[mask_all, raise_error]))
    with pytest.raises(NoTokenError, match=r"logits_processors\[1\].*no such state") as caught:
        process(torch.zeros(1, 4), [row])
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("result", [None, torch.zeros(3), 1.0])
def test_a_processor_must_return_a_row(result):
    row = SamplingRow(SamplingParams(logits_processors=[lambda ids, z: result]))
    with pytest.raises(NoTokenError, match="must return a row of 4 logits"):
        process(torch.zeros(1, 4), [row])


@pytest.mark.parametrize("processor", [mask_all, raise_error, lambda ids, z: None])
def test_a_draft_that_nothing_can_follow_is_no_error_and_harms_no_other_row(processor):
    """Plain decoding never visits a rejected draft, so what happens there must not be seen."""

    def after_drafts(output_token_ids, logits):
        return processor(output_token_ids, logits) if output_token_ids[-1:] == [3] else logits

    for options in ({"temperature": 0.0}, {}, {"top_p": 0.5}):
        params = SamplingParams(logits_processors=[after_drafts], **options)
        rows = [SamplingRow(params, (), [1], path) for path in ((), (3,), (2,))]
        logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
        log_probs = process(logits, rows)
        assert (log_probs[1] == NEG_INF).all()
        for index in (0, 2):
            alone = process(logits[index : index + 1], [rows[index]])
            assert torch.equal(log_probs[index], alone[0])


def test_options_that_exclude_each_other_are_named():
    with pytest.raises(NoTokenError, match="allowed_token_ids, min_tokens"):
        distribution([0.0] * 3, allowed_token_ids=[1], min_tokens=2, stop_ids=[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(value, temperature):
    with pytest.raises(NoTokenError, match="must not be NaN or"):
        distribution([0.0, value], temperature=temperature)


def test_other_types_and_row_counts_are_refused():
    row = SamplingRow(SamplingParams())
    with pytest.raises(ValueError, match="bfloat16"):
        process(torch.zeros(1, 4, dtype=torch.bfloat16), [row])
    with pytest.raises(ValueError, match="2 rows"):
        process(torch.zeros(1, 4), [row, row])


@pytest.mark.parametrize(
    "options",
    [{"allowed_token_ids": [0, 4]}, {"logit_bias": {-1: 1.0}}, {"stop_token_ids": [9]}],
)
def test_token_ids_outside_the_vocabulary_are_refused_by_name(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        check_token_ids(SamplingParams(**options), 4)
    check_token_ids(SamplingParams(**options | {name: None if name != "stop_token_ids" else ()}), 4)


def test_no_rows_are_fine():
    assert process(torch.zeros(0, 5), []).shape == (0, 5)


# -- what a step costs after many tokens ----------------------------------------------------------


class Watched(list):
    """Token ids that count how many of them are read."""

    num_read = 0

    def __iter__(self):
        self.num_read += len(self)
        return super().__iter__()

    def __getitem__(self, key):
        found = super().__getitem__(key)
        self.num_read += len(found) if isinstance(key, slice) else 1
        return found


def run_steps(params, num_steps, **options):
    """Compare rows with kept counts to rows without; return how many tokens of the prompt and of
    the output the former read."""
    prompt, output = Watched([1, 2, 2]), Watched()
    counts = {"prompt_counts": TokenCounts(), "output_counts": TokenCounts()}
    logits = torch.linspace(-1, 1, 5)[None]
    for step in range(num_steps):
        row = SamplingRow(params, prompt, output, **counts, **options)
        anew = SamplingRow(params, list(prompt), list(output), **options)
        assert torch.equal(process(logits, [row]), process(logits, [anew]))
        output.append(step * 3 % 5)
    return prompt.num_read - 3 * num_steps, output.num_read - sum(range(num_steps))


def test_penalties_read_each_token_once():
    penalties = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.2, presence_penalty=0.1)
    assert run_steps(penalties, 60) == (3, 59)


def test_bad_words_look_at_the_last_tokens_alone():
    num_read = run_steps(SamplingParams(), 60, bad_words_token_ids=[[3, 1, 4], [2]])[1]
    assert num_read <= 2 * 60


def test_counts_with_drafts_leave_the_kept_counts_alone():
    params, counts = SamplingParams(frequency_penalty=1.0), TokenCounts()
    logits = torch.zeros(1, 4)
    drafted = SamplingRow(params, (), [1], [1, 2], output_counts=counts)
    assert process(logits, [drafted])[0].argmin() == 1
    plain = SamplingRow(params, (), [1, 2], output_counts=counts)
    expected = process(logits, [SamplingRow(params, (), [1, 2])])
    assert torch.equal(process(logits, [plain]), expected)
