"""Both ways from logits to tokens are one: drawn natively in one call, or through the
distribution."""

from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
from harness import OracleTreeDrafter, assert_speculated, futures_of, make_llm, mixed_params, run

from folospec import SamplingParams
from folospec.kernels import native_sampling
from folospec.spec import verify_batch

NEG_INF = float("-inf")


@pytest.fixture(autouse=True)
def _needs_native() -> None:
    if native_sampling.load() is None:
        pytest.skip("there are no native kernels here")


def run_both(monkeypatch: pytest.MonkeyPatch, model: str, **settings: Any) -> tuple[Any, Any, int]:
    """The same run drawn natively and by torch, and how many steps were drawn natively."""
    params = settings.pop("params", None)
    calls = []
    take_paths = verify_batch.take_paths

    def counted(*args: Any) -> None:
        calls.append(1)
        take_paths(*args)

    with monkeypatch.context() as patch:
        patch.setattr(verify_batch, "take_paths", counted)
        native = run(make_llm(model, dtype="float32", **settings), params=params)
    num_native = len(calls)
    with monkeypatch.context() as patch:
        patch.setattr(native_sampling, "load", lambda: None)
        distribution = run(make_llm(model, dtype="float32", **settings), params=params)
    return native, distribution, num_native


def test_plain_tokens_are_the_same(monkeypatch: pytest.MonkeyPatch, models: Any) -> None:
    """Greedy and sampled, filters, penalties, bias, siblings, min_tokens, side by side."""
    native, distribution, num_native = run_both(monkeypatch, models.target)
    assert native.tokens == distribution.tokens
    assert num_native > 10
    assert distribution.stats["num_steps"] == native.stats["num_steps"]


def test_tokens_of_trees_are_the_same(monkeypatch: pytest.MonkeyPatch, models: Any) -> None:
    plain = run(make_llm(models.target, dtype="float32"))
    monkeypatch.setattr(OracleTreeDrafter, "futures", futures_of(plain))
    speculative = {"method": "oracle_tree", "num_speculative_tokens": 12}
    native, distribution, num_native = run_both(monkeypatch, models.target, speculative=speculative)
    assert num_native > 3
    assert native.tokens == distribution.tokens == plain.tokens
    assert_speculated(native.stats, moved=True)
    assert native.stats["num_accepted_tokens"] == distribution.stats["num_accepted_tokens"]


def test_processed_logprobs_are_those_of_the_distribution_that_was_drawn_from(models: Any) -> None:
    params = SamplingParams(temperature=0.7, top_k=5, seed=3, logprobs=3, max_tokens=8)
    raw, processed = (
        run(make_llm(models.target, dtype="float32", logprobs_mode=mode), params=params)
        for mode in ("raw_logprobs", "processed_logprobs")
    )
    assert raw.tokens == processed.tokens
    assert raw.logprobs != processed.logprobs


def test_a_request_without_a_token_ends_alone(monkeypatch: pytest.MonkeyPatch, models: Any) -> None:
    """The third output token of one request is impossible, among constrained and free neighbours;
    the drafts above that place are verified before, and are no error."""

    def nothing_third(output_token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, NEG_INF) if len(output_token_ids) == 2 else logits

    params = mixed_params()
    params[4] = SamplingParams(temperature=0, max_tokens=9, logits_processors=[nothing_third])
    for speculative in (None, "ngram"):
        native, distribution, num_native = run_both(
            monkeypatch, models.target, speculative=speculative, params=params
        )
        assert num_native > 0
        assert native.tokens == distribution.tokens
        failed = native.outputs[4].outputs[0]
        assert failed.finish_reason == "error"
        assert len(failed.token_ids) == 2
        assert "must leave a token possible" in failed.error
        assert failed.error == distribution.outputs[4].outputs[0].error
        others = [o for i, o in enumerate(native.outputs) if i != 4]
        assert all(c.finish_reason == "length" for o in others for c in o.outputs)


def test_a_broken_processor_is_named_and_ends_its_request_alone(
    monkeypatch: pytest.MonkeyPatch, models: Any
) -> None:
    def broken(output_token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        return logits[:3]

    params = [SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)] * len(harness.PROMPTS)
    params[3] = SamplingParams(temperature=0, max_tokens=6, logits_processors=[broken])
    native, distribution, _ = run_both(monkeypatch, models.target, params=params)
    assert native.tokens == distribution.tokens
    assert [o.outputs[0].finish_reason for o in native.outputs].count("error") == 1
    assert "logits_processors[0] failed" in native.outputs[3].outputs[0].error
