import math

import pytest
import torch
from torch import Tensor

from folospec.attention.merge import merge

ROWS, HEADS, KEYS, SIZE = 5, 3, 11, 4


def part(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over some keys; zeros, and -inf, without any."""
    weights = scores.softmax(-1)
    return torch.einsum("rhk,kd->rhd", weights, values), scores.logsumexp(-1)


def case(spread: float = 1.0) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(0)
    scores = spread * torch.randn(ROWS, HEADS, KEYS, generator=noise, dtype=torch.float64)
    return scores, torch.randn(KEYS, SIZE, generator=noise, dtype=torch.float64)


@pytest.mark.parametrize("cut", range(KEYS + 1))
@pytest.mark.parametrize("spread", [0.1, 1.0, 200.0])
def test_two_parts_are_the_whole_wherever_it_is_cut(cut, spread):
    scores, values = case(spread)
    whole, _ = part(scores, values)
    parts = (part(scores[..., :cut], values[:cut]), part(scores[..., cut:], values[cut:]))
    (out_a, lse_a), (out_b, lse_b) = parts
    torch.testing.assert_close(
        merge(out_a, lse_a, out_b, lse_b).double(), whole, atol=1e-5, rtol=1e-5
    )


def test_a_part_without_keys_counts_for_nothing_whatever_it_holds():
    scores, values = case()
    out, lse = part(scores, values)
    other, nothing = torch.full_like(out, 1e4), torch.full_like(lse, -math.inf)
    assert torch.equal(merge(out, lse, other, nothing), out.float())
    assert torch.equal(merge(other, nothing, out, lse), out.float())


def test_rows_are_weighed_by_themselves():
    scores, values = case()
    (out_a, lse_a), (out_b, lse_b) = part(scores[..., :4], values[:4]), part(scores, values)
    lse_a[2] = -math.inf
    lse_b[3] = -math.inf
    merged = merge(out_a, lse_a, out_b, lse_b)
    assert torch.equal(merged[2], out_b[2].float())
    assert torch.equal(merged[3], out_a[3].float())
    assert not torch.equal(merged[1], out_a[1].float())


def test_huge_scores_do_not_overflow():
    ones = torch.ones(1, 1, 2)
    lse = torch.full((1, 1), 3e38)
    assert torch.equal(merge(ones, lse, 3 * ones, lse), 2 * ones)
    assert torch.equal(merge(ones, lse, 3 * ones, -lse), ones)


def test_halves_come_out_as_float32():
    ones, lse = torch.ones(1, 1, 2), torch.zeros(1, 1)
    merged = merge(ones.half(), lse.double(), 2 * ones.bfloat16(), lse)
    assert merged.dtype == torch.float32
    assert torch.equal(merged, 1.5 * ones)
