"""The bound that `never_slower` prints holds as often as it says, and the control loses drafts."""

from __future__ import annotations

import random
from typing import Any

import pytest

from benchmarks.engine import never_slower
from benchmarks.engine.slower_checks import force_drafts, lower_bound, verdict
from folospec import LLM, SamplingParams


@pytest.mark.parametrize("num_cells", [1, 9])
def test_a_bound_is_above_the_true_median_no_oftener_than_is_allowed(num_cells: int) -> None:
    rng, count, above = random.Random(0), 4000, 0
    for _ in range(count):
        bound = lower_bound([rng.lognormvariate(0.0, 0.1) for _ in range(25)], num_cells)
        assert bound is not None
        above += bound > 1.0
    assert 0 < above / count < 0.05 / num_cells


def test_a_bound_for_more_cells_is_lower() -> None:
    ratios = [0.9 + 0.01 * number for number in range(20)]
    few, many = lower_bound(ratios, 1), lower_bound(ratios, 20)
    assert few is not None
    assert many is not None
    assert many < few < 1.0
    assert lower_bound(ratios, 1) == pytest.approx(0.95)  # at most 5 heads in 20: 0.021
    assert lower_bound(ratios[:4], 1) is None


def test_what_is_slower_is_called_so() -> None:
    assert verdict(0.96, 0.95) == "slower"
    assert verdict(1.2, 0.93) == verdict(1.2, None) == "undecided"
    assert verdict(0.975, 0.945) == "not slower"


def test_a_planner_that_is_forced_drafts_in_every_step() -> None:
    llm = force_drafts(LLM("folospec-demo", "auto", max_num_seqs=2, strict_drafters=True))
    params = SamplingParams(temperature=1.5, max_tokens=24, ignore_eos=True, seed=1)
    outputs = llm.generate(["def first(", "import "], params, use_tqdm=False)
    stats: dict[str, Any] = llm.stats()
    assert stats["num_drafts"] > 20
    assert sum(stats["num_undrafted"].values()) <= 4
    assert all(len(output.outputs[0].token_ids) == 24 for output in outputs)


def test_prompts_that_are_missing_are_said_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(never_slower, "measure", lambda *_: pytest.fail("a cell was measured"))
    with pytest.raises(ValueError, match="held-out modules give"):
        never_slower.main(["--workloads", "code", "--batches", "1,32", "--pairs", "2000"])
