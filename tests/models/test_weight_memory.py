"""Weights lie in large pages where a machine has them, apart from each other, and leave with their
tensors."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch

from folospec.models import weight_memory
from folospec.models.weight_memory import CHUNK, PAGE, WeightMemory

CPU = torch.device("cpu")
SHAPES = [(3, 5), (1000, 7), (CHUNK // 8, 1), (CHUNK // 16, 1), (CHUNK // 32, 3), (1, 1)] * 4


def filled(memory, dtype):
    tensors = [memory.take(shape, dtype) for shape in SHAPES]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64])
def test_no_tensor_reaches_into_another(dtype):
    for number, tensor in enumerate(filled(WeightMemory(CPU), dtype)):
        assert tensor.shape == SHAPES[number % len(SHAPES)]
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 256 == 0
        assert (tensor == number).all()


def test_a_large_tensor_begins_where_a_page_does():
    assert WeightMemory(CPU).take((CHUNK,), torch.int8).data_ptr() % PAGE == 0


def test_small_tensors_share_what_is_taken_at_a_time():
    memory = WeightMemory(CPU)
    first, second = (memory.take((64,), torch.float32).data_ptr() for _ in range(2))
    assert second - first == 256
    assert first % PAGE == 0


def test_memory_goes_when_its_last_tensor_does(monkeypatch):
    arrays, real = [], weight_memory.np.empty

    def watched(*args):
        array = real(*args)
        arrays.append(weakref.ref(array))
        return array

    monkeypatch.setattr(weight_memory.np, "empty", watched)
    memory = WeightMemory(CPU)
    large, small = memory.take((CHUNK,), torch.int8), memory.take((4,), torch.int8)
    del large
    gc.collect()
    assert [array() is None for array in arrays] == [True, False]
    del memory, small
    gc.collect()
    assert [array() for array in arrays] == [None, None]


def test_the_system_is_asked_for_large_pages():
    """What numpy does for us: the pages of a tensor are large as soon as it is written."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.is_file() or "[never]" in setting.read_text():
        pytest.skip("this machine has no large pages to give")
    tensor = WeightMemory(CPU).take((CHUNK,), torch.int8)
    tensor.fill_(1)
    assert "hg" in flags_of(tensor.data_ptr())


def flags_of(address: int) -> list[str]:
    """The flags of the mapping that an address is in; "hg" is the wish for large pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    return []
