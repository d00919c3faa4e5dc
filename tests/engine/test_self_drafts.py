"""Drafters that are the target itself, cheaper: lossless, and no KV row of theirs is ever kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import PROMPTS, assert_speculated, make_llm, mixed_params, run
from test_lossless import SITUATIONS
from torch import Tensor

from folospec import LLM, SamplingParams, register_drafter
from folospec.kernels.torch_ops import Int8Weight
from folospec.models import self_draft
from folospec.spec.drafters.model_drafter import DRAFTING_OPTIONS, ModelDrafter
from folospec.worker.model_runner import ModelRunner


class WholeTargetDrafter(ModelDrafter):
    """The target as it is, on its own KV: whatever is not accepted shows a fault."""

    def __init__(self, context: Any) -> None:
        options = context.read_options(DRAFTING_OPTIONS)
        super().__init__(context, options, context.self_draft_model())


register_drafter("whole_target", WholeTargetDrafter)

QUANTIZED = {"method": "quantized", "num_speculative_tokens": 4}
SKIPPING = {"method": "layer_skip", "num_speculative_tokens": 4, "skip_mlp": [1]}
DRAFTERS: dict[str, Any] = {
    "quantized": QUANTIZED,
    "early exit": {"method": "layer_skip", "num_speculative_tokens": 4, "exit_layer": 1},
    "skip set": SKIPPING,
    "skipped attention": {**SKIPPING, "skip_mlp": None, "skip_attention": [0]},
    "tree": {"method": "layer_skip", "exit_layer": 1, "tree": [3, 2, 1]},
    "dynamic tree": {"method": "layer_skip", "exit_layer": 1, "tree": "dynamic"},
    "two views, merged": {"drafters": [QUANTIZED, SKIPPING], "merge": True},
}
CASES = [
    *(("quantized", situation) for situation in SITUATIONS),
    *((drafter, "a pool that forces preemption") for drafter in DRAFTERS if drafter != "quantized"),
]
ROUNDS = 2
"""Every batch runs twice, the second time over the prefix cache of the first."""


def twice(llm: LLM, on_step: Any = None, **batch: Any) -> list[Any]:
    return [run(llm, on_step=on_step, **batch) for _ in range(ROUNDS)]


class Rows:
    """The target's KV rows of every sequence as far as they are committed, [rows, layers, 2, ...].

    Filled by a plain run, or compared with one while a speculative engine runs.
    """

    def __init__(self, expected: Rows | None = None, tolerance: float = 1e-9) -> None:
        self.found: dict[str, Tensor] = {}
        self.expected, self.tolerance = expected, tolerance
        self.num_compared = 0

    def __call__(self, llm: LLM) -> None:
        """Look at the rows between two steps."""
        for seq in llm.engine.scheduler.running:
            rows = committed_rows(llm, seq)
            if self.expected is None:
                if len(rows) > len(self.found.get(seq.seq_id, ())):
                    self.found[seq.seq_id] = rows
                continue
            plain = self.expected.found[seq.seq_id][: len(rows)]
            assert rows.shape == plain.shape, "plain decoding has these rows too"
            worst = float((rows - plain).abs().max()) if len(rows) else 0.0
            assert worst <= self.tolerance, f"{seq.seq_id}: a row is off by {worst}"
            self.num_compared += len(rows)


def committed_rows(llm: LLM, seq: Any) -> Tensor:
    kv = llm.engine.components.target.kv
    assert kv is not None
    slots = llm.engine.manager.slots(seq, 0, seq.num_computed_tokens)
    return torch.stack([t[slots] for layer in kv.layers for t in layer], dim=1)


@pytest.fixture(scope="module")
def plain(models: Any) -> tuple[list[Any], Rows]:
    """Two rounds of plain decoding, and the KV rows it computed."""
    rows = Rows()
    return twice(make_llm(models.target), rows), rows


@pytest.fixture
def coarse_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of 15 steps and not 255: on so small a model int8 drafts are hardly ever rejected."""

    def quantize(weight: Tensor) -> Int8Weight:
        scale = weight.abs().amax(dim=1) / 7
        return Int8Weight((weight / scale[:, None]).round().to(torch.int8), scale)

    monkeypatch.setattr(self_draft, "quantize_int8", quantize)


@pytest.mark.parametrize(("drafter", "situation"), CASES)
@pytest.mark.usefixtures("coarse_grid")
def test_tokens_and_committed_kv_are_those_of_plain_decoding(
    drafter: str, situation: str, models: Any, plain: Any
) -> None:
    expected, rows = plain
    compared = Rows(expected=rows)
    llm = make_llm(models.target, DRAFTERS[drafter], **SITUATIONS[situation])
    results = twice(llm, compared)
    assert [result.tokens for result in results] == [result.tokens for result in expected]
    stats = results[-1].stats
    assert_speculated(stats, moved="tree" in drafter)
    assert compared.num_compared > 500
    if "preemption" in situation:
        assert stats["num_preemptions"] > 0
    if situation == "blocks of one token":
        assert stats["prefix_cache_hits"] > 0


@pytest.mark.parametrize("drafter", ["quantized", "tree"])
@pytest.mark.usefixtures("coarse_grid")
def test_row_at_a_time_the_committed_kv_has_the_same_bits(drafter: str, models: Any) -> None:
    options = {"dtype": "float32", "deterministic": True, "block_size": 4}
    batch = {"prompts": PROMPTS[:3], "params": mixed_params(12)[:3]}
    rows = Rows()
    expected = twice(make_llm(models.target, **options), rows, **batch)
    compared = Rows(expected=rows, tolerance=0.0)
    results = twice(make_llm(models.target, DRAFTERS[drafter], **options), compared, **batch)
    assert [result.tokens for result in results] == [result.tokens for result in expected]
    assert compared.num_compared > 200
    assert results[-1].stats["prefix_cache_hits"] > 0
    assert_speculated(results[-1].stats)


@pytest.mark.parametrize("kept", ["root", "drafts"])
@pytest.mark.usefixtures("coarse_grid")
def test_a_draft_row_that_is_kept_is_noticed(
    kept: str, models: Any, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: layer 0 keeps what the draft has written at the root's slot, or behind it."""
    real = ModelRunner.forward

    def forward(
        self: ModelRunner, batch: Any, aux_layers: Any = (), packed_trees: Any = None
    ) -> Any:
        if self is not llm.engine.components.target:
            return real(self, batch, aux_layers, packed_trees)
        keep = [
            rows.block_table[index // 4] * 4 + index % 4
            for rows in batch
            if rows.num_logits == len(rows.token_ids) > 1  # a root and its drafts
            for index in range(rows.start, rows.start + len(rows.token_ids) - 1)
            if (index == rows.start) == (kept == "root")
        ]
        assert self.kv is not None
        draft_rows = [t[keep] for t in self.kv.layers[0]]
        result = real(self, batch, aux_layers, packed_trees)
        for tensor, draft in zip(self.kv.layers[0], draft_rows, strict=True):
            tensor[keep] = draft
        return result

    llm = make_llm(models.target, QUANTIZED, block_size=4)
    monkeypatch.setattr(ModelRunner, "forward", forward)
    with pytest.raises(AssertionError, match="a row is off by"):
        twice(llm, Rows(expected=plain[1]))


@pytest.mark.parametrize(
    ("tree", "situation"),
    [*((None, s) for s in SITUATIONS), ([2, 2, 1], "a pool that forces preemption")],
)
def test_drafts_of_the_whole_target_are_all_accepted(
    tree: Any, situation: str, models: Any
) -> None:
    """The sharpest test of what a view reads: one wrong row of KV, and a draft is rejected."""
    settings = {"method": "whole_target", "num_speculative_tokens": 5 if tree is None else 10}
    llm = make_llm(models.target, {**settings, "tree": tree}, **SITUATIONS[situation])
    lost = []
    observe = llm.engine.proposer.observe

    def watch(observed: Any, result: Any) -> None:
        for seen in observed:
            if seen.proposal is not None and seen.verdict is not None:
                deepest = max(seen.proposal.tree.depths)
                lost.append(deepest - seen.verdict.num_accepted)
        observe(observed, result)

    llm.engine.proposer.observe = watch  # type: ignore[method-assign]
    twice(llm)
    assert len(lost) >= 40
    assert not any(lost)


def test_a_view_that_sees_other_kv_than_the_targets_is_noticed(models: Any) -> None:
    """Control of the test above: with KV of its own, which nobody fills, the view is lost."""
    llm = make_llm(models.target, {"method": "whole_target"})
    (view,), target = llm.engine.components.self_drafts, llm.engine.components.target
    assert view.kv is target.kv is not None
    view.make_kv(target.kv.layers[0].key.shape[0] // 16, 16, torch.device("cpu"))
    stats = run(llm).stats
    assert 0 < stats["num_accepted_tokens"] < 0.8 * stats["num_draft_tokens"]


def test_a_view_takes_no_memory_for_kv(models: Any) -> None:
    assert (
        make_llm(models.target, QUANTIZED, num_blocks=32).stats()["kv_cache_bytes"]
        == make_llm(models.target, num_blocks=32).stats()["kv_cache_bytes"]
    )


def test_a_target_without_an_exit_needs_options(models: Any) -> None:
    with pytest.raises(ValueError, match="no early_exit_layer.*'exit_layer'"):
        make_llm(models.target, "layer_skip")


def test_a_target_that_the_decoder_does_not_serve_is_refused(tmp_path: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    for settings in ("quantized", {"method": "layer_skip", "exit_layer": 1}):
        with pytest.raises(ValueError, match="GPT2LMHeadModel cannot draft for itself"):
            make_llm(str(tmp_path), settings)


CODE = [
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "import os\n\n\ndef read_lines(path):\n    with open(path) as file:\n",
    "    def __eq__(self, other):\n        if not isinstance(other, type(self)):\n",
]


@pytest.mark.parametrize(
    ("method", "temperature", "at_least", "at_most"),
    [
        ("quantized", 0.0, 0.93, 1.0),
        ("quantized", 0.8, 0.9, 1.0),
        ("layer_skip", 0.0, 0.7, 0.97),
        ("layer_skip", 0.8, 0.6, 0.95),
    ],
)
def test_the_bundled_target_is_its_own_good_drafter(
    method: str, temperature: float, at_least: float, at_most: float
) -> None:
    """The chance that a draft is accepted, given that those before it were. By default layer_skip
    leaves after the layer that the target was trained to leave after."""
    llm = LLM("folospec-demo", speculative={"method": method, "num_speculative_tokens": 5})
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=48, ignore_eos=True)
    llm.generate(CODE, params, use_tqdm=False)
    stats = llm.stats()
    accepted = stats["num_accepted_tokens"]
    num_rejecting = sum(stats["acceptance_histogram"][:5])
    assert stats["num_drafts"] > 20
    assert at_least < accepted / (accepted + num_rejecting) <= at_most
