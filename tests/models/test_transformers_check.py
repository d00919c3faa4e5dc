"""The comparison at load accepts rounding, and no model that derives more from its inputs."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
import transformers as hf
from tiny_checkpoints import load, save_random
from transformers import AutoModelForCausalLM

from folospec.models.transformers_check import Comparison, distances, own_logits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpt2")
    none = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    sizes = {"vocab_size": 101, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
    save_random(hf.GPT2Config(**none, **sizes), path)
    return path


def check(folder, dtype, change=None):
    """Compare the model with itself; `change` spoils what its paged forward is given or returns."""
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model = load(folder, dtype=dtype)
    own = partial(own_logits, reference)
    comparison = Comparison(own, "Tiny", 101, model.config.sliding_windows, [], model.device)
    plain = model.forward

    def forward(input_ids, metadata, kv, aux_layers=()):
        if change is None:
            return plain(input_ids, metadata, kv, aux_layers)
        return change(plain, input_ids, metadata, kv, aux_layers)

    model.forward = forward
    comparison.check(model, 4)


def moved(metadata, positions):
    return dataclasses.replace(metadata, positions=positions)


def later_from_zero(plain, ids, metadata, kv, aux_layers):
    starts = torch.from_numpy(metadata.context_lens).repeat_interleave(
        torch.from_numpy(metadata.query_start_loc).diff()
    )
    return plain(ids, moved(metadata, metadata.positions - starts), kv, aux_layers)


def counted_through(plain, ids, metadata, kv, aux_layers):
    start = int(metadata.positions[0])
    return plain(ids, moved(metadata, start + torch.arange(len(ids))), kv, aux_layers)


def one_further(plain, ids, metadata, kv, aux_layers):
    return plain(ids, moved(metadata, metadata.positions + 1), kv, aux_layers)


def neighbours_seen(plain, ids, metadata, kv, aux_layers):
    hidden, aux_hidden_states = plain(ids, metadata, kv, aux_layers)
    duplicates = metadata.positions[1:] == metadata.positions[:-1]
    hidden[1:][duplicates] += hidden[:-1][duplicates]
    return hidden, aux_hidden_states


def fails(plain, ids, metadata, kv, aux_layers):
    raise KeyError("no such thing")


def one_row_off(plain, ids, metadata, kv, aux_layers):
    hidden, aux_hidden_states = plain(ids, metadata, kv, aux_layers)
    hidden[0] = hidden[0].flip(0)
    return hidden, aux_hidden_states


FAULTS = {
    "on plain text": one_further,
    "where another sequence is packed": counted_through,
    "where the earlier tokens of its sequence are in the KV": later_from_zero,
    "where drafts for one position run side by side": neighbours_seen,
    "its forward does not run on packed rows .KeyError": fails,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_agrees_with_itself(folder, dtype):
    check(folder, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", FAULTS)
def test_a_model_that_derives_more_is_refused_with_the_place(folder, dtype, where):
    with pytest.raises(ValueError, match=f"'Tiny' is not supported: {where}"):
        check(folder, dtype, FAULTS[where])


def test_in_16_bits_one_row_may_be_off_as_where_another_expert_was_chosen(folder):
    check(folder, torch.bfloat16, one_row_off)
    with pytest.raises(ValueError, match="not supported"):
        check(folder, torch.float32, one_row_off)


def test_an_error_is_measured_in_spreads_and_rounding_does_not_count():
    expected = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    spread = expected.std(1, correction=0)
    found = distances(expected + 0.5 * spread[:, None], expected, torch.float32)
    torch.testing.assert_close(found, torch.full((3,), 0.5, dtype=torch.float64), atol=1e-3, rtol=0)
    offset = expected + 100.0
    assert distances(offset.bfloat16().float(), offset, torch.bfloat16).max() == 0
    banned = expected.clone()
    banned[:, 3] = -torch.inf
    assert distances(banned, banned, torch.float32).max() == 0
    assert distances(expected, banned, torch.float32).max() == torch.inf
