"""The pipeline equals a slow model of itself, and a row never feels its neighbours."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from slow_pipeline import NearTie, slow_distribution

from folospec.sampling.pipeline import NoTokenError, SamplingRow, process
from folospec.sampling_params import SamplingParams

VOCAB_SIZE = 9
TOKENS = st.integers(0, VOCAB_SIZE - 1)
HISTORIES = st.lists(TOKENS, max_size=6)


def sometimes(strategy, otherwise):
    return st.one_of(st.just(otherwise), strategy)


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 0.8, 1.0, 2.5]),
    top_k=sometimes(st.integers(1, VOCAB_SIZE + 2), -1),
    top_p=sometimes(st.floats(0.01, 0.999), 1.0),
    min_p=sometimes(st.floats(0.001, 1.0), 0.0),
    repetition_penalty=sometimes(st.floats(0.5, 2.0), 1.0),
    presence_penalty=sometimes(st.floats(-2.0, 2.0), 0.0),
    frequency_penalty=sometimes(st.floats(-2.0, 2.0), 0.0),
    logit_bias=sometimes(st.dictionaries(TOKENS, st.floats(-5, 5), max_size=3), None),
    allowed_token_ids=sometimes(st.lists(TOKENS, min_size=1), None),
    min_tokens=st.integers(0, 6),
)
ROWS = st.builds(
    SamplingRow,
    params=PARAMS,
    prompt_token_ids=HISTORIES,
    output_token_ids=HISTORIES,
    draft_token_ids=st.lists(TOKENS, max_size=3),
    bad_words_token_ids=st.lists(st.lists(TOKENS, min_size=1, max_size=3), max_size=3),
    stop_ids=st.lists(TOKENS, max_size=2).map(frozenset),
)
# A coarse grid makes equal logits common.
LOGIT = st.one_of(st.sampled_from([i / 2 for i in range(-6, 7)]), st.floats(-8, 8))
LOGITS = st.tuples(*[LOGIT] * VOCAB_SIZE)


# Its rows are of float64, which only torch takes.
@pytest.mark.parametrize("kernels", ["torch"], indirect=True)
@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(st.tuples(LOGITS, ROWS), min_size=1, max_size=4))
def test_every_row_of_a_batch_equals_the_slow_model(batch):
    logits = torch.tensor([values for values, _ in batch], dtype=torch.float64)
    rows = [row for _, row in batch]
    try:
        log_probs = process(logits, rows)
    except NoTokenError:
        assume(False)
    for index, (values, row) in enumerate(batch):
        got = log_probs[index].tolist()
        if max(got) == -math.inf:
            continue  # a draft after which nothing can follow; test_pipeline_stages looks at those
        try:
            expected = slow_distribution(values, row)
        except NearTie:
            continue
        assert [g > -math.inf for g in got] == [e > 0 for e in expected]
        assert [math.exp(g) for g in got] == pytest.approx(expected, abs=1e-9)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(LOGITS, ROWS), min_size=2, max_size=6), st.randoms())
def test_every_row_alone_equals_the_row_in_a_shuffled_batch(batch, random):
    logits = torch.tensor([values for values, _ in batch], dtype=torch.float32)
    rows = [row for _, row in batch]
    try:
        alone = [process(logits[i : i + 1], rows[i : i + 1])[0] for i in range(len(rows))]
    except NoTokenError:
        assume(False)
    order = random.sample(range(len(rows)), len(rows))
    together = process(logits[order], [rows[i] for i in order])
    for index, row in enumerate(order):
        assert torch.equal(together[index], alone[row])


MIXED = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 20},
    {"temperature": 1.0, "min_p": 0.02},
    {"temperature": 0.9, "top_k": 50, "top_p": 0.8, "min_p": 0.01},
    {"temperature": 0.8, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    {"temperature": 0.0, "repetition_penalty": 1.2, "presence_penalty": 0.3},
    {"temperature": 1.0, "logit_bias": {0: 3.0}},
    {"temperature": 1.0, "logits_processors": [lambda ids, row: row * 0.5]},
]


def differing_rows(function, logits, rows):
    """Rows whose bits change between a call of their own and one with all the others."""
    together = function(logits, rows)
    return [
        i
        for i in range(len(rows))
        if not torch.equal(function(logits[i : i + 1], rows[i : i + 1])[0], together[i])
    ]


def mixed_batch(vocab_size, dtype):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(2 * len(MIXED), vocab_size, generator=generator, dtype=dtype) * 4
    rows = [
        SamplingRow(SamplingParams(**MIXED[i % len(MIXED)]), [0], [i % vocab_size] * 2)
        for i in range(len(logits))
    ]
    return logits, rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab_size", [1, 3, 17, 1000, 4099])
def test_no_row_of_a_large_mixed_batch_depends_on_another(vocab_size, dtype):
    assert differing_rows(process, *mixed_batch(vocab_size, dtype)) == []


def test_a_pipeline_that_shares_one_number_between_rows_is_caught():
    def shifted_by_the_batch(logits, rows):
        return (logits - logits.max()).log_softmax(-1)

    assert differing_rows(shifted_by_the_batch, *mixed_batch(1000, torch.float32))


def test_threads_do_not_change_a_bit():
    logits, rows = mixed_batch(4099, torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = process(logits, rows)
        torch.set_num_threads(3)
        three = process(logits, rows)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, three)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-8)])
@pytest.mark.parametrize("vocab_size", [2, 4096, 150_000])
def test_rows_are_normalised(dtype, tolerance, vocab_size):
    logits = torch.randn(3, vocab_size, dtype=dtype, generator=torch.Generator().manual_seed(0))
    params = ({"temperature": 1.0}, {"temperature": 0.5, "top_p": 0.7}, {"top_k": 40})
    log_probs = process(logits, [SamplingRow(SamplingParams(**p)) for p in params])
    assert log_probs.double().exp().sum(-1).tolist() == pytest.approx([1.0] * 3, abs=tolerance)
    assert log_probs.dtype == dtype


def test_unfiltered_rows_are_log_softmax():
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(1)) * 5
    log_probs = process(logits, [SamplingRow(SamplingParams())] * 4)
    expected = logits.double().log_softmax(-1)
    torch.testing.assert_close(log_probs.double(), expected, atol=1e-6, rtol=1e-6)
