"""An emulated library works on the caller's memory, and says why it does not."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace

import emulated_kernels
import pytest
import torch
from emulated_kernels import EmulatedLibrary, pass_on
from kernel_memory import Memory
from native_builds import ARM, FOLDER, NEON, built_for


@pytest.fixture
def library() -> EmulatedLibrary:
    found = built_for(NEON).library
    if not isinstance(found, EmulatedLibrary):
        pytest.skip("this machine runs NEON itself")
    return found


class Pair(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int64), ("numbers", ctypes.c_void_p)]


def test_memory_that_overlaps_is_one_region():
    memory = Memory(SimpleNamespace())
    memory.add((1000, 10), (1005, 10), (1020, 5), (1025, 5), (0, 50), (3000, 0), (1006, 2))
    assert memory.regions() == [(1000, 15), (1020, 5), (1025, 5)]


def test_what_a_struct_points_to_goes_with_it():
    numbers, memory = (ctypes.c_float * 6)(), Memory(SimpleNamespace())
    pair = Pair(6, ctypes.addressof(numbers))
    memory.follow(memory.struct(ctypes.addressof(pair), Pair), numbers=24)
    at = ctypes.addressof(pair) + 8
    assert memory.pointers == [(at, ctypes.addressof(numbers))]
    assert sorted(memory.parts) == sorted([(at - 8, 16), (ctypes.addressof(numbers), 24)])


def test_arguments_are_addresses_integers_or_doubles():
    pair, numbers = Pair(), (ctypes.c_int64 * 2)()
    for reference in (pair, ctypes.byref(pair)):
        assert pass_on(reference, ctypes.c_void_p) == (ctypes.addressof(pair), "address")
    assert pass_on(numbers, None) == (ctypes.addressof(numbers), "address")
    assert pass_on(None, ctypes.c_void_p) == (0, "address")
    assert pass_on(4096, ctypes.c_void_p) == (4096, "address")
    assert pass_on(4096, ctypes.c_int64) == (4096, "integer")
    assert pass_on(1, ctypes.c_double) == (1.0, "double")


def test_a_function_reads_and_writes_the_callers_memory(library):
    x, out = torch.ones(1, 32), torch.full((2, 32), 7.0)
    built_for(NEON).rms_norm(x.data_ptr(), x.data_ptr(), 1, 32, 3.0, out.data_ptr())
    assert out.tolist() == [[0.5] * 32, [7.0] * 32]


def test_each_build_has_the_instructions_that_it_is_for():
    said = [built_for(target).instructions for target in ARM]
    assert said == ["NEON with bfloat16", "NEON"]


def test_a_function_whose_memory_is_not_known_is_refused(library):
    with pytest.raises(KeyError, match="folospec_unheard_of"):
        library.folospec_unheard_of()


def test_a_driver_that_ends_says_why(library):
    driver = emulated_kernels.build_driver(FOLDER)
    none = EmulatedLibrary(Path("/nonexistent.so"), driver)
    with pytest.raises(RuntimeError, match=r"ended with 3: driver: /nonexistent\.so: cannot open"):
        none.folospec_instruction_set()
    own = EmulatedLibrary(Path(library._name), driver)
    emulated_kernels.EmulatedInt(own, "folospec_unheard_of").value = 1
    with pytest.raises(RuntimeError, match="there is no folospec_unheard_of"):
        own.folospec_instruction_set()


@pytest.mark.parametrize("missing", [emulated_kernels.COMPILER, emulated_kernels.EMULATOR])
def test_a_program_that_is_missing_is_named_with_its_package(missing, monkeypatch):
    found = {emulated_kernels.COMPILER, emulated_kernels.EMULATOR} - {missing}
    monkeypatch.setattr(emulated_kernels.shutil, "which", lambda n: n if n in found else None)
    monkeypatch.delenv("FOLOSPEC_KERNELS_FLAGS", raising=False)
    reason = emulated_kernels.why_not()
    assert reason is not None
    assert reason.startswith(f"there is no {missing} (Debian's package ")
