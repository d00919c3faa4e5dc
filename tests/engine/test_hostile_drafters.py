"""Whatever a drafter hands over and whatever it does to what it is given, the tokens are plain
decoding's, every block is accounted for, and its failures are counted."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from fixed_costs import fix_costs
from harness import PROMPTS, Run, assert_speculated, make_llm, run, save_tiny_llama
from hostile_drafters import (
    HARMLESS,
    KEPT_THINGS,
    PASSES_IN_HOOKS,
    WRONG_ANSWERS,
    WRONG_LISTS,
    HostileDrafter,
)
from hostile_passes import BEFORE_THE_ROOT, WRONG_PASSES
from native_builds import require_native

from folospec import SamplingParams
from folospec.spec import drafter_calls
from folospec.worker import loading

ASKED = PROMPTS[:4]
NUM_BLOCKS = 64


def params_of() -> list[SamplingParams]:
    """Those of the prompts, with lists and mappings of their own."""
    common: dict[str, Any] = {"seed": 5, "max_tokens": 14, "ignore_eos": True}
    return [
        SamplingParams(temperature=t, logit_bias={7: 1.0}, stop_token_ids=[], **common)
        for t in (0.0, 0.9, 0.0, 1.0)
    ]


@cache
def plain_run(model: str, dtype: str) -> Run:
    """Plain decoding's; the same for every drafter."""
    return run(make_llm(model, dtype=dtype, num_blocks=NUM_BLOCKS), ASKED, params_of())


class Bench:
    """An engine with the hostile drafter, and what plain decoding says there. The target is its
    draft model."""

    def __init__(self, model: str, dtype: str, /, **options: Any) -> None:
        self.plain = plain_run(model, dtype)
        self.futures = {tuple(p): t[0] for p, t in zip(ASKED, self.plain.tokens, strict=True)}
        if "drafters" not in options:
            options = {"method": "hostile", "num_speculative_tokens": 8, **options}
            options |= {"model": model} if "model" in options else {}
        self.llm = make_llm(
            model, options, strict_drafters=False, dtype=dtype, num_blocks=NUM_BLOCKS
        )
        if options.get("adaptive"):
            fix_costs(self.llm)

    def run(self, fault: str | None, seed: int = 0) -> tuple[Run, int]:
        """A run in which the drafter commits a fault, and how many failures were counted."""
        HostileDrafter.fault, HostileDrafter.futures = fault, self.futures
        HostileDrafter.random.seed(seed)
        before = self.llm.stats()["num_drafter_errors"]
        found = run(self.llm, ASKED, params_of())
        return found, found.stats["num_drafter_errors"] - before


@pytest.fixture(scope="module")
def native_target(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A target whose heads are wide enough for the native kernels."""
    require_native()
    return save_tiny_llama(tmp_path_factory.mktemp("wide"), layers=1, hidden=128, seed=4)


def make_bench(dtype: str, request: pytest.FixtureRequest, /, **options: Any) -> Bench:
    """On the native kernels in float32, on torch in float64."""
    if dtype == "float64":
        return Bench(request.getfixturevalue("models").target, dtype, **options)
    bench = Bench(request.getfixturevalue("native_target"), dtype, **options)
    assert bench.plain.stats["lossless"] == "bitwise"
    return bench


@pytest.fixture(scope="module", params=["float64", "float32"])
def bench(request: pytest.FixtureRequest) -> Bench:
    return make_bench(request.param, request)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level("CRITICAL", logger="folospec"):
        yield


@pytest.mark.parametrize("fault", [*WRONG_ANSWERS, *WRONG_LISTS, "observe", "finish", "drop"])
def test_a_fault_of_a_drafter_is_counted_and_changes_no_token(bench: Bench, fault: str) -> None:
    found, num_errors = bench.run(fault)
    assert found.tokens == bench.plain.tokens
    assert num_errors > 0


@pytest.mark.parametrize("deed", HARMLESS)
def test_what_a_drafter_does_to_its_own_things_is_no_fault(bench: Bench, deed: str) -> None:
    found, num_errors = bench.run(deed)
    assert found.tokens == bench.plain.tokens
    assert num_errors == 0
    assert found.stats["num_accepted_tokens"] > 0


@pytest.fixture(scope="module")
def self_drafting(models: Any) -> Bench:
    return Bench(models.target, "float64", method="hostile_model")


@pytest.mark.parametrize("fault", [*BEFORE_THE_ROOT, *WRONG_PASSES, *PASSES_IN_HOOKS, *KEPT_THINGS])
def test_a_pass_that_a_drafter_may_not_run_changes_no_token(
    self_drafting: Bench, fault: str
) -> None:
    found, num_errors = self_drafting.run(fault)
    assert found.tokens == self_drafting.plain.tokens
    assert num_errors > 0


@pytest.mark.parametrize("fault", [*BEFORE_THE_ROOT][:2])
def test_a_runner_without_checks_is_noticed(
    fault: str, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "GuardedRunner", lambda runner, *_, **__: runner)
    bench = Bench(models.target, "float64", method="hostile_model")
    found, num_errors = bench.run(fault)
    assert num_errors == 0
    assert found.tokens != bench.plain.tokens


@pytest.mark.parametrize("fault", ["stats", "stats in a number"])
def test_a_drafter_that_cannot_count_has_no_figures(bench: Bench, fault: str) -> None:
    found, num_errors = bench.run(fault)
    assert found.stats["drafters"] == {"hostile": {}}
    assert num_errors == (1 if fault == "stats" else 0)


SETTINGS: dict[str, dict[str, Any]] = {
    "fixed": {},
    "planned": {"adaptive": True},
    "merged": {"drafters": [{"method": "hostile"}, {"method": "ngram"}], "merge": True},
    "in order": {"drafters": [{"method": "ngram"}, {"method": "hostile"}]},
    "self-draft": {"method": "hostile_model"},
    "draft model": {"method": "hostile_model", "model": "the target's"},
}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", SETTINGS)
def test_any_faults_together_change_no_token(
    name: str, dtype: str, request: pytest.FixtureRequest
) -> None:
    found = check_faults(make_bench(dtype, request, **SETTINGS[name]), range(4))
    assert_speculated(found.stats)


@pytest.mark.soak
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_any_faults_together_change_no_token_in_long_runs(
    name: str, dtype: str, request: pytest.FixtureRequest
) -> None:
    check_faults(make_bench(dtype, request, **SETTINGS[name]), range(300))


def check_faults(bench: Bench, seeds: range) -> Run:
    total = 0
    for seed in seeds:
        found, num_errors = bench.run(None, seed)
        assert found.tokens == bench.plain.tokens, f"seed {seed}"
        total += num_errors
    assert total > 0
    return found


@pytest.mark.parametrize("acceptance", ["rejection", "block"])
def test_faults_under_a_ratio_rule_end_no_request(acceptance: str, models: Any) -> None:
    bench = Bench(models.target, "float64", acceptance=acceptance)
    for seed in range(3):
        found, num_errors = bench.run(None, seed)
        assert [len(tokens[0]) for tokens in found.tokens] == [14] * len(ASKED)
        assert num_errors > 0


def test_a_list_that_could_be_changed_is_noticed(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafter_calls, "ReadOnlyList", lambda values: values)
    bench = Bench(models.target, "float64")
    found, _ = bench.run("an output token appended")
    assert found.tokens != bench.plain.tokens


def test_parameters_that_could_be_changed_are_noticed(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SamplingParams, "detached", lambda params: params)
    bench = Bench(models.target, "float64")
    found, _ = bench.run("a bias of its own")
    assert found.tokens != bench.plain.tokens
