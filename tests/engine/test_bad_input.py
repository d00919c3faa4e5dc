"""Bad input is refused at the door, in words, with the value; nothing has changed afterwards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from harness import make_llm, run, save_tiny_llama

from folospec import LLM, SamplingParams, SpeculativeConfig
from folospec.speculative_config import DrafterConfig

BAD_PARAMS = [
    ({"n": 0}, "n must be"),
    ({"n": 2, "best_of": 1}, "best_of must be"),
    ({"n": 2, "temperature": 0}, "temperature 0"),
    ({"temperature": -0.1}, "temperature must be"),
    ({"temperature": float("nan")}, "temperature must be"),
    ({"top_p": 0.0}, "top_p must be"),
    ({"top_p": 1.5}, "top_p must be"),
    ({"top_k": -2}, "top_k must be"),
    ({"min_p": 1.1}, "min_p must be"),
    ({"repetition_penalty": 0.0}, "repetition_penalty must be"),
    ({"presence_penalty": 3}, "presence_penalty must be"),
    ({"frequency_penalty": -3}, "frequency_penalty must be"),
    ({"max_tokens": 0}, "max_tokens must be"),
    ({"min_tokens": 20, "max_tokens": 5}, "min_tokens must be"),
    ({"logprobs": -1}, "logprobs must be"),
    ({"seed": "x"}, "seed must be"),
    ({"stop": ""}, "stop must be"),
    ({"bad_words": "word"}, "bad_words must be"),
    ({"allowed_token_ids": []}, "allowed_token_ids must be"),
    ({"logit_bias": {"a": 1.0}}, "logit_bias must be"),
    ({"logit_bias": {1: float("nan")}}, "logit_bias must be"),
    ({"logits_processors": [3]}, "logits_processors must be"),
    ({"stop_token_ids": 5}, "stop_token_ids must be"),
    ({"allowed_token_ids": 5}, "allowed_token_ids must be"),
    ({"logit_bias": 5}, "logit_bias must be"),
    ({"logit_bias": {1: float("inf")}}, "logit_bias must be"),
    ({"ignore_eos": "no"}, "ignore_eos must be"),
    ({"include_stop_str_in_output": 3}, "include_stop_str_in_output must be"),
    ({"num_speculative_tokens": -1}, "num_speculative_tokens must be"),
    ({"logit_bias": {1: 1e300}}, "logit_bias must be"),
    ({"logit_bias": {1: 10**400}}, "logit_bias must be"),
    ({"logit_bias": [(1, 2.0)]}, "logit_bias must be"),
    ({"temperature": 10**400}, "temperature must be"),
    ({"n": True}, "n must be"),
    ({"max_tokens": np.int64(3)}, "max_tokens must be"),
    ({"stop": b"x"}, "stop must be"),
    ({"stop": {"x": 1}}, "stop must be"),
    ({"stop": ["a", "\ud83d"]}, "stop must be valid Unicode"),
    ({"stop": [["a"]]}, "stop must be"),
    ({"bad_words": ["\ud83d"]}, "bad_words must be valid Unicode"),
    ({"bad_words": (word for word in "ab")}, "bad_words must be"),
    ({"stop_token_ids": b"abc"}, "stop_token_ids must be"),
    ({"stop_token_ids": {1: 2}}, "stop_token_ids must be"),
    ({"stop_token_ids": [True]}, "stop_token_ids must be"),
    ({"stop_token_ids": np.array([1])}, "stop_token_ids must be"),
    ({"stop_token_ids": np.array(1)}, "stop_token_ids must be"),
    ({"allowed_token_ids": torch.tensor([1])}, "allowed_token_ids must be"),
    ({"allowed_token_ids": [[1]]}, "allowed_token_ids must be"),
    ({"logits_processors": len}, "logits_processors must be"),
    ({"drafters": "ngram"}, "drafters must be"),
    ({"drafters": [["ngram"]]}, "drafters must be"),
    ({"prediction": "\ud83d"}, "prediction must be valid Unicode"),
    ({"prediction": {1, 2}}, "prediction must be"),
    ({"prediction": [True]}, "prediction must be"),
    ({"seed": 1.0}, "seed must be"),
    ({"seed": [1]}, "seed must be"),
]

BAD_REQUESTS = [
    ([], {}, "prompt is empty"),
    ([61], {}, "between 0 and 60, got 61"),
    ([-1], {}, "got -1"),
    ([1.5], {}, "got 1.5"),
    ([True], {}, "got True"),
    ([None], {}, "got None"),
    ({"prompt_token_ids": 5}, {}, "a list of token ids"),
    ({"prompt": None}, {}, "a list of token ids"),
    ([1] * 192, {}, "at most 191"),
    ({"tokens": [1]}, {}, "prompt_token_ids"),
    ({1: 2, "prompt": 3}, {}, "prompt_token_ids"),
    ({"prompt": 5, "prompt_token_ids": [1]}, {}, "a text or a list"),
    ({"prompt": "\ud83d", "prompt_token_ids": [1]}, {}, "prompt must be valid Unicode"),
    ({"prompt_token_ids": "ab"}, {}, "of type str"),
    ({"prompt_token_ids": b"ab"}, {}, "of type bytes"),
    ({"prompt_token_ids": {1, 2}}, {}, "of type set"),
    ({"prompt_token_ids": {1: 2}}, {}, "of type dict"),
    ({"prompt_token_ids": (token_id for token_id in [1])}, {}, "of type generator"),
    ({"prompt_token_ids": np.array([1, 2])}, {}, "of type ndarray; use .tolist"),
    ({"prompt_token_ids": torch.tensor([1, 2])}, {}, "of type Tensor; use .tolist"),
    ([np.int64(1)], {}, "must be integers"),
    ([10**30], {}, "between 0 and 60"),
    ([[1]], {}, "must be integers"),
    ("text", {}, "skip_tokenizer_init"),
    ([1], {"stop": "x"}, "need a tokenizer"),
    ([1], {"bad_words": ["x"]}, "need a tokenizer"),
    ([1], {"stop_token_ids": [61]}, "stop_token_ids"),
    ([1], {"allowed_token_ids": [99]}, "allowed_token_ids"),
    ([1], {"logit_bias": {99: 1.0}}, "logit_bias"),
    ([1], {"logprobs": 62}, "logprobs must be at most"),
    ([1], {"n": 9, "temperature": 1.0}, "max_num_seqs=8, got 9"),
    ([1], {"num_speculative_tokens": 5}, "at most the engine's 4, got 5"),
    ([1] * 20, {"max_tokens": 150}, "do not fit the KV pool of 128"),
]

BAD_OPTIONS = [
    ({"model": "no-such-model-anywhere"}, "no-such-model-anywhere"),
    ({"block_size": 0}, "block_size must be"),
    ({"dtype": "int7"}, "dtype must be"),
    ({"device": "abacus"}, "device must be"),
    ({"num_blocks": 4, "kv_cache_memory": 1000}, "kv_cache_memory must be"),
    ({"kv_cache_memory": 10}, "must hold one block"),
    ({"max_model_len": 10_000}, "max_model_len"),
    ({"attention_backend": "crystal"}, "attention_backend must be"),
    ({"deterministic": "maybe"}, "deterministic must be"),
    ({"deterministic": 1}, "deterministic must be"),
    ({"gpu_memory_utilization": 0}, "gpu_memory_utilization must be a share above 0"),
    ({"gpu_memory_utilization": 1.1}, "gpu_memory_utilization must be a share above 0"),
    ({"gpu_memory_utilization": True}, "gpu_memory_utilization must be a share above 0"),
    ({"enforce_eager": 1}, "enforce_eager must be True or False"),
    ({"max_prefill_slowdown": 1.0}, "max_prefill_slowdown must be None or a number above 1"),
    ({"max_prefill_slowdown": True}, "max_prefill_slowdown must be None or a number above 1"),
    ({"multi_step": 33}, "multi_step must be None or an integer in 1..32"),
    ({"multi_step": True}, "multi_step must be None or an integer in 1..32"),
    ({"multi_step": 2}, "multi_step must be None or 1 where no CUDA graphs run, got 2"),
    ({"tokenizer": 3}, "tokenizer must be"),
    ({"seed": True}, "seed must be"),
    ({"model": None}, "LLM needs the option .model."),
    ({"speculative": {"method": "ngram", "prompt_lookup_min": True}}, "prompt_lookup_min must be"),
    ({"max_batch": 3}, "unknown option of LLM .max_batch."),
    ({"speculative": 7}, "speculative must be"),
    ({"speculative": {"model": "x"}}, "needs a 'method'"),
    ({"speculative": "telepathy"}, "must be one of"),
    ({"speculative": {"method": "ngram", "gamma": 4}}, "unknown option"),
    ({"speculative": {"method": "ngram", "prompt_lookup_min": 5}}, "prompt_lookup_min"),
    ({"speculative": {"method": "ngram", "num_speculative_tokens": 0}}, "num_speculative_tokens"),
    ({"speculative": {"method": "ngram", "acceptance": "typical"}}, "acceptance must be"),
    ({"speculative": "draft_model"}, "needs the draft model"),
    ({"speculative": {"method": "ngram", "model": "x"}}, "has no model"),
    ({"speculative": {"method": "ngram", "options": 3}}, "options must be"),
    ({"speculative": {"method": "draft_model", "model": 5}}, "model must be"),
    ({"speculative": {"method": "ngram", "adaptive": "yes"}}, "adaptive must be"),
    ({"enable_prefix_caching": "no"}, "enable_prefix_caching must be"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_PARAMS)
def test_sampling_params_refuse(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)


@pytest.fixture(scope="module")
def engine(models: Any) -> Any:
    settings = {"method": "ngram", "num_speculative_tokens": 4}
    return make_llm(models.target, settings, num_blocks=8, max_num_seqs=8)


@pytest.mark.parametrize(("prompt", "settings", "message"), BAD_REQUESTS)
def test_admission_refuses_and_nothing_changes(
    prompt: Any, settings: dict[str, Any], message: str, engine: LLM
) -> None:
    if isinstance(prompt, list):
        prompt = {"prompt_token_ids": prompt}
    with pytest.raises(ValueError, match=message):
        engine.generate([prompt], SamplingParams(**{"max_tokens": 4, **settings}), use_tqdm=False)
    assert not engine.engine.has_unfinished_requests
    assert not engine.engine.scheduler.has_unfinished
    assert engine.engine.manager.num_free_blocks == 8


def test_one_bad_prompt_among_many_runs_none_of_them(engine: LLM) -> None:
    before = engine.stats()["num_steps"]
    with pytest.raises(ValueError, match="got 61"):
        engine.generate([{"prompt_token_ids": [1]}, {"prompt_token_ids": [61]}], use_tqdm=False)
    assert engine.stats()["num_steps"] == before
    assert len(run(engine, [[1]], SamplingParams(max_tokens=2)).tokens) == 1


def test_a_request_id_is_used_once(engine: LLM) -> None:
    engine.engine.add_request([1], SamplingParams(max_tokens=2), request_id="duplicate")
    with pytest.raises(ValueError, match="'duplicate' is in use"):
        engine.engine.add_request([1], SamplingParams(max_tokens=2), request_id="duplicate")
    engine.engine.abort("duplicate")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "got None"),
        (5, "got 5"),
        (b"abc", "of type bytes"),
        ({1, 2}, "of type set"),
        (iter([[1]]), "of type list_iterator"),
        (np.array([1, 2]), "of type ndarray; use .tolist"),
        (torch.tensor([[1, 2]]), "of type Tensor; use .tolist"),
        ([np.array([1, 2])], "of type ndarray; use .tolist"),
        ([True], "got True"),
    ],
)
def test_prompts_are_a_prompt_or_a_list(prompts: Any, message: str, engine: LLM) -> None:
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts, use_tqdm=False)


@pytest.mark.parametrize("request_id", ["", 5, ["a"], "\ud83d"])
def test_a_request_id_is_a_text(request_id: Any, engine: LLM) -> None:
    with pytest.raises(ValueError, match="request_id must be"):
        engine.engine.add_request([1], request_id=request_id)


def test_the_bad_prompt_of_a_batch_is_named(engine: LLM) -> None:
    with pytest.raises(ValueError, match=r"prompts\[1\]: prompt token ids"):
        engine.generate([[1], [61], [2]], use_tqdm=False)


@pytest.mark.parametrize("params", [{"temperature": 0}, 5, [SamplingParams(), None]])
def test_params_are_sampling_params(params: Any, engine: LLM) -> None:
    with pytest.raises(ValueError, match="sampling_params must be|need one SamplingParams"):
        engine.generate([[1], [2], [3]], params, use_tqdm=False)


def test_lists_that_change_after_their_check_change_nothing() -> None:
    stops, bias = [1], {1: 1.0}
    params = SamplingParams(stop_token_ids=stops, allowed_token_ids=stops, logit_bias=bias)
    stops.append(10**6)
    bias[10**6] = 1.0
    assert params == SamplingParams(stop_token_ids=[1], allowed_token_ids=[1], logit_bias={1: 1.0})


def test_an_error_shows_the_beginning_of_a_long_value() -> None:
    with pytest.raises(ValueError, match=r"got \(0, 1") as caught:
        SamplingParams(stop_token_ids=[*range(100_000), "x"])
    assert len(str(caught.value)) < 300


def test_none_stands_for_no_stops() -> None:
    assert SamplingParams(stop=None) == SamplingParams()


def test_as_many_params_as_prompts_or_one(engine: LLM) -> None:
    with pytest.raises(ValueError, match="got 3"):
        engine.generate([[1], [2]], [SamplingParams()] * 3, use_tqdm=False)


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_an_engine_refuses(options: dict[str, Any], message: str, models: Any) -> None:
    with pytest.raises(ValueError, match=message):
        make_llm(**{"model": models.target, **options})


def test_a_draft_model_with_another_vocabulary_is_refused(models: Any, tmp_path: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.VOCAB_SIZE", 67)
        other = save_tiny_llama(tmp_path / "wider", layers=1, hidden=16, seed=3)
    with pytest.raises(ValueError, match="another vocabulary"):
        make_llm(models.target, {"method": "draft_model", "model": other})


def test_a_prompt_without_chunked_prefill_must_fit_one_step(models: Any) -> None:
    llm = make_llm(models.target, enable_chunked_prefill=False, max_num_batched_tokens=8)
    with pytest.raises(ValueError, match="max_num_batched_tokens=8"):
        llm.generate([{"prompt_token_ids": [1] * 9}], use_tqdm=False)


def test_speculative_configs_read_every_form() -> None:
    assert SpeculativeConfig.of(None) is None
    ngram = SpeculativeConfig(drafters=(DrafterConfig(method="ngram"),))
    for same in ("ngram", ["ngram"], {"method": "ngram"}, {"drafters": ["ngram"]}):
        assert SpeculativeConfig.of(same) == ngram
    settings = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 6}
    config = SpeculativeConfig.of(settings)
    assert config is not None
    assert config.drafters[0].num_speculative_tokens == 3
    assert config.drafters[0].options == {"prompt_lookup_max": 6}
    assert SpeculativeConfig.of(config) is config
