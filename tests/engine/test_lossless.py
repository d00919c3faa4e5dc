"""Speculative output equals plain output, token for token, whatever the engine is doing
meanwhile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import harness
import numpy as np
import pytest
from fixed_costs import fix_costs
from harness import assert_speculated, make_llm, run

from folospec import SamplingParams
from folospec.attention.metadata import SuffixMask
from folospec.engine import commit
from folospec.spec import verify_batch, verify_rows
from folospec.worker import input_batch

pytestmark = pytest.mark.usefixtures("oracle")

DRAFTERS = ["ngram", "near", "far", "self", "top_k", "adaptive", "oracle_tree"]
TREES = ["expansion", "sequoia", "dynamic", "top_k_tree", "iid_tree", "self_tree"]

SITUATIONS: dict[str, dict[str, Any]] = {
    "a roomy pool": {},
    "blocks of one token": {"block_size": 1},
    "a pool that forces preemption": {"num_blocks": 16, "block_size": 4},
    "chunked prefill": {"max_num_batched_tokens": 7, "max_num_seqs": 5},
    "prompts in one step": {"enable_chunked_prefill": False, "max_num_batched_tokens": 64},
    "no prefix cache": {"enable_prefix_caching": False},
    "few sequences at once": {"max_num_seqs": 3},
}


def speculative(name: str, models: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {"method": "draft_model"}
    draft = {**tree, "num_speculative_tokens": 4}
    return {
        "ngram": {"method": "ngram", "prompt_lookup_min": 1, "num_speculative_tokens": 4},
        "near": {**draft, "model": models.near},
        "far": {**draft, "model": models.far},
        "self": {**draft, "model": models.target},
        "top_k": {**draft, "model": models.near, "children": "top_k"},
        "expansion": {**tree, "model": models.near, "tree": [3, 2, 1]},
        "sequoia": {**tree, "model": models.near, "tree": "sequoia"},
        "dynamic": {**tree, "model": models.near, "tree": "dynamic"},
        "top_k_tree": {**tree, "model": models.near, "tree": [3, 2], "children": "top_k"},
        "iid_tree": {**tree, "model": models.near, "tree": [3, 2], "children": "iid"},
        "self_tree": {**tree, "model": models.target, "tree": [2, 2, 2]},
        "adaptive": {**draft, "model": models.near, "adaptive": True},
        "oracle_tree": {"method": "oracle_tree", "num_speculative_tokens": 12},
    }[name]


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("drafter", [*DRAFTERS, *TREES])
def test_speculative_tokens_equal_plain_tokens(
    drafter: str, situation: str, models: Any, plain: harness.Run
) -> None:
    llm = make_llm(models.target, speculative(drafter, models), **SITUATIONS[situation])
    if drafter == "adaptive":
        fix_costs(llm)
    result = run(llm)
    assert result.tokens == plain.tokens
    assert result.logprobs == pytest.approx(plain.logprobs, abs=1e-9)
    assert [[c.finish_reason for c in o.outputs] for o in result.outputs] == [
        [c.finish_reason for c in o.outputs] for o in plain.outputs
    ]
    moved = drafter == "oracle_tree" or drafter in TREES
    assert_speculated(result.stats, rejected=drafter != "self", moved=moved)
    if "preemption" in situation:
        assert result.stats["num_preemptions"] > 0


@pytest.mark.parametrize("situation", ["a pool that forces preemption", "few sequences at once"])
def test_plain_tokens_do_not_depend_on_the_batch(
    situation: str, models: Any, plain: harness.Run
) -> None:
    assert run(make_llm(models.target, **SITUATIONS[situation])).tokens == plain.tokens


def test_a_drafter_that_always_lies_changes_nothing(models: Any, plain: harness.Run) -> None:
    result = run(make_llm(models.target, {"method": "adversarial", "num_speculative_tokens": 3}))
    assert result.tokens == plain.tokens
    assert result.stats["num_drafts"] > 0
    assert result.stats["num_accepted_tokens"] == 0


def test_a_drafter_that_raises_loses_its_turn_only(models: Any, plain: harness.Run) -> None:
    settings = {"method": "irregular", "num_speculative_tokens": 6}
    result = run(make_llm(models.target, settings, strict_drafters=False))
    assert result.tokens == plain.tokens
    assert result.stats["num_drafter_errors"] > 0
    assert_speculated(result.stats)
    with pytest.raises(RuntimeError, match="not in the mood"):
        run(make_llm(models.target, settings, strict_drafters=True))


def test_a_prefix_hit_changes_nothing(models: Any) -> None:
    prompts = [list(range(1, 30)), [*range(1, 30), 31], [*range(1, 20), 40]] * 2
    params = SamplingParams(temperature=0.9, seed=5, max_tokens=16, ignore_eos=True)
    expected = run(make_llm(models.target, enable_prefix_caching=False), prompts, params)
    llm = make_llm(models.target, speculative("near", models), block_size=4)
    first, second = run(llm, prompts, params), run(llm, prompts, params)
    assert first.tokens == second.tokens == expected.tokens
    assert second.stats["prefix_cache_hits"] > 0
    assert_speculated(second.stats)


def test_the_drafts_of_a_perfect_drafter_are_all_accepted_through_every_disturbance(
    models: Any,
) -> None:
    """The target as its own draft model: one wrong row of draft KV, one wrong noise key, and a
    draft is rejected. Preemption, prefix hits, forks and chunks all have to be caught up
    exactly."""
    for situation, options in SITUATIONS.items():
        llm = make_llm(models.target, speculative("self", models), **options)
        for _ in range(2):
            stats = run(llm).stats
        assert stats["num_drafts"] > 0, situation
        assert stats["num_accepted_tokens"] == stats["num_draft_tokens"], situation


def test_a_draft_progress_that_claims_too_much_is_noticed(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control of the test above: without catch-up the perfect drafter is not perfect any more."""
    from folospec.spec.drafters.draft_model import DraftModelDrafter

    def from_the_root(self: Any, row: Any) -> Any:
        row.num_draft_computed = row.root_position
        return original(self, row)

    original = DraftModelDrafter._catch_up_rows
    monkeypatch.setattr(DraftModelDrafter, "_catch_up_rows", from_the_root)
    stats = run(make_llm(models.target, speculative("self", models))).stats
    assert stats["num_accepted_tokens"] < stats["num_draft_tokens"]


def misread_trees(monkeypatch: pytest.MonkeyPatch, **wrong: Any) -> None:
    """Replace what is read from a tree's shape; each is made from the number of rows and of
    computed ones."""
    real = input_batch.tree_rows

    def misread(parents: tuple[int, ...], num_computed: int) -> input_batch.TreeRows:
        made = {name: make(len(parents), num_computed) for name, make in wrong.items()}
        return replace(real(parents, num_computed), **made)

    monkeypatch.setattr(input_batch, "tree_rows", misread)


class TestControls:
    """Each breaks one thing that the promise rests on; the tokens must change."""

    def test_kv_rows_that_are_not_moved_are_noticed(
        self, models: Any, plain: harness.Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(commit.Committer, "_move_accepted", lambda *_: None)
        llm = make_llm(models.target, speculative("oracle_tree", models))
        assert run(llm).tokens != plain.tokens

    def test_a_tree_read_as_a_chain_is_noticed(
        self, models: Any, plain: harness.Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lower = np.tri(64, dtype=np.bool_)
        misread_trees(monkeypatch, mask=lambda n, done: SuffixMask(lower[done:n, :n]))
        llm = make_llm(models.target, speculative("oracle_tree", models))
        assert run(llm).tokens != plain.tokens

    def test_positions_by_row_instead_of_depth_are_noticed(
        self, models: Any, plain: harness.Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        misread_trees(monkeypatch, depths=lambda n, done: np.arange(n))
        llm = make_llm(models.target, speculative("oracle_tree", models))
        assert run(llm).tokens != plain.tokens

    def test_accepting_a_draft_unseen_is_noticed(
        self, models: Any, plain: harness.Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(verify_rows, "verify_coupled", harness.trusting)
        llm = make_llm(models.target, speculative("far", models))
        assert run(llm).tokens != plain.tokens

    def test_a_history_without_the_draft_path_is_noticed(
        self, models: Any, plain: harness.Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            harness.TokenTree, "path_token_ids", lambda self, node: [0] * self.depths[node]
        )
        llm = make_llm(models.target, speculative("near", models))
        assert run(llm).tokens != plain.tokens

    def test_noise_that_is_keyed_by_the_row_is_noticed(
        self, models: Any, plain: harness.Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = verify_batch._verify_by_draw

        def by_row(steps: Any, log_probs: Any, rule: Any) -> None:
            keys = iter(range(10**6))
            with monkeypatch.context() as patch:
                patch.setattr(verify_batch.noise, "key", lambda *_: next(keys))
                real(steps, log_probs, rule)

        monkeypatch.setattr(verify_batch, "_verify_by_draw", by_row)
        llm = make_llm(models.target, speculative("near", models))
        assert run(llm).tokens != plain.tokens

    def test_a_lost_kv_row_is_noticed(
        self, models: Any, plain: harness.Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = commit.Committer._advance

        def forgetful(self: Any, seq: Any, num_computed_tokens: int) -> None:
            real(self, seq, num_computed_tokens)
            last = self.manager.slot(seq, seq.num_computed_tokens - 1)
            self._worker.target.kv.layers[0].key[last] = 0.0

        monkeypatch.setattr(commit.Committer, "_advance", forgetful)
        llm = make_llm(models.target, speculative("near", models))
        assert run(llm).tokens != plain.tokens
