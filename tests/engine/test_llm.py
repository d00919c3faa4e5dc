"""What people know from other engines works, or is refused with the right name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import make_llm

from folospec import LLM, EngineClosedError, EngineConfig, LLMEngine, SamplingParams

PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def test_a_closed_llm_runs_nothing_any_more(models: Any) -> None:
    with make_llm(models.target) as llm:
        llm.engine.add_request([1, 2], PARAMS)
        assert len(llm.generate([[1, 2]], PARAMS, use_tqdm=False)) == 1
    for call in (
        lambda: llm.generate([[1, 2]], PARAMS, use_tqdm=False),
        lambda: llm.engine.add_request([1, 2]),
        lambda: next(llm.stream([1, 2])),
    ):
        with pytest.raises(EngineClosedError, match="the engine is closed"):
            call()
    assert llm.stats()["num_steps"] > 0
    assert llm.engine.manager.num_free_blocks == llm.engine.manager.num_blocks
    llm.close()


def test_a_stream_of_an_llm_has_the_tokens_of_generate(models: Any) -> None:
    llm = make_llm(models.target, "ngram")
    expected = llm.generate([[1, 2]], PARAMS, use_tqdm=False)[0].outputs[0].token_ids
    assert [t for increment in llm.stream([1, 2], PARAMS) for t in increment.token_ids] == expected


def test_the_tokenizer_is_given_out(models: Any) -> None:
    llm = make_llm(models.target)
    assert llm.get_tokenizer() is llm.tokenizer is None


def test_speculative_config_is_another_name_for_speculative(models: Any) -> None:
    llm = make_llm(models.target, speculative_config={"method": "ngram"})
    assert [drafter.name for drafter in llm.engine.parts.drafters] == ["ngram"]
    with pytest.raises(ValueError, match="one option, give one of them"):
        make_llm(models.target, "ngram", speculative_config="suffix")


def test_an_unknown_option_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'max_num_seqs'"):
        LLM("folospec-demo", max_num_seq=3)


def test_an_llm_shows_its_model_and_drafters(models: Any) -> None:
    assert repr(make_llm(models.target, "ngram")) == (
        f"LLM({models.target!r}, speculative=['ngram'])"
    )


@pytest.mark.parametrize("dtype", [torch.float16, "half", "fp16", "float16", "torch.float16"])
def test_a_dtype_has_several_names(dtype: Any) -> None:
    config = EngineConfig(model="m", dtype=dtype)
    assert config.dtype == "float16"
    with pytest.raises(ValueError, match="dtype must be one of .*, got 'int8'"):
        EngineConfig(model="m", dtype=torch.int8)


def test_an_engine_is_made_from_the_name_of_a_model() -> None:
    assert LLMEngine("folospec-demo").config == EngineConfig(model="folospec-demo")
    with pytest.raises(ValueError, match="model must be"):
        LLMEngine(None)
