"""The KV may have another type than the model: less memory, other logits, and the same promise."""

from __future__ import annotations

from typing import Any

import pytest
from harness import Run, assert_speculated, make_llm, mixed_params, run

TARGET = "folospec-demo"
PROMPTS = [list(range(start, start + 40)) for start in range(300, 900, 100)]
DRAFTERS: dict[str, Any] = {
    "draft_model": {"method": "draft_model", "num_speculative_tokens": 3},
    "a tree": {"method": "draft_model", "tree": [2, 2]},
    "quantized": {"method": "quantized", "num_speculative_tokens": 3},
}


def run_with(kv_cache_dtype: str, drafter: Any = None, **options: Any) -> Run:
    settings = {"dtype": "float32", "kv_cache_dtype": kv_cache_dtype, "num_blocks": 400}
    llm = make_llm(TARGET, drafter, **{**settings, **options})
    return run(llm, PROMPTS, mixed_params(16))


@pytest.fixture(scope="module")
def plain() -> Run:
    return run_with("bfloat16", deterministic=True)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_speculative_tokens_equal_plain_tokens_with_narrow_kv(drafter: str, plain: Run) -> None:
    result = run_with("bfloat16", DRAFTERS[drafter], deterministic=True)
    assert result.tokens == plain.tokens
    assert result.logprobs == plain.logprobs
    assert_speculated(result.stats)


def test_the_type_of_the_kv_changes_logits_and_halves_bytes(plain: Run) -> None:
    """Control: with the KV in float32 the test above would see it."""
    wide = run_with("float32", deterministic=True)
    assert wide.logprobs != plain.logprobs
    assert wide.stats["kv_cache_bytes"] == 2 * plain.stats["kv_cache_bytes"]
    assert run_with("auto", deterministic=True).logprobs == wide.logprobs


def test_memory_holds_twice_as_many_blocks_of_narrow_kv() -> None:
    blocks = {
        dtype: make_llm(
            TARGET, dtype="float32", kv_cache_dtype=dtype, kv_cache_memory=1 << 22
        ).stats()["num_blocks"]
        for dtype in ("float32", "bfloat16")
    }
    assert blocks["bfloat16"] == pytest.approx(2 * blocks["float32"], abs=1)


def test_the_torch_backend_serves_narrow_kv_too(plain: Run) -> None:
    result = run_with("bfloat16", attention_backend="torch")
    assert result.logprobs[0] == pytest.approx(plain.logprobs[0], abs=2e-2)
    assert result.stats["kv_cache_bytes"] == plain.stats["kv_cache_bytes"]


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(ValueError, match="kv_cache_dtype must be one of auto, float32, bfloat16"):
        make_llm(TARGET, kv_cache_dtype="int4")
