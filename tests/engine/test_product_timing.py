"""With `deterministic=False` timings choose whose products large passes of the target take, and
the tokens stay; without it no timing changes a bit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from harness import Run, assert_speculated, run
from native_builds import require_native

from folospec import LLM, SamplingParams
from folospec.models import decoder
from folospec.models.native_decoder import NativeDecoder
from folospec.worker import product_timing
from folospec.worker.model_runner import ModelRunner
from folospec.worker.product_timing import ROW_COUNTS, first_worthwhile, measure

TEXTS = [
    "def is_prime(n):\n    if n < 2:\n        return False\n" * 6,
    "import os\nimport sys\n\ndef main(argv=None):\n    args = " * 4,
    "class Stack:\n    def __init__(self):\n        self.items = []\n" * 4,
    "def is_prime(n):\n    if n < 2:\n        return False\n" * 5 + "for",
]
SLOW, FAST = {64: 2.0, 128: 4.0}, {64: 1.0, 128: 2.0}
TIMINGS = {"torch wins": (SLOW, FAST), "torch loses": (FAST, SLOW)}
DRAFTERS: list[Any] = [
    {"method": "draft_model", "num_speculative_tokens": 5},
    {"method": "layer_skip", "num_speculative_tokens": 4, "exit_layer": 2},
    {"method": "ngram", "num_speculative_tokens": 4},
]
LIMITS = {
    "as it comes": {},
    "prompts in chunks": {"max_num_batched_tokens": 70, "max_num_seqs": 4},
    "too few blocks": {"block_size": 4, "num_blocks": 66, "max_num_seqs": 4, "max_model_len": 160},
}
NEAR_TIE = 1e-2
"""Of two logprobs: far more than rounding in float32 moves a logit of the bundled model."""


@dataclass
class Used:
    """Which decoder ran how many rows natively, and the rows of every linear that torch ran."""

    native: list[tuple[Any, int]] = field(default_factory=list)
    torch: list[int] = field(default_factory=list)

    def native_rows(self, llm: LLM, *, by_target: bool = True) -> list[int]:
        """Of the target, or of the models that draft for it."""
        parts = llm.engine.components
        models = [r.model for r in parts.all_runners if (r is parts.target) == by_target]
        return [rows for one, rows in self.native if any(one is model for model in models)]


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Used:
    require_native()
    used = Used()
    linear, forward = decoder.linear, NativeDecoder.forward

    def seen_linear(x: Any, *rest: Any) -> Any:
        used.torch.append(len(x))
        return linear(x, *rest)

    def seen_forward(self: NativeDecoder, input_ids: Any, *rest: Any) -> Any:
        used.native.append((self.decoder, len(input_ids)))
        return forward(self, input_ids, *rest)

    monkeypatch.setattr(decoder, "linear", seen_linear)
    monkeypatch.setattr(NativeDecoder, "forward", seen_forward)
    return used


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    require_native()  # from the cache that other tests have
    monkeypatch.setenv("FOLOSPEC_CACHE_DIR", str(tmp_path))
    return tmp_path / "step_costs"


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what is measured, and counts how often it is."""

    def set_timings(name: str) -> list[Any]:
        calls: list[Any] = []

        def measured(*args: Any) -> Any:
            calls.append(args)
            return TIMINGS[name]

        monkeypatch.setattr(product_timing, "measure", measured)
        return calls

    return set_timings


def make(speculative: Any = None, dtype: str = "float32", **options: Any) -> LLM:
    settings = {"num_blocks": 256, "max_model_len": 384, "strict_drafters": True, **options}
    return LLM("folospec-demo", speculative, dtype=dtype, **settings)


def generate(llm: LLM, temperature: float = 0.0) -> Run:
    prompts = [llm.tokenizer.encode(text) for text in TEXTS]
    return run(
        llm,
        prompts,
        SamplingParams(
            temperature=temperature, max_tokens=24, ignore_eos=True, seed=21, logprobs=2
        ),
    )


def agreeing_tokens(plain: Run, other: Run) -> int:
    """How many tokens are equal before the first near tie of each output; all of them must be."""
    count = 0
    for expected, found in zip(plain.outputs, other.outputs, strict=True):
        wanted, got = expected.outputs[0], found.outputs[0]
        for token, own, logprobs in zip(
            wanted.token_ids, got.token_ids, wanted.logprobs or [], strict=True
        ):
            best, second = sorted((e.logprob for e in logprobs.values()), reverse=True)[:2]
            if best - second < NEAR_TIE:
                break
            assert own == token
            count += 1
    return count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_the_waiver_no_timing_changes_a_bit(used: Used, timed: Any, dtype: str) -> None:
    bits = []
    for name in TIMINGS:
        calls = timed(name)
        for wanted in (None, True):
            llm = make(dtype=dtype, deterministic=wanted)
            bits.append(generate(llm, temperature=0.8).logprobs)
            assert llm.stats()["lossless"] == "bitwise"
            assert llm.stats()["torch_products_from"] is None
            assert max(used.native_rows(llm)) >= 64, "timings could have moved this pass"
        assert not calls
    assert all(each == bits[0] for each in bits)
    assert not used.torch


def test_with_the_waiver_timings_choose_the_products(used: Used, timed: Any) -> None:
    """Control of the test above: the same timings do choose, once they may."""
    timed("torch wins")
    llm = make(deterministic=False)
    generate(llm)
    assert llm.stats()["torch_products_from"] == 64
    assert min(used.torch) >= 64
    assert 0 < max(used.native_rows(llm)) < 64


def test_where_torch_loses_the_waiver_changes_no_bit_and_promises_none(
    used: Used, timed: Any
) -> None:
    timed("torch loses")
    llm = make(deterministic=False, seed=1)
    waived = generate(llm, temperature=0.8)
    assert waived.stats["torch_products_from"] is None
    assert waived.stats["lossless"] == "tokens"
    assert not used.torch
    assert waived.logprobs == generate(make(), temperature=0.8).logprobs


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("drafter", DRAFTERS, ids=lambda drafter: drafter["method"])
def test_tokens_are_those_of_native_products(
    used: Used, timed: Any, drafter: Any, limits: str
) -> None:
    plain = generate(make())
    assert not used.torch
    timed("torch wins")
    llm = make(drafter, deterministic=False, **LIMITS[limits])
    fast = generate(llm)
    assert_speculated(fast.stats)
    assert fast.stats["lossless"] == "tokens"
    assert min(used.torch) >= 64
    assert 0 < max(used.native_rows(llm)) < 64
    if drafter["method"] == "draft_model":
        assert max(used.native_rows(llm, by_target=False)) >= 64, "a drafter's passes stay native"
    if drafter["method"] == "layer_skip":
        assert used.native_rows(llm, by_target=False)
    assert agreeing_tokens(plain, fast) > 48
    if limits == "too few blocks":
        assert fast.stats["num_preemptions"] > 0
    if limits == "prompts in chunks":
        assert max(used.torch) <= 70
        again = generate(llm)
        assert again.stats["prefix_cache_hits"] > fast.stats["prefix_cache_hits"]
        assert agreeing_tokens(plain, again) > 48


def test_products_that_are_wrong_are_seen(
    used: Used, timed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: passes of torch whose keys and queries are not rotated."""
    plain = generate(make())
    timed("torch wins")
    monkeypatch.setattr(decoder, "rotary", lambda x, *_: x)
    wrong = generate(make(DRAFTERS[0], deterministic=False))
    assert used.torch
    with pytest.raises(AssertionError):
        agreeing_tokens(plain, wrong)


def test_a_choice_is_kept(timed: Any, cache: Path) -> None:
    calls = timed("torch wins")
    first = make(deterministic=False)
    assert len(list(cache.iterdir())) == 2
    timed("torch loses")
    second = make(deterministic=False)
    assert len(calls) == 1
    for llm in (first, second):
        assert llm.stats()["torch_products_from"] == 64
    other = make(deterministic=False, dtype="bfloat16")
    assert other.stats()["torch_products_from"] is None


def test_nothing_is_measured_where_the_target_does_not_run_natively(timed: Any) -> None:
    calls = timed("torch wins")
    llm = make(deterministic=False, attention_backend="torch")
    assert not calls
    assert llm.stats()["torch_products_from"] is None


@pytest.mark.parametrize(
    ("native", "stock", "expected"),
    [
        ({64: 2.0, 128: 4.0}, {64: 1.0, 128: 2.0}, 64),
        ({64: 1.0, 128: 4.0}, {64: 2.0, 128: 2.0}, 128),
        ({64: 2.0, 128: 2.0}, {64: 1.0, 128: 4.0}, None),
        ({64: 1.0}, {64: 0.99}, None),
        ({}, {}, None),
    ],
)
def test_torch_must_win_by_enough_there_and_at_every_larger_count(
    native: Any, stock: Any, expected: int | None
) -> None:
    assert first_worthwhile(native, stock) == expected


class Clock:
    """Moves on by what a pass costs, whose kind and size it notes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost: Any) -> None:
        self.now = 0.0
        self.passes: list[tuple[int, bool]] = []

        def forward(runner: Any, batch: Any) -> None:
            rows = sum(each.num_run for each in batch)
            least = runner.model.torch_products_from
            self.passes.append((rows, least is not None and rows >= least))
            self.now += cost(*self.passes[-1], len(self.passes))

        monkeypatch.setattr(ModelRunner, "forward", forward)

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def target() -> ModelRunner:
    return make(num_blocks=64).engine.components.target


def test_products_are_timed_in_turns_and_an_odd_pass_is_no_matter(
    target: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cost(rows: int, is_stock: bool, number: int) -> float:
        return 0.5 if number < 4 else rows * (1e-4 if is_stock else 2e-4)

    clock = Clock(monkeypatch, cost)
    native, stock = measure(target, 16, 64, clock)
    fitting = [count for count in ROW_COUNTS if count <= 384]
    assert list(native) == list(stock) == fitting
    assert native == pytest.approx({count: count * 2e-4 for count in fitting})
    assert stock == pytest.approx({count: count * 1e-4 for count in fitting})
    assert [is_stock for _, is_stock in clock.passes] == [False, True] * (len(clock.passes) // 2)
    assert target.model.torch_products_from is None


def test_measuring_ends_with_its_time(target: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, lambda *_: 3.0)
    native, stock = measure(target, 16, 64, clock)
    assert native == stock == {64: 3.0}


def test_counts_that_the_pool_does_not_hold_are_left_out(
    target: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, lambda *_: 0.001)
    assert set(measure(target, 16, 9, clock)[0]) == {64, 128}
    assert measure(target, 16, 3, clock) == ({}, {})


def test_real_passes_are_timed_both_ways(target: ModelRunner, used: Used) -> None:
    native, stock = measure(target, 16, 64)
    assert native.keys() == stock.keys()
    assert all(seconds > 0 for points in (native, stock) for seconds in points.values())
    assert used.native
    assert used.torch
