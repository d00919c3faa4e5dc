"""Every method of the table, by name, on the bundled models: drafts are made, some are accepted,
some are rejected, and the tokens are those of plain decoding."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import harness
import pytest
from harness import assert_speculated

from folospec import LLM, RequestOutput, SamplingParams
from folospec.models.loader import load_tokenizer
from folospec.spec import drafters, verify_rows
from folospec.spec.drafters.base import known_drafters

CODE = """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        return self.items.pop()


class Queue:
    def __init__(self):
        self.items = []

    def push(self, item):"""
PROMPTS = [
    CODE,
    "import os\nimport sys\nimport json\nimport random\nimport",
    "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n\n\ndef mul(a, b):",
    "x = [1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2,",
]
PREDICTION = """
        self.items.append(item)

    def pop(self):
        return self.items.pop(0)
"""
DRAFT = {"method": "draft_model"}

METHODS: dict[str, Any] = {
    "ngram": "ngram",
    "ngram, several matches": {"method": "ngram", "num_matches": 3, "num_speculative_tokens": 12},
    "suffix": "suffix",
    "suffix, chain": {"method": "suffix", "tree": False},
    "nasd": {"method": "nasd", "filler_top_k": 3},
    "nasd, one level": {"method": "nasd", "store": "one_level"},
    "nasd, entropy-gated": {"method": "nasd", "egag": True},
    "nasd as anpd": {"method": "nasd", "filler_top_k": 1},
    "token_recycling": "token_recycling",
    "lookahead": "lookahead",
    "prediction": "prediction",
    "draft_model": DRAFT,
    "draft_model, expansion": {**DRAFT, "tree": [3, 2, 1]},
    "draft_model, sequoia": {**DRAFT, "tree": "sequoia"},
    "draft_model, dynamic": {**DRAFT, "tree": "dynamic"},
    "draft_model, top k": {**DRAFT, "tree": [3, 2], "children": "top_k"},
    "draft_model, i.i.d.": {**DRAFT, "tree": [3, 2], "children": "iid"},
    "draft_model, without replacement": {
        **DRAFT,
        "tree": [3, 2],
        "children": "without_replacement",
    },
    "two draft models, merged": {
        "drafters": [{**DRAFT, "tree": [2, 1]}, {**DRAFT, "model": "folospec-demo", "tree": [1]}],
        "merge": True,
    },
    "ouroboros": "ouroboros",
    "quantized": "quantized",
    "quantized, tree": {"method": "quantized", "tree": [2, 1, 1]},
    "layer_skip": "layer_skip",
    "layer_skip, skip set": {"method": "layer_skip", "skip_attention": [3, 4], "skip_mlp": [4]},
    "in order of precedence": ["suffix", "prediction", "draft_model"],
    "merged": {"drafters": ["suffix", {**DRAFT, "tree": "dynamic"}, "ngram"], "merge": True},
}
NOT_UNDER_REJECTION = {"draft_model, dynamic", "merged"}
"""Those that choose among drawn tokens, which a ratio rule forbids."""
ALMOST_NEVER_WRONG = {"quantized"}
"""Its chains may all be accepted in so short a run; what is wrong is seen in `test_self_drafts`."""
CHAINS = ["ngram", "suffix, chain", "nasd", "draft_model", "quantized", "layer_skip", "ouroboros"]


def params() -> list[SamplingParams]:
    """Greedy and sampled requests, of which one says what it expects."""
    common: dict[str, Any] = {"max_tokens": 16, "ignore_eos": True}
    return [
        SamplingParams(temperature=0, **common),
        SamplingParams(temperature=0.8, seed=1, **common),
        SamplingParams(temperature=0, repetition_penalty=1.1, **common),
        SamplingParams(temperature=0.6, top_p=0.9, seed=2, n=2, **common),
    ]


@cache
def token_ids_of(text: str) -> list[int]:
    """Read here once, so that no engine has to load a tokenizer."""
    return tokenizer().encode(text)


@cache
def tokenizer() -> Any:
    return load_tokenizer("folospec-demo")


def expecting(requests: list[SamplingParams]) -> list[SamplingParams]:
    prediction = token_ids_of(PREDICTION)
    return [replace(request, prediction=prediction) for request in requests]


def tokens_of(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def run(
    speculative: Any, requests: list[SamplingParams] | None = None, **options: Any
) -> tuple[list[list[list[int]]], dict[str, Any]]:
    settings = {
        "dtype": "float64",
        "skip_tokenizer_init": True,
        "strict_drafters": True,
        "num_blocks": 64,
    }
    llm = LLM("folospec-demo", speculative=speculative, **{**settings, **options})
    requests = requests or params()
    if llm.engine.proposer.needs.prediction:
        requests = expecting(requests)
    prompts = [token_ids_of(prompt) for prompt in PROMPTS]
    outputs = llm.generate(prompts, requests, use_tqdm=False)
    return tokens_of(outputs), llm.stats()


@pytest.fixture(scope="module")
def plain() -> list[list[list[int]]]:
    return run(None)[0]


def as_mapping(settings: Any) -> dict[str, Any]:
    if isinstance(settings, str):
        return {"method": settings}
    return {"drafters": settings} if isinstance(settings, list) else dict(settings)


def test_the_table_names_every_drafter_that_comes_with_folospec() -> None:
    used = {
        drafter if isinstance(drafter, str) else drafter["method"]
        for settings in METHODS.values()
        for drafter in as_mapping(settings).get("drafters", [settings])
    }
    folder = Path(drafters.__file__).parent
    assert used == {name for name in known_drafters() if (folder / f"{name}.py").is_file()}


@pytest.mark.parametrize("method", METHODS)
def test_tokens_are_those_of_plain_decoding(method: str, plain: Any) -> None:
    tokens, stats = run(METHODS[method])
    assert tokens == plain
    assert_speculated(stats, rejected=method not in ALMOST_NEVER_WRONG)


@pytest.mark.parametrize("method", sorted(set(METHODS) - NOT_UNDER_REJECTION))
def test_greedy_tokens_are_those_of_plain_decoding_under_rejection(method: str, plain: Any) -> None:
    tokens, stats = run({**as_mapping(METHODS[method]), "acceptance": "rejection"})
    for request, found, expected in zip(params(), tokens, plain, strict=True):
        if request.greedy:
            assert found == expected
    assert_speculated(stats, rejected=method not in ALMOST_NEVER_WRONG)


@pytest.mark.parametrize("method", CHAINS)
def test_chains_are_verified_by_block_verification_too(method: str, plain: Any) -> None:
    tokens, stats = run({**as_mapping(METHODS[method]), "acceptance": "block"})
    assert tokens[0] == plain[0]
    assert_speculated(stats, rejected=method not in ALMOST_NEVER_WRONG)


@pytest.mark.parametrize("method", METHODS)
def test_stops_end_the_output_in_a_full_pool_as_they_do_plainly(method: str, plain: Any) -> None:
    """Blocks are so few that drafts are shed and sequences preempted, and an output ends wherever a
    stop token is, inside an accepted draft or not."""
    latest = [max(tokens[:12], key=tokens.index) for tokens, *_ in plain]
    stops = [[token] for token in latest]
    requests = [replace(r, stop_token_ids=stop) for r, stop in zip(params(), stops, strict=True)]
    expected = [
        [tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens in completions]
        for completions, stop in zip(plain, latest, strict=True)
    ]
    assert expected != plain
    tokens, stats = run(METHODS[method], requests, num_blocks=22, block_size=8)
    assert tokens == expected
    assert stats["num_preemptions"] > 0
    assert_speculated(stats, rejected=False)


def test_a_method_whose_drafts_are_estimated_unseen_is_noticed(
    plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control of the tests above."""

    monkeypatch.setattr(verify_rows, "verify_coupled", harness.trusting)
    for method in ("ngram", "token_recycling", "draft_model", "layer_skip"):
        assert run(METHODS[method])[0] != plain
