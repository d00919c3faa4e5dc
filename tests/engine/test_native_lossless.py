"""The bundled models in float32 and bfloat16 on native kernels, with the default `deterministic`:
speculative output is plain output to the last bit of every logprob, and nothing is excused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Run, assert_speculated, run
from native_builds import breakable, require_native

from folospec import LLM, SamplingParams
from folospec.kernels import native

TEXTS = [
    "def insort(a, x, lo=0, hi=None):\n    ",
    "class Stack:\n    def __init__(self):",
    "import os\nimport sys\n\ndef main(argv=None):",
    "for name in sorted(names):\n    if name.startswith('_'):",
    "import os\nimport sys\n\ndef main(argv=None):\n    args = ",
    "def is_prime(n):\n    if n < 2:\n        return False\n" * 6,
]
DRAFTERS: list[Any] = [
    {"method": "draft_model", "num_speculative_tokens": 5},
    {"method": "ngram", "num_speculative_tokens": 4},
]
TREE = {"method": "draft_model", "tree": [3, 2, 1]}
LIMITS = {
    "as it comes": {},
    "prompts in chunks": {"max_num_batched_tokens": 24, "max_num_seqs": 8},
    "two at a time": {"max_num_seqs": 2},
    "too few blocks": {"num_blocks": 14, "max_num_seqs": 6, "max_model_len": 200},
    "no prefix cache": {"enable_prefix_caching": False},
}


def make(dtype: str, speculative: Any = None, **options: Any) -> LLM:
    settings = {"num_blocks": 256, "strict_drafters": True, "max_model_len": 320, **options}
    return LLM("folospec-demo", speculative, dtype=dtype, **settings)


def generate(llm: LLM) -> Run:
    """Greedy and sampled, in one batch."""
    prompts = [llm.tokenizer.encode(text) for text in TEXTS]
    params = [
        SamplingParams(temperature=t, max_tokens=20, ignore_eos=True, seed=21, logprobs=2)
        for t in (0.0, 0.8, 0.0, 1.0, 0.8, 0.0)
    ]
    return run(llm, prompts, params)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def plain(request) -> tuple[str, Run]:
    require_native()
    llm = make(request.param)
    assert llm.stats()["lossless"] == "bitwise"
    library = native.load()
    assert llm.stats()["native_kernels"] == f"{library.origin}, {library.instructions}"
    return request.param, generate(llm)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("drafter", DRAFTERS, ids=lambda drafter: drafter["method"])
def test_speculative_output_is_plain_output_to_the_last_bit(plain, drafter, limits):
    dtype, expected = plain
    llm = make(dtype, drafter, **LIMITS[limits])
    fast = generate(llm)
    assert_speculated(fast.stats)
    assert fast.stats["lossless"] == "bitwise"
    assert fast.tokens == expected.tokens
    assert fast.logprobs == expected.logprobs
    if limits == "too few blocks":
        assert fast.stats["num_preemptions"] > 0
    if limits == "as it comes":
        again = generate(llm)  # now the prompts are in the prefix cache
        assert again.stats["prefix_cache_hits"] > fast.stats["prefix_cache_hits"]
        assert (again.tokens, again.logprobs) == (expected.tokens, expected.logprobs)


def test_trees_are_lossless_to_the_bit_too(plain):
    dtype, expected = plain
    fast = generate(make(dtype, TREE))
    assert_speculated(fast.stats, moved=True)
    assert (fast.tokens, fast.logprobs) == (expected.tokens, expected.logprobs)


@pytest.mark.parametrize(
    ("dtype", "rule"),
    [
        ("float32", "tiles up to the context"),
        ("float32", "a sum by the number of rows"),
        ("bfloat16", "a sum by the number of rows"),
    ],
)
def test_sums_whose_order_depends_on_the_step_are_seen(monkeypatch, dtype, rule):
    """Control: kernels that are as right, but whose sums depend on what else is in the step."""
    require_native()
    monkeypatch.setattr(native, "load", lambda: breakable().library)
    with breakable().without(rule):
        expected, fast = generate(make(dtype)), generate(make(dtype, DRAFTERS[0]))
    assert_speculated(fast.stats)
    assert fast.logprobs != expected.logprobs


def test_demanding_it_changes_nothing(plain):
    dtype, expected = plain
    llm = make(dtype, deterministic=True)
    assert llm.stats()["lossless"] == "bitwise"
    assert generate(llm).logprobs == expected.logprobs


def test_threads_change_nothing(plain):
    dtype, expected = plain
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        llm = make(dtype, DRAFTERS[1])
        prompts = [llm.tokenizer.encode(text) for text in TEXTS[:2]]
        params = [
            SamplingParams(temperature=t, max_tokens=8, ignore_eos=True, seed=21, logprobs=2)
            for t in (0.0, 0.8)
        ]
        fast = run(llm, prompts, params)
    finally:
        torch.set_num_threads(before)
    for own, long in zip(fast.outputs, expected.outputs[:2], strict=True):
        assert own.outputs[0].token_ids == long.outputs[0].token_ids[:8]
        assert own.outputs[0].logprobs == long.outputs[0].logprobs[:8]
