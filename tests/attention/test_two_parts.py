"""Context by a library's kernel and trees beside it, merged: every row sees what it should,
whichever library it is."""

from functools import partial

import pytest

pytest.importorskip("triton", reason="the kernel for trees is interpreted")

import torch
from flash_attn_stand_in import FlashAttn
from paged_backends import flash_attn_backend, xformers_backend
from two_part_steps import (
    ROUGH,
    STEPS,
    agrees,
    chain_elsewhere,
    error,
    installed,
    make_step,
    on,
    random_kinds,
)
from xformers_stand_in import Xformers

from folospec.attention import two_parts
from folospec.attention.base import BLOCK_STEPS

BACKENDS = {
    "flash_attn": (flash_attn_backend, FlashAttn),
    "xformers": (xformers_backend, Xformers),
}


@pytest.fixture(params=BACKENDS)
def name(request):
    return request.param


@pytest.fixture
def block_size(name):
    return BLOCK_STEPS[name]


@pytest.fixture
def make(name, monkeypatch):
    backend, library = BACKENDS[name]
    return partial(backend, monkeypatch, library())


@pytest.mark.parametrize("kind", STEPS)
def test_every_row_sees_what_it_should(make, block_size, kind):
    agrees(make(), make_step(kind, block_size), block_size)


@pytest.mark.parametrize("seed", range(8))
def test_whatever_comes_is_seen(make, block_size, seed):
    agrees(make(), random_kinds(seed, block_size), block_size)


@pytest.mark.parametrize("heads", [(4, 4), (8, 1), (6, 3)])
def test_heads_find_theirs(make, block_size, heads):
    agrees(make(), make_step("mixed", block_size, heads), block_size)


@pytest.mark.parametrize("kind", ["mixed", "chains of one length"])
def test_a_query_may_be_part_of_a_wider_tensor(make, block_size, kind):
    step = make_step(kind, block_size)
    wide = torch.cat([step.query, torch.full_like(step.query, torch.nan)], dim=1)
    step.query = wide[:, : step.query.shape[1]]
    agrees(make(), step, block_size)


def test_bfloat16_is_taken(make, block_size):
    agrees(make(), make_step("mixed", block_size, dtype=torch.bfloat16), block_size)


def test_the_kernel_for_trees_does_what_its_stand_in_does(make, block_size):
    agrees(make(kernel=True), make_step("mixed", block_size), block_size)


def test_a_chain_that_lies_elsewhere_is_seen_where_it_lies(make, block_size):
    agrees(make(), chain_elsewhere(block_size), block_size)


def test_a_chain_that_is_taken_to_lie_in_order_is_caught(make, block_size, monkeypatch):
    monkeypatch.setattr(two_parts, "lies_in_order", lambda metadata: metadata.context_lens >= 0)
    assert error(make(), chain_elsewhere(block_size), block_size) > ROUGH


@pytest.mark.gpu
@pytest.mark.parametrize("masks", [{}, {"softcap": 1.5}, {"window": 6}])
@pytest.mark.parametrize("kind", STEPS)
def test_the_library_itself_does_what_its_stand_in_does(name, block_size, kind, masks):
    agrees(installed(name), on("cuda", make_step(kind, block_size)), block_size, **masks)
