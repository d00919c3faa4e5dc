"""Rope types that change with length choose their frequencies once, from max_model_len."""

from __future__ import annotations

import pytest
import torch
from paged_runner import PagedRunner, all_logits
from tiny_checkpoints import SHAPE, load, random_prompts, reference_logits, save_random
from transformers import LlamaConfig, Phi3Config

from folospec.models.rope import frequencies, position_limit

TRAINED, LONGEST = 32, 64
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": TRAINED,
}


def dynamic_llama():
    return LlamaConfig(
        **{**SHAPE, "max_position_embeddings": TRAINED}, rope_parameters=dict(DYNAMIC)
    )


def longrope_llama():
    shape = {**SHAPE, "max_position_embeddings": LONGEST}
    return LlamaConfig(**shape, rope_parameters=dict(LONGROPE))


def longrope_phi3():
    shape = {**SHAPE, "max_position_embeddings": LONGEST}
    return Phi3Config(
        **shape, rope_parameters=dict(LONGROPE), original_max_position_embeddings=TRAINED
    )


CASES = {"dynamic": dynamic_llama, "longrope": longrope_llama, "longrope, Phi-3": longrope_phi3}


@pytest.mark.parametrize("chunk", [5, 64])
@pytest.mark.parametrize("case", CASES)
def test_a_short_row_beside_one_beyond_the_switch_has_the_frequencies_of_the_longest(
    case, chunk, tmp_path
):
    reference = save_random(CASES[case](), tmp_path)
    (long,) = random_prompts(lengths=(LONGEST,))
    short = long[:20]
    # For a text of the full length transformers chooses as we do for every text.
    expected = reference_logits(reference, long)
    model = load(tmp_path, max_model_len=LONGEST)
    together = all_logits(PagedRunner(model), [short, long], chunk)
    alone = all_logits(PagedRunner(model), [short], chunk)
    for logits in (*together, *alone):
        torch.testing.assert_close(logits, expected[: len(logits)], rtol=0, atol=1e-4)
    # Control: transformers chooses otherwise for the short text alone.
    assert (reference_logits(reference, short) - expected[:20]).abs().max() > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_within_the_trained_length_the_frequencies_are_those_of_a_short_text(case, tmp_path):
    reference = save_random(CASES[case](), tmp_path)
    (short,) = random_prompts(lengths=(20,))
    (logits,) = all_logits(PagedRunner(load(tmp_path, max_model_len=TRAINED)), [short], 7)
    torch.testing.assert_close(logits, reference_logits(reference, short), rtol=0, atol=1e-4)


def test_only_types_that_stretch_take_more_than_the_stated_positions(tmp_path):
    assert position_limit(dynamic_llama()) == 2 * TRAINED
    assert position_limit(longrope_llama()) == LONGEST
    save_random(dynamic_llama(), tmp_path)
    assert load(tmp_path).config.max_model_len == TRAINED
    with pytest.raises(ValueError, match=r"1\.\.64 .*got 65"):
        load(tmp_path, max_model_len=65)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "spiral", "rope_theta": 1e4}, "'spiral'"),
        ({"rope_type": "linear", "rope_theta": 1e4}, "'factor'"),
        ({"rope_type": "default"}, "rope_theta"),
        (
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 0.5},
            "2",
        ),
    ],
)
def test_rope_parameters_that_do_not_fit_are_refused(parameters, message):
    config = LlamaConfig(**SHAPE)
    config.rope_parameters = parameters
    with pytest.raises(ValueError, match=message):
        frequencies(config, 8, 64)
