"""A request without sampling parameters has the model's own defaults, or ours if asked for."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from sharp_models import save_sharp
from transformers import LlamaConfig, LlamaForCausalLM

from folospec import LLM, SamplingParams

PROMPT = [[1, 2, 3]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("defaults")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    special = {"bos_token_id": None, "eos_token_id": None}
    config = LlamaConfig(vocab_size=64, num_attention_heads=2, **sizes, **special)
    save_sharp(LlamaForCausalLM(config), path)
    fields = {"temperature": 0.6, "top_k": 7, "max_new_tokens": 5, "top_p": 7, "seed": 3}
    (path / "generation_config.json").write_text(json.dumps(fields))
    return str(path)


def first(llm, *params):
    return llm.generate(PROMPT, *params, use_tqdm=False)[0].outputs[0].token_ids


def test_without_parameters_the_models_defaults_are_used(folder):
    llm = LLM(folder, skip_tokenizer_init=True)
    expected = SamplingParams(temperature=0.6, top_k=7, max_tokens=5)
    assert llm.get_default_sampling_params() == expected
    assert first(llm) == first(LLM(folder, skip_tokenizer_init=True), expected)
    request_id = llm.engine.add_request(PROMPT[0])
    assert llm.engine.requests[request_id].params == expected


def test_parameters_that_are_given_are_used_as_they_are(folder):
    llm = LLM(folder, skip_tokenizer_init=True)
    edited = dataclasses.replace(llm.get_default_sampling_params(), max_tokens=2)
    assert (edited.top_k, len(first(llm, edited))) == (7, 2)
    assert len(first(llm, SamplingParams())) == 16


def test_folospec_leaves_the_models_defaults_out(folder):
    llm = LLM(folder, skip_tokenizer_init=True, generation_config="folospec")
    assert llm.get_default_sampling_params() == SamplingParams()
    assert len(first(llm)) == 16


def test_another_name_is_refused(folder):
    with pytest.raises(ValueError, match="generation_config must be one of auto, folospec"):
        LLM(folder, generation_config="vllm")
