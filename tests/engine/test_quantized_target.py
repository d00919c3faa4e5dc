"""A quantized target keeps the promise: speculative output is its own plain output."""

from __future__ import annotations

from typing import Any

import pytest
from harness import Run, assert_speculated, make_llm, run, trusting

from folospec import LLM, EngineConfig
from folospec.kernels import native
from folospec.models.decoder import Decoder
from folospec.spec import verify_rows

DRAFTERS: dict[str, Any] = {
    "draft_model": {"method": "draft_model", "num_speculative_tokens": 3},
    "a tree": {"method": "draft_model", "tree": [2, 2]},
    "layer_skip": {"method": "layer_skip", "num_speculative_tokens": 3, "skip_mlp": [1]},
}


def make(models: Any, drafter: str | None = None, **options: Any) -> LLM:
    """float32, and row at a time: torch's products leave near ties otherwise."""
    speculative = None if drafter is None else dict(DRAFTERS[drafter])
    if speculative and speculative["method"] == "draft_model":
        speculative["model"] = models.near
    settings = {"dtype": "float32", "deterministic": True, "quantization": "int8", **options}
    return make_llm(models.target, speculative, **settings)


@pytest.fixture(scope="module")
def plain(models: Any) -> Run:
    return run(make(models))


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_speculative_output_is_plain_output(drafter: str, models: Any, plain: Run) -> None:
    result = run(make(models, drafter))
    assert result.tokens == plain.tokens
    assert result.logprobs == plain.logprobs
    assert_speculated(result.stats)
    assert result.stats["lossless"] == "bitwise"
    assert result.stats["quantization"] == "int8"


def test_a_wrong_rule_is_noticed(models: Any, plain: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: None)  # it has rules of its own
    assert run(make(models, "draft_model")).tokens == plain.tokens
    monkeypatch.setattr(verify_rows, "verify_coupled", trusting)
    assert run(make(models, "draft_model")).tokens != plain.tokens


def test_verifying_with_weights_that_are_not_rounded_is_noticed(models: Any, plain: Run) -> None:
    result = run(make(models, "draft_model", quantization=None))
    assert result.tokens != plain.tokens
    assert result.stats["quantization"] is None


def test_in_batches_the_promise_is_the_path(models: Any, plain: Run) -> None:
    result = run(make(models, "draft_model", deterministic=None))
    assert result.stats["lossless"] == "tokens"
    assert_speculated(result.stats)
    assert result.logprobs[0] == pytest.approx(plain.logprobs[0], abs=1e-4)


def test_the_draft_model_is_quantized_too(models: Any) -> None:
    runners = make(models, "draft_model").engine.components.runners
    found = {}
    for owner, runner in runners.items():
        assert isinstance(runner.model, Decoder)
        found[owner] = runner.model.quantization
    assert len(found) == 2
    assert set(found.values()) == {"int8"}


def test_what_does_not_go_together_is_refused(models: Any) -> None:
    settings = {"dtype": "float32", "quantization": "int8"}
    with pytest.raises(ValueError, match="cannot draft for itself with int8 weights"):
        make_llm(models.target, "quantized", **settings)
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16 with"):
        make_llm(models.target, quantization="int8", dtype="float64")
    with pytest.raises(ValueError, match="'fp8' needs a CUDA device"):
        make_llm(models.target, **{**settings, "quantization": "fp8", "device": "cpu"})
    with pytest.raises(ValueError, match="quantization must be None, int8 or fp8, got 'int4'"):
        EngineConfig(model=models.target, quantization="int4")
