"""What the config says decides whether the decoder serves a checkpoint, and with which options."""

from __future__ import annotations

import json

import pytest
import torch
from paged_runner import PagedRunner, all_logits
from tiny_checkpoints import SHAPE, load, random_prompts, reference_logits, save_random
from transformers import (
    AutoConfig,
    LlamaConfig,
    MistralConfig,
    OlmoConfig,
    Qwen2Config,
    Qwen3Config,
)

from folospec.models.decoder import Decoder
from folospec.models.decoder_options import SERVED, decoder_options, is_served, model_class
from folospec.models.transformers_backend import TransformersModel

WINDOWED = {"use_sliding_window": True, "sliding_window": 6}


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("names", [["MistralForCausalLM"], ["Olmo2ForCausalLM"], [], None])
def test_transformers_class_decides_not_the_names_in_the_config(tmp_path, names):
    reference = save_random(LlamaConfig(**SHAPE, attention_bias=True), tmp_path)
    edit_config(tmp_path, architectures=names)
    model = load(tmp_path)
    assert isinstance(model, Decoder)
    assert model.config.architecture == "LlamaForCausalLM"
    (tokens,) = random_prompts(lengths=(9,))
    (logits,) = all_logits(PagedRunner(model), [tokens], 4)
    torch.testing.assert_close(logits, reference_logits(reference, tokens), rtol=0, atol=1e-4)


def test_another_class_is_not_ours_whatever_its_config_calls_itself(tmp_path):
    save_random(OlmoConfig(**SHAPE), tmp_path)
    edit_config(tmp_path, architectures=["LlamaForCausalLM"])
    assert isinstance(load(tmp_path), TransformersModel)


def test_a_class_outside_of_transformers_is_not_ours():
    class MyConfig(LlamaConfig):
        pass

    assert is_served(LlamaConfig(**SHAPE))
    assert not is_served(MyConfig(**SHAPE))


def test_every_class_of_the_table_is_one_of_transformers():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    kinds = {kind for kind, name in NAMES.items() if name in SERVED}
    newer = {"internlm3", "iquestcoder"} & NAMES.keys()
    assert {"llama", "mistral", "qwen2", "qwen3"} | newer <= kinds
    assert {model_class(AutoConfig.for_model(kind)) for kind in kinds} == set(SERVED)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (LlamaConfig, {"hidden_act": "cubic"}, "hidden_act must be one of .*'cubic'"),
        (LlamaConfig, {"num_key_value_heads": 3}, "multiple of num_key_value_heads=3, got 4"),
        (LlamaConfig, {"head_dim": 3}, "head_dim"),
        (LlamaConfig, {"intermediate_size": 0}, "intermediate_size .* got 0"),
        (LlamaConfig, {"vocab_size": -5}, "vocab_size .* got -5"),
        (LlamaConfig, {"rms_norm_eps": -1.0}, r"rms_norm_eps .* got -1\.0"),
        (MistralConfig, {"sliding_window": 0}, "sliding_window .* got 0"),
        (Qwen2Config, {"layer_types": ["sliding_attention"] * 3}, "needs use_sliding_window"),
        (Qwen3Config, {**WINDOWED, "layer_types": ["chunked_attention"] * 3}, "chunked"),
        (Qwen3Config, {**WINDOWED, "layer_types": ["full_attention"]}, "layer_types"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(config, changes, message):
    hf_config = config(**SHAPE)
    for name, value in changes.items():
        object.__setattr__(hf_config, name, value)
    if changes.get("use_sliding_window"):
        object.__setattr__(hf_config, "sliding_window", 6)
    with pytest.raises(ValueError, match=message):
        decoder_options(hf_config, 64, ties=False)


def test_a_window_that_the_llama_class_does_not_have_is_named(caplog):
    options = decoder_options(LlamaConfig(**SHAPE, sliding_window=6), 64, ties=False)
    assert options.sliding_windows == (None,) * 3
    assert "sliding_window=6" in caplog.text
