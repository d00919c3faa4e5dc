import inspect
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from paged_backends import xformers_backend
from paged_libraries import parameters
from two_part_steps import (
    ROUGH,
    agrees,
    end_of_chains,
    error,
    make_step,
    run,
)
from xformers_stand_in import SIGNATURES, Xformers, bias_class

from folospec.attention import two_parts, xformers
from folospec.attention.xformers import XformersAttention

BLOCK_SIZE = 64
FUNCTIONS = ("memory_efficient_attention_forward", "memory_efficient_attention_partial")

pytest.importorskip("triton", reason="the kernel for trees is interpreted")


@pytest.fixture
def library():
    return Xformers()


@pytest.fixture
def make(monkeypatch):
    return partial(xformers_backend, monkeypatch)


@pytest.mark.parametrize("masks", [{"softcap": 1.5}, {"window": 6}, {"window": 9, "softcap": 2.0}])
def test_caps_and_windows_are_left_to_the_kernel_that_knows_them(make, library, masks):
    step = make_step("mixed the other way", BLOCK_SIZE)
    agrees(make(library, kernel=True), step, BLOCK_SIZE, **masks)
    assert library.calls == []


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("decode", ["forward"]),
        ("chains of one length", ["forward"]),
        ("chains", ["forward", "partial"]),
        ("long chains", ["partial"]),
        ("trees", ["partial"]),
        ("trees without context", []),
        ("mixed", ["forward", "partial"]),
    ],
)
def test_chains_of_one_length_are_one_call_and_the_others_one_more(make, library, name, calls):
    run(make(library), make_step(name, BLOCK_SIZE), BLOCK_SIZE)
    assert library.calls == calls


def test_the_most_frequent_length_is_the_one(make, library):
    backend = make(library)
    lengths = torch.tensor([1, 5, 20, 5, 1, 5]).numpy()
    every = lengths > 0
    assert backend._joinable(lengths, every).tolist() == [False, True, False, True, False, True]
    every[1] = every[3] = False
    assert backend._joinable(lengths, every).tolist() == [True, False, False, False, True, False]
    assert not backend._joinable(lengths, lengths == 20).any()


def test_the_end_of_a_chain_sees_its_beginning(make, library):
    agrees(make(library), end_of_chains(BLOCK_SIZE), BLOCK_SIZE)
    assert library.calls == ["forward"]


# What must not go unseen.


def test_a_causal_mask_from_the_top_left_is_caught(make):
    backend = make(Xformers(from_bottom_right=False))
    step = make_step("chains of one length", BLOCK_SIZE)
    assert error(backend, step, BLOCK_SIZE) > ROUGH


def test_a_merge_without_weights_is_caught(make, library, monkeypatch):
    monkeypatch.setattr(two_parts, "merge", lambda a, lse_a, b, lse_b: (a.float() + b) / 2)
    assert error(make(library), make_step("trees", BLOCK_SIZE), BLOCK_SIZE) > ROUGH


@pytest.mark.parametrize("name", ["decode", "trees"])
def test_a_block_table_shifted_by_one_is_caught(make, library, monkeypatch, name):
    def shifted(*args, take=two_parts.take, **kwargs):
        part = take(*args, **kwargs)
        if part is not None:
            part.block_table = part.block_table.roll(1, dims=1)
        return part

    monkeypatch.setattr(two_parts, "take", shifted)
    assert error(make(library), make_step(name, BLOCK_SIZE), BLOCK_SIZE) > ROUGH


def test_heads_in_another_order_are_caught(make, library, monkeypatch):
    context = XformersAttention._context

    def swapped(*args):
        out, lse = context(*args)
        return out, lse.roll(1, dims=1)

    monkeypatch.setattr(XformersAttention, "_context", swapped)
    assert error(make(library), make_step("trees of 64", BLOCK_SIZE), BLOCK_SIZE) > ROUGH


def test_a_causal_call_over_several_lengths_is_refused_by_the_stand_in(make, library, monkeypatch):
    monkeypatch.setattr(XformersAttention, "_joinable", lambda self, num_rows, which: which)
    with pytest.raises(AssertionError):
        run(make(library), make_step("chains", BLOCK_SIZE), BLOCK_SIZE)
    with pytest.raises(AssertionError):
        run(make(library), make_step("long chains", BLOCK_SIZE), BLOCK_SIZE)


# What it takes.


def test_limits_are_said_in_words(make, library):
    supports = make(library).supports
    assert supports(torch.bfloat16, 128, 64) is None
    assert supports(torch.float16, 64, 16) == (
        "block_size must be a multiple of 64, got 16; block_size=64 would do"
    )
    assert "block_size=128 would do" in supports(torch.float16, 64, 65)
    assert supports(torch.float16, 80, 64) == ("head size must be one of 32, 64, 128, 256, got 80")
    assert supports(torch.float32, 64, 64) == (
        "dtype must be float16 or bfloat16, got torch.float32"
    )


def test_a_triton_without_block_pointers_is_refused(make, library, monkeypatch):
    make(library)
    monkeypatch.setattr(xformers, "_has_block_pointers", lambda: False)
    with pytest.raises(RuntimeError, match="block pointers"):
        XformersAttention()


def test_block_pointers_are_looked_for_where_they_are_made(monkeypatch):
    from triton import language

    def there(*args, _semantic):
        return _semantic.make_block_ptr(*args)

    def gone(*args, _semantic):
        raise NotImplementedError("Block pointers have been removed")

    for function, found in ((there, True), (gone, False)):
        monkeypatch.setattr(language, "make_block_ptr", function)
        assert xformers._has_block_pointers() is found


def test_it_promises_no_bits_and_is_in_no_graph():
    assert not XformersAttention.deterministic
    assert not XformersAttention.deterministic_alone
    assert not XformersAttention.supports_cuda_graphs


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_stand_in_has_the_librarys_signature(name):
    assert parameters(getattr(Xformers, name)) == SIGNATURES[name]


def test_the_stand_in_has_the_signature_of_the_librarys_masks():
    made = bias_class(causal=True).from_seqlens
    assert parameters(made) == SIGNATURES["from_seqlens"]


@pytest.mark.skipif(find_spec("xformers") is None, reason="xformers is not installed")
def test_the_recorded_signatures_are_the_installed_librarys():
    fmha = import_module("xformers.ops.fmha")
    masks = import_module("xformers.ops.fmha.attn_bias")
    for name in FUNCTIONS:
        assert parameters(getattr(fmha, name)) == SIGNATURES[name]
    for kind in (
        "PagedBlockDiagonalPaddedKeysMask",
        "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask",
    ):
        there = inspect.unwrap(getattr(masks, kind).from_seqlens)
        assert parameters(there) == SIGNATURES["from_seqlens"]
