"""Lookahead in the engine: window and guesses in one pass of a real target, and nothing of the
window left behind."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import harness
import numpy as np
import pytest
import torch
from harness import assert_speculated, make_llm, run
from test_kv_after_commit import Checker
from transformers import LlamaForCausalLM

from folospec import SamplingParams
from folospec.attention.metadata import SuffixMask
from folospec.engine import commit
from folospec.engine.commit import Committer
from folospec.spec import verify_rows
from folospec.spec.drafters.lookahead import LookaheadDrafter
from folospec.spec.proposer import Proposer
from folospec.worker import input_batch

SETTINGS: dict[str, Any] = {"method": "lookahead", "window": 4, "ngram_size": 4, "guesses": 3}
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)

SITUATIONS: dict[str, dict[str, Any]] = {
    "a roomy pool": {},
    "blocks of one token": {"block_size": 1},
    "a pool that forces preemption": {"num_blocks": 18, "block_size": 4},
    "chunked prefill": {"max_num_batched_tokens": 24, "max_num_seqs": 5},
}


@pytest.fixture(scope="module")
def plain_greedy(models: Any) -> harness.Run:
    return run(make_llm(models.target), params=GREEDY)


@pytest.fixture(scope="module")
def plain_twice(models: Any) -> list[harness.Run]:
    llm = make_llm(models.target)
    return [run(llm), run(llm)]


def watch_verdicts(monkeypatch: pytest.MonkeyPatch, *, check: bool = True) -> Counter[str]:
    """Count the nodes of verified proposals by what they were; without `check` the engine does not
    count them, which refuses verdicts that cannot be."""
    counts: Counter[str] = Counter()
    real = Proposer.observe

    def watching(self: Any, steps: Any, result: Any) -> None:
        for seen in steps:
            if seen.proposal is not None:
                verified = list(map(seen.proposal.is_candidate, range(len(seen.proposal))))
                counts["scratch"] += verified.count(False)
                counts["verified"] += verified.count(True)
                counts["accepted scratch"] += sum(not verified[node] for node in seen.verdict.path)
        real(self, steps, result)

    monkeypatch.setattr(Proposer, "observe", watching)
    if not check:
        monkeypatch.setattr(Committer, "_count_drafts", lambda self, steps: None)
    return counts


@pytest.mark.parametrize("situation", SITUATIONS)
def test_tokens_are_those_of_plain_decoding(
    situation: str,
    models: Any,
    plain_twice: list[harness.Run],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = watch_verdicts(monkeypatch)
    llm = make_llm(models.target, SETTINGS, **SITUATIONS[situation])
    for plain in plain_twice:  # the second run meets cached prefixes and a filled pool
        result = run(llm)
        assert result.tokens == plain.tokens
        assert result.logprobs == pytest.approx(plain.logprobs, abs=1e-9)
    assert_speculated(result.stats, moved=True)
    assert counts["scratch"] > 100
    assert counts["accepted scratch"] == 0
    assert result.stats["prefix_cache_hits"] > 0
    if "preemption" in situation:
        assert result.stats["num_preemptions"] > 0


def test_greedy_tokens_are_those_of_plain_decoding_under_rejection(
    models: Any, plain_greedy: harness.Run
) -> None:
    result = run(make_llm(models.target, {**SETTINGS, "acceptance": "rejection"}), params=GREEDY)
    assert result.tokens == plain_greedy.tokens
    assert_speculated(result.stats, moved=True)


def test_merged_with_another_drafter_tokens_stay_the_same(models: Any, plain: harness.Run) -> None:
    near = {"method": "draft_model", "model": models.near, "tree": [2, 1]}
    for drafters in ([SETTINGS, near], [near, SETTINGS]):
        result = run(make_llm(models.target, {"drafters": drafters, "merge": True}))
        assert result.tokens == plain.tokens
        assert_speculated(result.stats, moved=True)
        assert result.stats["drafters"]["lookahead"]["num_ngrams"] > 0


def test_a_verifier_that_verifies_the_window_is_noticed(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = watch_verdicts(monkeypatch, check=False)
    real = verify_rows.verify_coupled
    monkeypatch.setattr(verify_rows, "verify_coupled", lambda tree, said, _: real(tree, said))
    run(make_llm(models.target, SETTINGS), params=GREEDY)
    assert counts["accepted scratch"] > 0


class Trajectory:
    """Every window that was run, and the n-grams it gave."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[tuple[list[int], list[list[int]], list[int]]] = []
        before: dict[str, tuple[list[int], list[list[int]]]] = {}
        propose, new = LookaheadDrafter._propose, LookaheadDrafter._new_token_ids

        def proposing(drafter: Any, row: Any) -> Any:
            proposal = propose(drafter, row)
            rows = drafter._states[row.seq_id].window.rows
            before[row.seq_id] = list(row.token_ids), [list(guesses) for guesses in rows]
            return proposal

        def observing(drafter: Any, state: Any, outcome: Any) -> list[int]:
            new_token_ids = new(drafter, state, outcome)
            self.steps.append((*before[outcome.seq_id], new_token_ids))
            return new_token_ids

        monkeypatch.setattr(LookaheadDrafter, "_propose", proposing)
        monkeypatch.setattr(LookaheadDrafter, "_new_token_ids", observing)

    def wrong_places(self, path: str) -> int:
        """How many new tokens are not the arg-max of a plain forward over what they may see."""
        model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float64)
        wrong = 0
        for token_ids, rows, new_token_ids in self.steps:
            for column, token_id in enumerate(new_token_ids):
                seen = [*token_ids, *rows[0][1 : column + 1], *(row[column] for row in rows[1:])]
                with torch.no_grad():
                    logits = model(torch.tensor([seen])).logits[0, -1]
                wrong += int(logits.argmax()) != token_id
        return wrong


def test_the_windows_trajectory_is_that_of_plain_forwards(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trajectory = Trajectory(monkeypatch)
    run(make_llm(models.target, SETTINGS), harness.PROMPTS[:3], GREEDY)
    assert sum(len(new_token_ids) for _, _, new_token_ids in trajectory.steps) > 100
    assert trajectory.wrong_places(models.target) == 0


@pytest.mark.parametrize("broken", ["mask", "depths"])
def test_a_window_with_a_wrong_mask_or_wrong_positions_is_noticed(
    broken: str, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = input_batch.tree_rows

    def wrong(parents: tuple[int, ...], num_computed: int) -> input_batch.TreeRows:
        tree, size = real(parents, num_computed), len(parents)
        if broken == "depths":
            return dataclasses.replace(tree, depths=np.arange(size))
        return dataclasses.replace(tree, mask=SuffixMask(np.tril(np.ones((size, size), np.bool_))))

    monkeypatch.setattr(input_batch, "tree_rows", wrong)
    trajectory = Trajectory(monkeypatch)
    run(make_llm(models.target, SETTINGS), harness.PROMPTS[:3], GREEDY)
    assert trajectory.wrong_places(models.target) > 0


def test_a_repetitive_text_takes_fewer_passes_of_the_target(
    models: Any, plain_greedy: harness.Run
) -> None:
    """The tiny target falls into a circle sooner or later, and the window finds it."""
    llm = make_llm(models.target, {**SETTINGS, "prompt_ngrams": False})
    result = run(llm, params=GREEDY)
    assert result.tokens == plain_greedy.tokens
    assert result.stats["num_steps"] < 0.8 * plain_greedy.stats["num_steps"]


@pytest.mark.parametrize("options", [{}, SITUATIONS["a pool that forces preemption"]])
def test_the_targets_cache_holds_nothing_of_the_window(
    options: dict[str, int], models: Any
) -> None:
    checker = Checker(every=5)
    llm = make_llm(models.target, SETTINGS, **options)
    for _ in range(2):
        result = run(llm, on_step=checker)
    assert checker.num_rows["target"] > 200
    assert checker.worst < 1e-9
    assert_speculated(result.stats, moved=True)


def test_rows_that_are_not_moved_over_the_window_are_noticed(
    models: Any, plain: harness.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit.Committer, "_move_accepted", lambda *_: None)
    checker = Checker(every=5)
    result = run(make_llm(models.target, SETTINGS), on_step=checker)
    assert checker.worst > 1e-3
    assert result.tokens != plain.tokens


def test_the_options_of_a_request_are_not_applied_to_scratch_rows(models: Any) -> None:
    """A logits processor is called once for the root and each verified node."""
    calls: list[list[int]] = []

    def processor(output_token_ids: list[int], logits: Any) -> Any:
        calls.append(output_token_ids)
        return logits

    params = SamplingParams(
        temperature=0, max_tokens=20, ignore_eos=True, logits_processors=[processor]
    )
    result = run(make_llm(models.target, SETTINGS), [[3, 4, 5] * 4], params)
    assert result.stats["num_draft_tokens"] > 0
    assert len(calls) == result.stats["num_draft_tokens"] + result.stats["num_target_passes"]
    assert result.stats["num_scheduled_tokens"] > 12 + len(calls)  # scratch rows were run
