"""After every step the caches hold, row by row, what a cache computed from scratch would hold: the
target's, and the draft models'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import assert_speculated, make_llm, run

from folospec import LLM
from folospec.core.kv_moves import KVMoves
from folospec.core.token_tree import ROOT, TokenTree
from folospec.engine import commit
from folospec.models.forward import Rows
from folospec.spec.proposer import Proposer
from folospec.worker.model_runner import ModelRunner

DRAFTERS: dict[str, dict[str, Any]] = {
    "chain": {"num_speculative_tokens": 4},
    "expansion": {"tree": [3, 2, 1]},
    "sequoia": {"tree": "sequoia"},
    "dynamic": {"tree": "dynamic"},
    "i.i.d.": {"tree": [3, 2], "children": "iid"},
    "top k": {"tree": [2, 2, 1], "children": "top_k"},
}
SMALL_POOL = {"num_blocks": 16, "block_size": 4}


class Checker:
    """Compares, after every step, the KV rows of every running sequence with rows computed from its
    tokens alone."""

    def __init__(self, every: int = 3) -> None:
        self.every, self.num_steps, self.num_rows = every, 0, {"target": 0, "draft_model": 0}
        self.worst = 0.0

    def __call__(self, llm: LLM) -> None:
        self.num_steps += 1
        if self.num_steps % self.every:
            return
        for seq in llm.engine.scheduler.running:
            progress = {"target": seq.num_computed_tokens, **seq.draft_progress}
            for owner, count in progress.items():
                runner = llm.engine.components.runners[owner]
                if count > 0:
                    slots = llm.engine.manager.slots(seq, 0, count)
                    fresh = rows_from_scratch(runner, seq.token_ids[:count])
                    for layer, expected in zip(runner.kv.layers, fresh.layers, strict=True):
                        for mine, scratch in zip(layer, expected, strict=True):
                            difference = (mine[slots] - scratch[:count]).abs().max()
                            self.worst = max(self.worst, float(difference))
                    self.num_rows[owner] += count


def rows_from_scratch(runner: ModelRunner, token_ids: list[int]) -> Any:
    fresh = ModelRunner(runner.model, max_num_batched_tokens=4096)
    fresh.make_kv(1, len(token_ids), torch.device("cpu"))
    fresh.forward([Rows(token_ids, 0, [0])])
    return fresh.kv


def checked(models: Any, settings: dict[str, Any], **options: Any) -> tuple[Checker, Any]:
    checker = Checker()
    speculative = {"method": "draft_model", "model": models.near, **settings}
    result = run(make_llm(models.target, speculative, **options), on_step=checker)
    return checker, result


@pytest.mark.parametrize("options", [{}, SMALL_POOL], ids=["roomy", "preempting"])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_both_caches_equal_a_cache_computed_from_scratch(
    drafter: str, options: dict[str, int], models: Any, plain: Any
) -> None:
    checker, result = checked(models, DRAFTERS[drafter], **options)
    assert result.tokens == plain.tokens
    assert min(checker.num_rows.values()) > 100
    assert checker.worst < 1e-9
    assert_speculated(result.stats, moved=drafter != "chain")
    assert options == {} or result.stats["num_preemptions"] > 0


def test_rows_of_the_target_that_are_not_moved_are_noticed(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit.Committer, "_move_accepted", lambda *_: None)
    assert checked(models, DRAFTERS["expansion"])[0].worst > 1e-3


def test_rows_of_the_draft_model_that_are_not_moved_are_noticed(
    models: Any, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output cannot tell: only the drafts would be worse."""
    real = commit.Committer._move_draft_kv

    def without_moves(self: Any, *args: Any) -> None:
        *others, _ = args
        real(self, *others, KVMoves())

    monkeypatch.setattr(commit.Committer, "_move_draft_kv", without_moves)
    checker, result = checked(models, DRAFTERS["expansion"])
    assert checker.worst > 1e-3
    assert result.tokens == plain.tokens


@pytest.mark.parametrize("tree", [[2, 2, 2], "dynamic"], ids=str)
@pytest.mark.parametrize("options", [{}, SMALL_POOL, {"block_size": 1}, {"max_num_seqs": 3}])
def test_first_children_of_a_perfect_drafter_are_always_accepted(
    tree: Any, options: dict[str, int], models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target as its own draft model: one wrong row of draft KV, mask or noise key, and the path
    of first children is not accepted to its end."""
    lengths: list[tuple[int, int]] = []
    real = Proposer.observe

    def watching(self: Any, steps: Any, result: Any) -> None:
        for seen in steps:
            if seen.proposal is not None:
                path = seen.verdict.path
                assert path == first_children(seen.proposal.tree)[: len(path)]
                lengths.append((len(path), len(first_children(seen.proposal.tree))))
        real(self, steps, result)

    monkeypatch.setattr(Proposer, "observe", watching)
    speculative = {"method": "draft_model", "model": models.target, "tree": tree}
    llm = make_llm(models.target, speculative, **options)
    for _ in range(2):  # the second run meets cached prefixes
        run(llm)
    assert len(lengths) > 30
    assert all(accepted == expected for accepted, expected in lengths)


def first_children(tree: TokenTree) -> list[int]:
    path: list[int] = []
    while children := tree.children(path[-1] if path else ROOT):
        path.append(children[0])
    return path
