"""Sampled draft trees under `rejection` keep the distribution of plain sampling, through the whole
engine.

Thousands of sequences draw four tokens after one prompt, from a vocabulary of four: the first
plainly, the others with trees of one draft model or merged ones of two. The joint frequencies of
the last three are held against the exact distribution, which is enumerated from the target's
logits.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from harness import make_llm, run
from transformers import LlamaConfig, LlamaForCausalLM

from folospec import SamplingParams
from folospec.requests.input_processor import InputProcessor
from folospec.sampling import noise
from folospec.spec.trees import children

PROMPT = [1, 2, 3]
NUM_TOKENS, NUM_SEQUENCES = 4, 2000
FALSE_ALARM, VISIBLE = 1e-9, 1e-10

# They differ so that the mistakes below show; every context varies them a little.
TARGET_DISTRIBUTION = (0.24, 0.22, 0.09, 0.45)
DRAFT_DISTRIBUTIONS = ((0.13, 0.01, 0.63, 0.23), (0.3, 0.1, 0.5, 0.1))


@dataclass(frozen=True)
class Tiny:
    target: str
    first: str
    second: str


def save_model(folder: Path, distribution: tuple[float, ...], seed: int) -> str:
    """A Llama that says about the same after everything: one direction of the residual stream is
    the same in every row, and carries the distribution."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(distribution),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.3)
        model.model.embed_tokens.weight[:, 0] = 4.0
        model.lm_head.weight.mul_(0.6)
        model.lm_head.weight[:, 0] = (
            torch.tensor(distribution).log() / 4.0
        )  # the norm makes it sqrt(16)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    distributions = (TARGET_DISTRIBUTION, *DRAFT_DISTRIBUTIONS)
    return Tiny(
        *(
            save_model(folder / str(seed), distribution, seed)
            for seed, distribution in enumerate(distributions)
        )
    )


@pytest.fixture(scope="module")
def distribution(tiny: Tiny) -> dict[tuple[int, ...], float]:
    """Probability of every three last tokens at temperature 1, in float64."""
    model = LlamaForCausalLM.from_pretrained(tiny.target, dtype=torch.float64).eval()
    joint: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(NUM_TOKENS):
        outputs = list(joint)
        with torch.no_grad():
            rows = torch.tensor([[*PROMPT, *output] for output in outputs])
            probs = model(rows).logits[:, -1].softmax(-1).tolist()
        joint = {
            (*output, token): joint[output] * prob
            for output, row in zip(outputs, probs, strict=True)
            for token, prob in enumerate(row)
        }
    distribution: dict[tuple[int, ...], float] = defaultdict(float)
    for output, prob in joint.items():
        distribution[output[1:]] += prob
    return dict(distribution)


def p_value(distribution: dict[tuple[int, ...], float], outputs: list[tuple[int, ...]]) -> float:
    """The probability with which plain sampling strays at least this far; cells that expect less
    than 5 are pooled."""
    counts, total = Counter(outputs), len(outputs)
    large = [output for output, prob in distribution.items() if prob * total >= 5]
    cells = [(counts[output], distribution[output] * total) for output in large]
    rest = total - sum(expected for _, expected in cells)
    if rest > 5:
        cells.append((total - sum(seen for seen, _ in cells), rest))
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    halves = torch.tensor([len(cells) - 1, statistic], dtype=torch.float64) / 2
    return float(torch.special.gammaincc(*halves))


def sample(tiny: Tiny, speculative: dict[str, Any]) -> tuple[list[tuple[int, ...]], dict[str, Any]]:
    settings = {**speculative, "acceptance": "rejection"}
    llm = make_llm(
        tiny.target, settings, max_num_seqs=800, num_blocks=8000, block_size=4, seed=12,
        max_num_batched_tokens=16384,
    )  # fmt: skip
    params = SamplingParams(temperature=1.0, max_tokens=NUM_TOKENS, ignore_eos=True, n=50)
    result = run(llm, [PROMPT] * (NUM_SEQUENCES // 50), params)
    outputs = [tuple(c.token_ids[1:]) for o in result.outputs for c in o.outputs]
    assert len(outputs) == NUM_SEQUENCES
    harness.assert_speculated(result.stats)
    return outputs, result.stats


def one_tree(tiny: Tiny, **options: Any) -> dict[str, Any]:
    return {"method": "draft_model", "model": tiny.first, "tree": [3, 1], **options}


def two_trees(tiny: Tiny) -> dict[str, Any]:
    tree = {"method": "draft_model", "tree": [2, 1]}
    models = (tiny.first, tiny.second)
    return {"drafters": [{**tree, "model": model} for model in models], "merge": True}


def three_chains(tiny: Tiny) -> dict[str, Any]:
    chain = {"method": "draft_model", "num_speculative_tokens": 2, "model": tiny.first}
    return {"drafters": [chain] * 3, "merge": True}


@pytest.mark.parametrize("how", ["iid", "without_replacement"])
def test_a_tree_of_a_draft_model_keeps_the_distribution(
    tiny: Tiny, distribution: Any, how: str
) -> None:
    outputs, stats = sample(tiny, one_tree(tiny, children=how))
    assert stats["num_moved_rows"] > 0
    assert p_value(distribution, outputs) > FALSE_ALARM


def test_a_dynamic_tree_of_deterministic_drafts_keeps_the_distribution(
    tiny: Tiny, distribution: Any
) -> None:
    dynamic = {"tree": "dynamic", "children": "top_k", "branching": 2, "depth": 2}
    outputs, _ = sample(tiny, one_tree(tiny, **dynamic))
    assert p_value(distribution, outputs) > FALSE_ALARM


def test_merged_trees_of_two_draft_models_keep_the_distribution(
    tiny: Tiny, distribution: Any
) -> None:
    outputs, _ = sample(tiny, two_trees(tiny))
    assert p_value(distribution, outputs) > FALSE_ALARM


def test_merged_chains_of_one_model_keep_the_distribution(tiny: Tiny, distribution: Any) -> None:
    """Duplicates are many; each drafter has noise of its own."""
    outputs, _ = sample(tiny, three_chains(tiny))
    assert p_value(distribution, outputs) > FALSE_ALARM


class TestControls:
    """Each breaks one thing that the distribution rests on; the frequencies must show it."""

    def test_the_distribution_of_the_first_child_for_all_siblings_is_seen(
        self, tiny: Tiny, distribution: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unconditional(drawn: Any, probs: torch.Tensor) -> None:
            drawn.draft_probs = probs.repeat(len(drawn.token_ids), 1)

        monkeypatch.setattr(children, "_add_draft_probs", unconditional)
        outputs, _ = sample(tiny, one_tree(tiny))
        assert p_value(distribution, outputs) < VISIBLE

    def test_drafters_with_one_noise_are_seen(
        self, tiny: Tiny, distribution: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = noise.purpose_code
        monkeypatch.setattr(
            noise,
            "purpose_code",
            lambda kind, row=None, stream=0: real(kind, row, stream >> 10 << 10),
        )
        outputs, _ = sample(tiny, three_chains(tiny))
        assert p_value(distribution, outputs) < VISIBLE


def test_the_distribution_is_neither_certain_nor_the_same_after_everything(
    distribution: Any,
) -> None:
    assert sum(distribution.values()) == pytest.approx(1.0)
    assert sum(prob * NUM_SEQUENCES >= 5 for prob in distribution.values()) > 35
    last = [
        [
            distribution[first, 0, token] / sum(distribution[first, 0, t] for t in range(4))
            for token in range(4)
        ]
        for first in range(4)
    ]
    assert max(abs(a - b) for a, b in zip(last[0], last[1], strict=True)) > 0.02


def remembered(tiny: Tiny, seed_of: Any, count: int = 180) -> list[tuple[int, ...]]:
    """Outputs of requests whose drafts come from what the request before them said; the store holds
    little more than that."""
    settings = {
        "method": "suffix",
        "acceptance": "rejection",
        "max_cached_tokens": 10,
        "min_token_prob": 0.0,
        "num_speculative_tokens": 1,
    }
    llm = make_llm(tiny.target, settings, num_blocks=64, block_size=4)
    outputs = []
    for number in range(count):
        for turn in ("fill", "remember", "use"):
            params = SamplingParams(
                seed=seed_of(number, turn), max_tokens=NUM_TOKENS, ignore_eos=True
            )
            result = run(llm, [PROMPT], params)
        outputs.append(tuple(result.tokens[0][0][1:]))
    harness.assert_speculated(result.stats)
    return outputs


def one_seed(number: int, turn: str) -> int:
    return 0 if turn == "fill" else 1000 + number


def test_requests_with_one_seed_keep_the_distribution_though_drafters_remember(
    tiny: Tiny, distribution: Any
) -> None:
    assert p_value(distribution, remembered(tiny, one_seed)) > FALSE_ALARM


def test_one_noise_for_requests_that_remember_each_other_is_seen(
    tiny: Tiny, distribution: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InputProcessor, "_seed", lambda self, params, ordinal: params.seed)
    assert p_value(distribution, remembered(tiny, one_seed)) < VISIBLE
