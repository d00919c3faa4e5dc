"""What people know from other engines works, or is refused with the right name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import make_llm
from tqdm import tqdm

from folospec import EngineClosedError, EngineConfig, LLMEngine, SamplingParams

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
    assert [t for delta in llm.stream([1, 2], PARAMS) for t in delta.token_ids] == expected


def test_the_tokenizer_is_given_out(models: Any) -> None:
    llm = make_llm(models.target)
    assert llm.get_tokenizer() is llm.tokenizer is None


def test_speculative_config_is_another_name_for_speculative(models: Any) -> None:
    llm = make_llm(models.target, speculative_config={"method": "ngram"})
    assert [drafter.name for drafter in llm.engine.components.drafters] == ["ngram"]
    with pytest.raises(ValueError, match="are one option of LLM"):
        make_llm(models.target, "ngram", speculative_config="suffix")


def test_prompts_of_token_ids_are_taken_by_their_own_name(models: Any) -> None:
    llm = make_llm(models.target)
    prompts = [[1, 2], [3]]
    expected = [o.outputs[0].token_ids for o in llm.generate(prompts, PARAMS, use_tqdm=False)]
    named: Any = {"prompt_token_ids": prompts, "params": PARAMS, "use_tqdm": False}
    assert [o.outputs[0].token_ids for o in llm.generate(**named)] == expected
    named = {"prompt_token_ids": [1, 2], "params": PARAMS}
    assert [t for delta in llm.stream(**named) for t in delta.token_ids] == expected[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.generate([1], max_tokens=8), "'max_tokens': give it in sampling_params"),
        (lambda llm: llm.generate([1], do_sample=True), "'do_sample': give it in sampling_params"),
        (lambda llm: llm.generate([1], prompt_token_ids=[1]), "prompts and prompt_token_ids are"),
        (lambda llm: llm.generate([1], raise_on_eror=True), "did you mean 'raise_on_error'"),
        (lambda llm: llm.stream([1], temperature=0), "'temperature': give it in sampling_params"),
        (lambda llm: llm.chat([], n=2), "'n': give it in sampling_params"),
        (lambda llm: llm.generate([1], use_tqdm="no"), "use_tqdm must be True, False or a fun"),
    ],
)
def test_options_that_a_call_does_not_have_are_refused(
    call: Any, message: str, models: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        call(make_llm(models.target))


def test_no_prompts_have_no_results(models: Any) -> None:
    assert make_llm(models.target).generate([], use_tqdm=False) == []


def test_a_function_makes_the_progress_bar(models: Any) -> None:
    made: list[dict[str, Any]] = []

    def make_bar(**options: Any) -> Any:
        made.append(options)
        return tqdm(**options, disable=True)

    make_llm(models.target).generate([[1], [2]], PARAMS, use_tqdm=make_bar)
    assert [options["total"] for options in made] == [2]


@pytest.mark.parametrize(("use_tqdm", "is_shown"), [(True, True), (False, False)])
def test_a_progress_bar_is_shown_unless_it_is_turned_off(
    use_tqdm: bool, is_shown: bool, models: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    make_llm(models.target).generate([[1]], PARAMS, use_tqdm=use_tqdm)
    assert ("1/1" in capsys.readouterr().err) is is_shown


def test_a_model_may_be_a_path(models: Any) -> None:
    llm = make_llm(Path(models.target))  # type: ignore[arg-type]
    assert llm.engine.config.model == models.target


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
