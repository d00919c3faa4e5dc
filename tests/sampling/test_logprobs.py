"""Logprobs and ranks are those of the row, whatever the others are."""

import math

import pytest
import torch

from folospec.sampling import logprobs
from folospec.sampling.logprobs import gather_logprobs, log_softmax
from folospec.sampling.pipeline import SamplingRow, process
from folospec.sampling_params import SamplingParams


def logits_of(num_rows, vocab_size, dtype=torch.float32):
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randn(num_rows, vocab_size, generator=generator, dtype=dtype) * 3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-9)])
def test_log_softmax_is_right_and_keeps_the_type(dtype, tolerance):
    logits = logits_of(4, 1001, dtype)
    got = log_softmax(logits)
    assert got.dtype == dtype
    expected = logits.double().log_softmax(-1)
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


def test_the_chosen_token_comes_first_then_the_most_likely_in_order():
    entry = gather_logprobs(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), [2], 2)[0]
    assert list(entry) == [2, 1, 3]
    assert [item.rank for item in entry.values()] == [3, 1, 2]
    expected = torch.tensor([0.0, 3.0, 1.0, 2.0]).log_softmax(-1)
    assert [item.logprob for item in entry.values()] == pytest.approx(expected[[2, 1, 3]].tolist())


def test_a_chosen_token_among_the_most_likely_appears_once():
    assert list(gather_logprobs(torch.tensor([[0.0, 3.0, 1.0]]), [1], 2)[0]) == [1, 2]


def test_equal_logprobs_share_their_rank_and_the_lowest_ids_are_listed():
    entry = gather_logprobs(torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]]), [4], 3)[0]
    assert {token: item.rank for token, item in entry.items()} == {4: 3, 1: 1, 3: 1, 0: 3}


def test_the_number_of_most_likely_tokens_may_differ_by_row():
    logits = logits_of(4, 50)
    least = logits.argmin(-1).tolist()  # never among the most likely five
    entries = gather_logprobs(logits, least, [0, 1, 5, 100])
    assert [len(entry) for entry in entries] == [1, 2, 6, 50]


def test_a_row_alone_equals_the_row_in_a_batch_worked_off_in_pieces(monkeypatch):
    logits = logits_of(40, 333)
    token_ids = [(7 * i) % 333 for i in range(40)]
    together = gather_logprobs(logits, token_ids, 5)
    monkeypatch.setattr(logprobs, "_MAX_CELLS", 1000)
    assert gather_logprobs(logits, token_ids, 5) == together
    for i in range(40):
        assert gather_logprobs(logits[i : i + 1], token_ids[i : i + 1], 5) == together[i : i + 1]


def test_ranks_equal_a_slow_count():
    logits = logits_of(6, 200)
    rows = log_softmax(logits).tolist()
    for row, entry in zip(rows, gather_logprobs(logits, [5] * 6, 7), strict=True):
        for token_id, item in entry.items():
            assert item.logprob == row[token_id]
            assert item.rank == 1 + sum(other > row[token_id] for other in row)


def test_processed_logprobs_are_those_sampled_from():
    logits = logits_of(1, 30)
    log_probs = process(logits, [SamplingRow(SamplingParams(temperature=0.5, top_k=3))])
    chosen = int(log_probs.argmax())
    entry = gather_logprobs(log_probs, [chosen], 10, processed=True)[0]
    assert len(entry) == 3  # what cannot be drawn is not among the most likely
    assert sum(math.exp(item.logprob) for item in entry.values()) == pytest.approx(1.0)
    for token_id, item in entry.items():
        assert item.logprob == float(log_probs[0, token_id])


class Counted(float):
    """A number that counts how often it is compared."""

    num_comparisons = 0

    def _count(self) -> None:
        Counted.num_comparisons += 1

    def __gt__(self, other: float) -> bool:
        self._count()
        return float(self) > float(other)

    def __eq__(self, other: object) -> bool:
        self._count()
        return isinstance(other, float) and float(self) == float(other)

    __hash__ = float.__hash__


def test_the_ranks_of_the_whole_vocabulary_cost_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """`logprobs` may be as large as the vocabulary."""
    size = 3000
    ordered = [(token_id, Counted(-(token_id // 2))) for token_id in range(size)]
    monkeypatch.setattr(logprobs, "_most_likely", lambda log_probs, tops: [ordered])
    Counted.num_comparisons = 0
    [entry] = gather_logprobs(torch.zeros(1, size), [0], size)
    assert [entry[i].rank for i in range(1, 6)] == [1, 3, 3, 5, 5]
    assert len(entry) == size
    assert Counted.num_comparisons <= 2 * size
