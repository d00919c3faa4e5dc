"""The promise of `rejection` and `block`: the distribution of plain sampling, from the engine as
users run it.

3,000 sequences draw three tokens after one prompt, from four that are allowed, with a draft model
that knows nothing; their joint frequencies are held against the exact distribution of plain
sampling.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import harness
import pytest
import torch
from harness import make_llm, run
from transformers import LlamaForCausalLM

from folospec import SamplingParams
from folospec.spec import verify

PROMPT = [5, 6, 7, 8]
ALLOWED = [3, 8, 17, 40]
LENGTH = 3
NUM_SEQUENCES = 3000


def exact_distribution(folder: str) -> dict[tuple[int, ...], float]:
    """Probability of every output of `LENGTH` allowed tokens at temperature 1, in float64."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    distribution = {(): 1.0}
    for _ in range(LENGTH):
        longer = {}
        with torch.no_grad():
            for output, weight in distribution.items():
                logits = model(torch.tensor([[*PROMPT, *output]])).logits[0, -1]
                for token, prob in zip(ALLOWED, logits[ALLOWED].softmax(-1), strict=True):
                    longer[(*output, token)] = weight * float(prob)
        distribution = longer
    return distribution


def chi_square(distribution: dict[tuple[int, ...], float], outputs: list[tuple[int, ...]]) -> float:
    """Chi-square in standard deviations above its mean; cells that expect less than 5 are
    pooled."""
    counts = Counter(outputs)
    assert set(counts) <= set(distribution), "a token that the distribution calls impossible"
    cells: list[tuple[float, float]] = []
    rest_expected = rest_seen = 0.0
    for output, prob in distribution.items():
        expected, seen = prob * len(outputs), counts[output]
        if expected >= 5:
            cells.append((expected, seen))
        else:
            rest_expected, rest_seen = rest_expected + expected, rest_seen + seen
    if rest_expected:
        cells.append((max(rest_expected, 1.0), rest_seen))
    statistic = sum((seen - expected) ** 2 / expected for expected, seen in cells)
    freedom = len(cells) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


def sample(models: Any, acceptance: str) -> tuple[list[tuple[int, ...]], dict[str, Any]]:
    speculative = {
        "method": "draft_model",
        "model": models.far,
        "num_speculative_tokens": 2,
        "acceptance": acceptance,
    }
    llm = make_llm(models.target, speculative, max_num_seqs=500, num_blocks=2000, seed=12)
    params = SamplingParams(
        temperature=1.0, allowed_token_ids=ALLOWED, max_tokens=LENGTH, ignore_eos=True, n=100
    )
    result = run(llm, [PROMPT] * (NUM_SEQUENCES // 100), params)
    outputs = [tuple(c.token_ids) for o in result.outputs for c in o.outputs]
    assert len(outputs) == NUM_SEQUENCES
    return outputs, result.stats


@pytest.mark.parametrize("acceptance", ["coupled", "rejection", "block"])
def test_outputs_follow_the_distribution_of_plain_sampling(acceptance: str, models: Any) -> None:
    outputs, stats = sample(models, acceptance)
    harness.assert_speculated(stats)
    # With about 60 cells, 8 standard deviations are a false alarm of about 1e-9.
    assert chi_square(exact_distribution(models.target), outputs) < 8


def test_resampling_without_the_residual_is_noticed(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: after a rejection the next token is drawn from the target's whole distribution.

    (Noise shared between drafts and residual is the control of
    tests/spec/test_sampled_distribution.py.)
    """
    monkeypatch.setattr(verify, "_residual", lambda distribution, *_, **__: distribution)
    outputs, _ = sample(models, "rejection")
    assert chi_square(exact_distribution(models.target), outputs) > 12
