"""The stand-in for CUDA graphs replays what was recorded, and refuses what a card would."""

import pytest
import torch
from graph_stand_in import CannotBeRecorded, StandIn


def test_a_replay_reads_what_the_tensors_hold_now():
    x, out = torch.zeros(3), torch.zeros(3)

    def fn():
        y = (x * 2).view(3).add_(1)
        out.copy_(torch.stack([y, y]).sum(0))

    replay = StandIn().record(fn)
    x.fill_(5)
    replay()
    assert out.tolist() == [22, 22, 22]


def test_numbers_are_those_of_the_recording():
    x, out, factor = torch.ones(2), torch.zeros(2), [3]
    replay = StandIn().record(lambda: out.copy_(x * factor[0]))
    factor[0] = 7
    replay()
    assert out.tolist() == [3, 3]


def test_what_was_made_before_the_recording_of_other_memory_is_lost():
    x, out, made = torch.ones(2), torch.zeros(2), []

    def fn():
        if len(made) < 2:  # made in the warm-up and in the recording, as a cache might
            made.append(x * 2)
        out.copy_(made[0])

    replay = StandIn().record(fn)
    x.fill_(9)
    replay()
    assert out.tolist() == [2, 2], "a cached tensor is not made anew"


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: bool(x.sum() > 0),
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x.add_(torch.tensor([1.0, 2.0])),
        lambda x: x.cpu(),
    ],
)
def test_what_a_card_refuses_while_it_records_is_refused(fn):
    x = torch.zeros(2)
    with pytest.raises(CannotBeRecorded):
        StandIn().record(lambda: fn(x))
