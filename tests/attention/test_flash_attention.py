import inspect
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
import two_part_steps
from flash_attn_stand_in import SIGNATURES, FlashAttn
from paged_backends import flash_attn_backend
from paged_libraries import parameters
from two_part_steps import (
    ROUGH,
    agrees,
    end_of_chains,
    error,
    make_step,
    metadata_of,
    run,
)

from folospec.attention import two_parts
from folospec.attention.flash_attention import FlashAttention

BLOCK_SIZE = 256
FUNCTIONS = ("flash_attn_varlen_func", "flash_attn_with_kvcache")

pytest.importorskip("triton", reason="the kernel for trees is interpreted")


@pytest.fixture
def library():
    return FlashAttn()


@pytest.fixture
def make(monkeypatch):
    return partial(flash_attn_backend, monkeypatch)


@pytest.mark.parametrize("name", ["decode", "chains", "trees", "mixed"])
def test_scores_are_capped_in_both_parts(make, library, name):
    agrees(make(library), make_step(name, BLOCK_SIZE), BLOCK_SIZE, softcap=1.5)


@pytest.mark.parametrize("name", ["decode", "chains", "prompts"])
@pytest.mark.parametrize("window", [1, 3, 100])
def test_windows_are_the_librarys(make, library, name, window):
    agrees(make(library), make_step(name, BLOCK_SIZE), BLOCK_SIZE, window=window)
    assert library.calls


def test_a_trees_window_is_left_to_the_kernel_that_knows_depths(make, library):
    backend, step = make(library, kernel=True), make_step("mixed the other way", BLOCK_SIZE)
    agrees(backend, step, BLOCK_SIZE, window=6)
    library.calls.clear()
    agrees(backend, make_step("trees", BLOCK_SIZE), BLOCK_SIZE, window=6)
    assert library.calls == []


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("decode", ["with_kvcache"]),
        ("chains of one length", ["with_kvcache"]),
        ("chains", ["varlen"]),
        ("prompts", ["varlen"]),
        ("a node", ["with_kvcache"]),
        ("trees", ["varlen"]),
        ("trees without context", []),
        ("mixed", ["varlen", "varlen"]),
    ],
)
def test_a_step_of_chains_is_one_call_and_trees_are_one_more(make, library, name, calls):
    run(make(library), make_step(name, BLOCK_SIZE), BLOCK_SIZE)
    assert library.calls == calls


def test_a_step_is_described_once_for_all_layers(make, library, monkeypatch):
    backend, step = make(library), make_step("mixed", BLOCK_SIZE)
    metadata, calls = metadata_of(step, BLOCK_SIZE), []
    monkeypatch.setattr(
        two_parts, "take", lambda *a, take=two_parts.take, **k: calls.append(a) or take(*a, **k)
    )
    first = run(backend, step, BLOCK_SIZE, metadata=metadata)
    assert torch.equal(first, run(backend, step, BLOCK_SIZE, metadata=metadata))
    assert len(calls) == 2


def test_after_advance_the_row_before_is_context(make, library):
    from folospec.attention.metadata import AttentionMetadata

    backend, step = make(library), make_step("decode", BLOCK_SIZE)
    tables = [rows.block_table for rows in step.sequences]
    width = max(map(len, tables))
    table = torch.tensor([[*t, *[0] * (width - len(t))] for t in tables], dtype=torch.int32).numpy()
    positions = torch.tensor([rows.context_len for rows in step.sequences]).numpy()
    metadata = AttentionMetadata.of_single_rows(positions, table, BLOCK_SIZE)
    how = {"scale": two_part_steps.HEAD_SIZE**-0.5}
    rows = (step.query, step.key, step.value, step.kv)
    backend.forward(*rows, metadata, **how)
    metadata.advance()
    got = backend.forward(*rows, metadata, **how)
    wanted = two_part_steps.get_backend("torch").forward(*rows, metadata, **how)
    torch.testing.assert_close(got, wanted, atol=2e-3, rtol=0)


def test_the_end_of_a_chain_sees_its_beginning(make, library):
    agrees(make(library), end_of_chains(BLOCK_SIZE), BLOCK_SIZE)
    assert library.calls == ["with_kvcache"]


# What must not go unseen.


def test_a_causal_mask_from_the_top_left_is_caught(make):
    backend = make(FlashAttn(from_bottom_right=False))
    for name in ("chains", "chains of one length", "prompts"):
        assert error(backend, make_step(name, BLOCK_SIZE), BLOCK_SIZE) > ROUGH


def test_a_merge_without_weights_is_caught(make, library, monkeypatch):
    monkeypatch.setattr(two_parts, "merge", lambda a, lse_a, b, lse_b: (a.float() + b) / 2)
    assert error(make(library), make_step("trees", BLOCK_SIZE), BLOCK_SIZE) > ROUGH


def test_an_empty_context_that_weighs_is_caught(make, library, monkeypatch):
    backend = make(library)
    monkeypatch.setattr(
        backend,
        "_context",
        lambda *args: backend._call(*args, causal=False, window_size=(-1, -1)),
    )
    assert error(backend, make_step("trees", BLOCK_SIZE), BLOCK_SIZE) > ROUGH


@pytest.mark.parametrize("name", ["decode", "trees"])
def test_a_block_table_shifted_by_one_is_caught(make, library, monkeypatch, name):
    def shifted(*args, take=two_parts.take, **kwargs):
        part = take(*args, **kwargs)
        if part is not None:
            part.block_table = part.block_table.roll(1, dims=1)
        return part

    monkeypatch.setattr(two_parts, "take", shifted)
    assert error(make(library), make_step(name, BLOCK_SIZE), BLOCK_SIZE) > ROUGH


def test_a_window_that_is_one_too_wide_is_caught(make, library, monkeypatch):
    backend, step = make(library), make_step("decode", BLOCK_SIZE)
    joined = backend._joined

    def wider(query, kv, part, scoring):
        return joined(query, kv, part, scoring._replace(sliding_window=4))

    monkeypatch.setattr(backend, "_joined", wider)
    assert error(backend, step, BLOCK_SIZE, window=3) > ROUGH


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("key_lens", torch.tensor([1, 1, 1, 1])),
        ("block_table", torch.full((4, 2), 99, dtype=torch.int32)),
        ("block_table", torch.zeros(4, 1, dtype=torch.int32)),
    ],
)
def test_the_stand_in_refuses_what_the_library_would_misread(
    make, library, monkeypatch, field, value
):
    def broken(*args, take=two_parts.take, **kwargs):
        part = take(*args, **kwargs)
        if part is not None:
            setattr(part, field, value)
        return part

    monkeypatch.setattr(two_parts, "take", broken)
    with pytest.raises(AssertionError):
        run(make(library), make_step("decode", BLOCK_SIZE), BLOCK_SIZE)


# What it takes.


def test_limits_are_said_in_words(make, library):
    supports = make(library).supports
    assert supports(torch.bfloat16, 128, 256) is None
    assert supports(torch.float16, 80, 512) is None
    assert supports(torch.float16, 64, 16) == (
        "block_size must be a multiple of 256, got 16; block_size=256 would do"
    )
    assert "block_size=512 would do" in supports(torch.float16, 64, 300)
    assert supports(torch.float32, 64, 256) == (
        "dtype must be float16 or bfloat16, got torch.float32"
    )
    for size in (60, 264):
        assert supports(torch.float16, size, 256) == (
            f"head size must be a multiple of 8 up to 256, got {size}"
        )
    assert "from 32" in supports(torch.float16, 16, 256)


def test_kv_of_another_type_is_refused(make, library):
    step = make_step("decode", BLOCK_SIZE)
    step.kv = type(step.kv)(*(cache.bfloat16() for cache in step.kv))
    with pytest.raises(
        ValueError, match="KV of the model's type torch.float16, got torch.bfloat16"
    ):
        run(make(library), step, BLOCK_SIZE)


def test_it_promises_no_bits_and_is_in_no_graph():
    assert not FlashAttention.deterministic
    assert not FlashAttention.deterministic_alone
    assert not FlashAttention.supports_cuda_graphs


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_stand_in_has_the_librarys_signature(name):
    assert parameters(getattr(FlashAttn, name)) == SIGNATURES[name]


@pytest.mark.skipif(find_spec("flash_attn") is None, reason="flash-attn is not installed")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_recorded_signature_is_the_installed_librarys(name):
    library = import_module("flash_attn")
    there = inspect.signature(getattr(library, name)).parameters
    wanted = inspect.signature(getattr(FlashAttn(), name)).parameters
    assert {n: there[n].default for n in wanted if n != "cache_leftpad"} == {
        n: p.default for n, p in wanted.items() if n != "cache_leftpad"
    }
