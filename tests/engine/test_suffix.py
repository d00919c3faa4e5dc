"""The suffix drafter in the engine: the tokens of plain decoding, whatever its trees hold."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import pytest
from harness import VOCAB_SIZE, assert_speculated, make_llm, run
from suffix_forms import FORMS, using

from folospec import SamplingParams
from folospec.spec import verify_rows
from folospec.spec.drafters.suffix import SuffixDrafter

SUFFIX = {"method": "suffix", "num_speculative_tokens": 8}

SITUATIONS: dict[str, dict[str, Any]] = {
    "a roomy pool": {},
    "a pool that forces preemption": {"num_blocks": 16, "block_size": 4},
    "chunked prefill": {"max_num_batched_tokens": 7, "max_num_seqs": 5},
}


@pytest.fixture(autouse=True, scope="module", params=FORMS)
def form(request: pytest.FixtureRequest) -> Iterator[None]:
    with using(request.param):
        yield


def the_drafter(llm: Any) -> SuffixDrafter:
    (source,) = llm.engine.components.drafters
    return source


@pytest.mark.parametrize("tree", [True, False])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_suffix_tokens_equal_plain_tokens(
    situation: str, tree: bool, models: Any, plain: harness.Run
) -> None:
    llm = make_llm(models.target, {**SUFFIX, "tree": tree}, **SITUATIONS[situation])
    result = run(llm)
    assert result.tokens == plain.tokens
    assert result.logprobs == pytest.approx(plain.logprobs, abs=1e-9)
    assert_speculated(result.stats)
    if "preemption" in situation:
        assert result.stats["num_preemptions"] > 0
    state = result.stats["drafters"]["suffix"]
    assert state["num_sequences"] == 0
    assert state["num_stored_requests"] == sum(len(tokens) for tokens in plain.tokens)


def test_finished_requests_make_the_next_ones_fast(models: Any, plain: harness.Run) -> None:
    """The same requests again: what they will say is in the shared tree, prefix hits or not."""
    llm = make_llm(models.target, SUFFIX, block_size=4)
    greedy = [harness.mixed_params()[0]] * len(harness.PROMPTS)
    first, second = run(llm, params=greedy), run(llm, params=greedy)
    assert first.tokens == second.tokens
    assert second.stats["prefix_cache_hits"] > 0
    accepted = [run_.stats["num_accepted_tokens"] for run_ in (first, second)]
    assert accepted[1] - accepted[0] > 2 * accepted[0] > 0
    assert_speculated(second.stats)


@pytest.mark.parametrize("acceptance", ["rejection", "block"])
def test_greedy_tokens_are_kept_by_the_other_rules(acceptance: str, models: Any) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    expected = run(make_llm(models.target), params=params)
    result = run(make_llm(models.target, {**SUFFIX, "acceptance": acceptance}), params=params)
    assert result.tokens == expected.tokens
    assert_speculated(result.stats)


def test_a_store_full_of_nonsense_changes_nothing(
    models: Any, plain: harness.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_ = random.Random(7)

    def corrupted(token_ids: Any) -> None:
        add([t if random_.random() < 0.5 else random_.randrange(VOCAB_SIZE) for t in token_ids])

    llm = make_llm(models.target, {**SUFFIX, "max_cached_tokens": 100})
    add = the_drafter(llm).index.add
    monkeypatch.setattr(the_drafter(llm).index, "add", corrupted)
    same = make_llm(models.target)  # its second run has other seeds, as that of the first engine
    for _ in range(2):
        result, expected = run(llm), run(same)
        assert result.tokens == expected.tokens
    assert expected.tokens != plain.tokens
    assert_speculated(result.stats)
    state = result.stats["drafters"]["suffix"]
    assert state["num_evictions"] > 0
    assert 0 < state["num_stored_tokens"] <= 100


def test_accepting_a_suffix_unseen_is_noticed(
    models: Any, plain: harness.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control of the tests above."""

    monkeypatch.setattr(verify_rows, "verify_coupled", harness.trusting)
    assert run(make_llm(models.target, SUFFIX)).tokens != plain.tokens


def test_what_one_engine_learned_another_can_load(models: Any, tmp_path: Path) -> None:
    path = tmp_path / "corpus.npz"
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    llm = make_llm(models.target, SUFFIX)
    first = run(llm, params=params)
    the_drafter(llm).save(path)
    loaded = make_llm(models.target, {**SUFFIX, "load": str(path)})
    assert the_drafter(loaded).index.texts == the_drafter(llm).index.texts
    second = run(loaded, params=params)
    assert second.tokens == first.tokens
    assert second.stats["num_accepted_tokens"] > 2 * first.stats["num_accepted_tokens"]
