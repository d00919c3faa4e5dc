"""The measure by which kernels are verified sees a single bad row, and no more than there is."""

import math

import pytest
import torch
from gpu_case import Canvas, relative_error


def test_one_bad_row_among_many_counts_in_full():
    wanted = torch.ones(1000, 4)
    got = wanted.clone()
    got[700] *= 1.5
    assert relative_error(got, wanted) == pytest.approx(0.5)
    assert relative_error(wanted, wanted) == 0.0


def test_a_row_of_next_to_nothing_is_measured_by_the_others():
    wanted = torch.cat([torch.ones(99, 4), torch.full((1, 4), 1e-9)])
    got = wanted.clone()
    got[99] = 2e-9
    assert relative_error(got, wanted) < 1e-8
    got[99] = 0.5
    assert relative_error(got, wanted) > 0.4


def test_infinities_are_themselves_and_nothing_else():
    wanted = torch.tensor([[1.0, -math.inf], [2.0, 3.0]])
    assert relative_error(wanted.clone(), wanted) == 0.0
    for other in (math.inf, 0.0, math.nan):
        got = wanted.clone()
        got[0, 1] = other
        assert relative_error(got, wanted) == math.inf
    assert relative_error(torch.zeros(0, 3), torch.zeros(0, 3)) == 0.0


def test_a_write_beside_an_output_is_seen():
    canvas = Canvas((3, 2), torch.float32, "cpu")
    canvas.tensor.zero_()
    canvas.check()
    canvas._all[-1] = 0.0
    with pytest.raises(AssertionError, match="outside"):
        canvas.check()
