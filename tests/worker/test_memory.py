"""The pool takes what the largest step leaves of the memory that is allowed."""

from __future__ import annotations

import pytest
import torch
from gpu_models import VOCAB_SIZE, save_gpu_llama

from folospec.models.loader import load_model
from folospec.worker import memory
from folospec.worker.model_runner import ModelRunner

GIB = 1 << 30


class Card:
    """Stands in for `torch.cuda`: a card of 80 GiB, of which other programs use 3. The process has
    allocated `weights`, and each model's largest step takes `step` more beside its KV."""

    def __init__(self, runners: list[ModelRunner], weights: int, steps: list[int]) -> None:
        self.runners, self.weights, self.steps = runners, weights, steps
        self.peak, self.is_empty, self.num_resets = weights, False, 0

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.peak = self.weights
        self.num_resets += 1

    def max_memory_allocated(self, device: torch.device) -> int:
        return self.peak

    def empty_cache(self) -> None:
        self.is_empty = True

    def memory_reserved(self, device: torch.device) -> int:
        return self.weights if self.is_empty else self.peak

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 77 * GIB - self.memory_reserved(device), 80 * GIB


@pytest.fixture(scope="module")
def runners(tmp_path_factory: pytest.TempPathFactory) -> list[ModelRunner]:
    folder = save_gpu_llama(tmp_path_factory.mktemp("model"))
    return [
        ModelRunner(load_model(folder, dtype="float32"), max_num_batched_tokens=n) for n in (200, 8)
    ]


def budget(monkeypatch: pytest.MonkeyPatch, runners: list[ModelRunner], **options: object) -> int:
    card = Card(runners, weights=10 * GIB, steps=[2 * GIB, 5 * GIB])
    for name in ("reset_peak_memory_stats", "max_memory_allocated", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, getattr(card, name))
    for name in ("memory_reserved", "mem_get_info"):
        monkeypatch.setattr(torch.cuda, name, getattr(card, name))
    run = memory.run_largest_step

    def measured(runner: ModelRunner, *args: object) -> int:
        kv_bytes = run(runner, *args)  # type: ignore[arg-type]
        card.peak += card.steps[card.runners.index(runner)] + kv_bytes
        return kv_bytes

    monkeypatch.setattr(memory, "run_largest_step", measured)
    settings = {"utilization": 0.5, "block_size": 16, "num_logits": 4, "reserve": 0}
    return memory.kv_budget(runners, torch.device("cpu"), **{**settings, **options})  # type: ignore[arg-type]


def test_others_weights_and_the_largest_step_of_any_model_are_taken_off(monkeypatch, runners):
    # Half of 80, less 3 of others, 10 of weights, and 5 of the model whose step is largest.
    assert budget(monkeypatch, runners) == 22 * GIB


def test_graphs_get_their_share(monkeypatch, runners):
    share = memory.graph_bytes(VOCAB_SIZE)
    assert share > memory.GRAPH_BYTES
    assert budget(monkeypatch, runners, reserve=share) == 22 * GIB - share


def test_a_share_that_leaves_nothing_is_refused_with_all_figures(monkeypatch, runners):
    with pytest.raises(
        ValueError,
        match=r"gpu_memory_utilization=0.2 must leave memory for KV.*16.00 GiB.*3.00.*15.00",
    ):
        budget(monkeypatch, runners, utilization=0.2)


@pytest.mark.parametrize("num_logits", [1, 4, 150])
def test_the_largest_step_has_all_rows_and_the_logits_asked_for(monkeypatch, runners, num_logits):
    runner, seen = runners[0], []
    forward = runner.forward

    def seen_forward(batch, *rest):
        result = forward(batch, *rest)
        seen.append((sum(rows.num_run for rows in batch), len(result.logits)))
        assert max(len(rows.token_ids) for rows in batch) <= runner.model.config.max_model_len
        assert len({block for rows in batch for block in rows.block_table}) == sum(
            len(rows.block_table) for rows in batch
        )
        return result

    monkeypatch.setattr(runner, "forward", seen_forward)
    kv_bytes = memory.run_largest_step(runner, torch.device("cpu"), 16, num_logits)
    assert seen == [(200, num_logits)]
    assert runner.kv is None
    per_token = 2 * 32 * 4  # keys and values of one head of 32 floats, in one layer
    assert kv_bytes == per_token * 16 * (6 + 6 + 1)  # 96, 96 and 8 tokens
