"""Names of other engines are taken where they mean the same, and refused with what to write."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from folospec import LLM, EngineConfig, SamplingParams, SpeculativeConfig
from folospec.option_names import (
    CHAT_NAMES,
    DRAFTER_NAMES,
    ENGINE_NAMES,
    GENERATE_NAMES,
    SAMPLING_NAMES,
    STREAM_NAMES,
    OptionNames,
)
from folospec.spec.drafters.base import DrafterContext
from folospec.speculative_config import DrafterConfig


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


OWN_NAMES = {
    "SamplingParams": (SAMPLING_NAMES, parameters(SamplingParams)),
    "a drafter": (DRAFTER_NAMES, parameters(DrafterConfig)),
    "LLM": (ENGINE_NAMES, parameters(EngineConfig)),
    "generate": (GENERATE_NAMES, parameters(LLM.generate)),
    "chat": (CHAT_NAMES, parameters(LLM.chat)),
    "stream": (STREAM_NAMES, parameters(LLM.stream)),
}


@pytest.mark.parametrize("owner", OWN_NAMES)
def test_a_table_leads_from_foreign_names_to_own_ones(owner: str) -> None:
    names, own = OWN_NAMES[owner]
    assert names.owner == owner
    assert set(names.same.values()) <= set(own)
    assert not set(own) & {*names.same, *names.instead}
    assert not set(names.same) & set(names.instead)


def test_the_signatures_are_those_of_the_fields() -> None:
    for cls in (SamplingParams, EngineConfig):
        assert parameters(cls) == [f.name for f in fields(cls) if f.init]


@pytest.mark.parametrize(
    ("foreign", "own"),
    [
        ({"max_new_tokens": 8}, {"max_tokens": 8}),
        ({"n_predict": 8, "temp": 0.5}, {"max_tokens": 8, "temperature": 0.5}),
        ({"num_return_sequences": 2}, {"n": 2}),
        ({"min_new_tokens": 2}, {"min_tokens": 2}),
    ],
)
def test_sampling_params_take_names_that_mean_the_same(
    foreign: dict[str, Any], own: dict[str, Any]
) -> None:
    params = SamplingParams(**foreign)
    assert params == SamplingParams(**own)
    assert params != SamplingParams()
    assert replace(params, top_k=3) == SamplingParams(top_k=3, **own)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_strings": ["a"]}, "'stop_strings': give stop; .*include_stop_str_in_output"),
        ({"repeat_penalty": 1.1}, "give repetition_penalty"),
        ({"num_beams": 4}, "there is no beam search"),
        ({"eos_token_id": 4}, "give stop_token_ids"),
        ({"logits_processor": []}, "give logits_processors"),
        ({"do_sample": True}, "temperature=0 is greedy"),
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"max_new_token": 1}, "did you mean 'max_new_tokens'"),
        ({"xyz": 1}, "unknown option of SamplingParams 'xyz'; known: n, best_of"),
        ({"_stop": "a"}, "unknown option"),
        ({"max_tokens": 1, "max_new_tokens": 1}, "max_tokens and max_new_tokens are one option"),
        ({"n_predict": 1, "max_new_tokens": 1}, "n_predict and max_new_tokens are one option"),
    ],
)
def test_sampling_params_refuse_other_names(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


@pytest.mark.parametrize(
    ("foreign", "own"),
    [
        ({"torch_dtype": "half"}, {"dtype": "float16"}),
        ({"num_gpu_blocks_override": 9}, {"num_blocks": 9}),
        ({"speculative_config": {"method": "ngram"}}, {"speculative": "ngram"}),
        ({"n_ctx": 64, "max_batch_size": 2}, {"max_model_len": 64, "max_num_seqs": 2}),
    ],
)
def test_an_engine_takes_names_that_mean_the_same(
    foreign: dict[str, Any], own: dict[str, Any]
) -> None:
    config = EngineConfig(model="m", **foreign)
    assert config == EngineConfig(model="m", **own)
    assert config != EngineConfig(model="m")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 2}, "no option of LLM 'tensor_parallel_size': .* one device"),
        ({"num_speculative_tokens": 2}, "give it in speculative="),
        ({"max_length": 64}, "give max_model_len"),
        ({"max_tokens": 64}, "give it in SamplingParams"),
        ({"attn_implementation": "sdpa"}, "give attention_backend"),
        ({"max_num_seq": 3}, "did you mean 'max_num_seqs'"),
        ({"dtype": "half", "torch_dtype": "half"}, "dtype and torch_dtype are one option"),
    ],
)
def test_an_engine_refuses_other_names(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM("no model", **options)


@pytest.mark.parametrize("name", ["model_path", "model_name_or_path", "model_id", "model_name"])
def test_a_model_goes_by_the_names_that_others_have_for_it(name: str) -> None:
    assert EngineConfig(**{name: "m"}) == EngineConfig(model="m")
    options: dict[str, Any] = {name: "no such/model/here"}
    with pytest.raises(ValueError, match="model 'no such/model/here'"):
        LLM(**options)
    with pytest.raises(ValueError, match=f"{name} and model are one option of LLM"):
        LLM("folospec-demo", **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LLM(), r"LLM needs the option 'model', as in LLM\(model=\"folospec-demo\"\)"),
        (lambda: LLM(speculative="ngram"), "LLM needs the option 'model'"),
        (lambda: EngineConfig(seed=1), "LLM needs the option 'model'"),
        (lambda: EngineConfig("m"), r"as in EngineConfig\(model=.*\); got \('m',\)"),
        (
            lambda: SamplingParams(0.8, 0.95),
            r"options go by name, as in SamplingParams\(temperature=0.8, top_p=0.95\); "
            r"got \(0.8, 0.95\)",
        ),
        (lambda: SamplingParams({"n": 2}), r"got \({'n': 2},\)"),
    ],
)
def test_what_has_no_name_and_what_is_left_out_is_said(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_the_examples_of_messages_are_options() -> None:
    for cls, names in ((SamplingParams, SAMPLING_NAMES), (EngineConfig, ENGINE_NAMES)):
        given = eval(f"dict({names.example})")
        assert given
        cls(**given)


@pytest.mark.parametrize(
    ("foreign", "own"),
    [
        ({"num_assistant_tokens": 3}, {"num_speculative_tokens": 3}),
        ({"prompt_lookup_num_tokens": 3}, {"num_speculative_tokens": 3}),
        ({"draft_model": "m", "max_draft_len": 3}, {"model": "m", "num_speculative_tokens": 3}),
        ({"speculative_model": "m", "depth": 3}, {"model": "m", "options": {"depth": 3}}),
    ],
)
def test_a_drafter_takes_names_that_mean_the_same(
    foreign: dict[str, Any], own: dict[str, Any]
) -> None:
    expected = SpeculativeConfig.of({"method": "own", **own})
    assert SpeculativeConfig.of({"method": "own", **foreign}) == expected
    assert SpeculativeConfig.of({"drafters": [{"method": "own", **foreign}]}) == expected
    assert SpeculativeConfig.of("own") != expected


def test_an_option_of_a_drafter_has_one_name_at_a_time() -> None:
    with pytest.raises(ValueError, match="draft_model and model are one option of a drafter"):
        SpeculativeConfig.of({"method": "own", "draft_model": "m", "model": "m"})


@pytest.mark.parametrize(
    ("method", "foreign", "own"),
    [
        ("ngram", {"max_matching_ngram_size": 3}, {"prompt_lookup_max": 3}),
        ("ngram", {"ngram_prompt_lookup_min": 3}, {"prompt_lookup_min": 3}),
        ("suffix", {"suffix_decoding_max_tree_depth": 9}, {"max_tree_depth": 9}),
        ("suffix", {"suffix_decoding_min_token_prob": 0.5}, {"min_token_prob": 0.5}),
        ("lookahead", {"max_ngram_size": 3, "max_window_size": 2}, {"ngram_size": 3, "window": 2}),
        ("lookahead", {"max_verification_set_size": 4}, {"guesses": 4}),
    ],
)
def test_a_drafter_takes_names_of_its_own_options(
    method: str, foreign: dict[str, Any], own: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[dict[str, Any]] = []
    real = DrafterContext.read_options

    def record(self: Any, *args: Any) -> dict[str, Any]:
        read.append(real(self, *args))
        return read[-1]

    monkeypatch.setattr(DrafterContext, "read_options", record)
    for options in (foreign, own, {}):
        LLM("folospec-demo", {"method": method, **options}, num_blocks=16)
    assert read[0] == read[1] != read[2]


def test_an_option_that_counts_something_else_is_refused_with_the_right_one() -> None:
    suffix = {"method": "suffix", "suffix_decoding_max_cached_requests": 5}
    with pytest.raises(ValueError, match="of the suffix drafter '.*requests': give max_cached_tok"):
        LLM("folospec-demo", suffix, num_blocks=16)


def test_a_config_reads_what_an_llm_reads() -> None:
    config: Any = EngineConfig(model=Path("m"), speculative="ngram")  # type: ignore[arg-type]
    assert config == EngineConfig(model="m", speculative=SpeculativeConfig.of("ngram"))


def test_another_caller_may_have_more_names_and_another_word_for_them() -> None:
    names = OptionNames(owner="things", same={"old": "new"}, instead={"gone": "give new"})
    assert names.own({"old": 1, "id": 2}, ["new", "id"], "field") == {"new": 1, "id": 2}
    with pytest.raises(ValueError, match="unknown field 'ne'; did you mean 'new'?"):
        names.own({"ne": 1}, ["new", "id"], "field")
    with pytest.raises(ValueError, match="there is no field 'gone': give new"):
        names.own({"gone": 1}, ["new", "id"], "field")
    with pytest.raises(ValueError, match="unknown field 'old'"):
        names.own({"old": 1}, ["id"], "field")
