"""Arrays go to fixed places in one copy; what a step leaves free is padding."""

import numpy as np
import pytest
import torch

from folospec.worker.cuda.step_buffers import Result, StepBuffers

FIELDS = {
    "ids": (torch.int64, (5,)),
    "tiles": (torch.int32, (3,)),
    "scales": (torch.float64, (2,)),
    "table": (torch.int32, (3, 4)),
}


@pytest.fixture
def buffers():
    return StepBuffers(FIELDS, torch.device("cpu"), {"tiles": -1})


def step(num):
    return {
        "ids": np.arange(num),
        "tiles": np.arange(num, dtype=np.int32),
        "table": np.arange(2 * num, dtype=np.int32).reshape(num, 2) + 7,
    }


def test_arrays_arrive_whole_and_the_rest_is_padding(buffers):
    buffers.fill(step(2))
    assert buffers.device["ids"][:2].tolist() == [0, 1]
    assert buffers.device["tiles"].tolist() == [0, 1, -1]
    assert buffers.device["table"][:2, :2].tolist() == [[7, 8], [9, 10]]


def test_padding_of_a_smaller_step_covers_what_a_larger_one_left(buffers):
    buffers.fill(step(3))
    buffers.fill(step(1))
    assert buffers.device["tiles"].tolist() == [0, -1, -1]


def test_before_the_first_step_all_is_padding(buffers):
    assert buffers.device["tiles"].tolist() == [-1, -1, -1]
    assert buffers.device["table"].eq(0).all()


def test_tensors_stay_where_they_are(buffers):
    before = {name: tensor.data_ptr() for name, tensor in buffers.device.items()}
    buffers.fill(step(2))
    assert {name: tensor.data_ptr() for name, tensor in buffers.device.items()} == before


def test_of_the_last_array_only_what_is_in_use_is_sent(buffers):
    buffers.device["table"].fill_(-5)
    buffers.fill(step(2))
    flat = buffers.device["table"].flatten()
    # Rows are four wide: the last place in use is column 1 of row 1.
    assert flat[[0, 1, 4, 5]].tolist() == [7, 8, 9, 10]
    assert flat[6:].eq(-5).all()


def test_what_does_not_fit_is_refused_before_anything_is_written(buffers):
    assert buffers.fill(step(2))
    assert not buffers.fill(step(4))
    assert not buffers.fill({"tiles": np.array([1, 1], np.int32), "table": np.zeros((3, 5))})
    assert buffers.device["tiles"].tolist() == [0, 1, -1]


def test_a_result_is_read_as_it_was_when_it_was_sent():
    result = Result(3, torch.device("cpu"))
    result.device.copy_(torch.tensor([1, 2, 3]))
    result.send()
    result.device.zero_()
    assert result.read().tolist() == [1, 2, 3]
