"""What a drafter does to its proposal, or to a step's result, stays with it: neither verification,
nor another drafter, nor the trace sees it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from harness import PROMPTS, VOCAB_SIZE, assert_speculated, make_llm, run
from hostile_drafters import spoil

from folospec import Drafter, Proposal, SamplingParams, register_drafter
from folospec.core.token_tree import TokenTree
from folospec.spec import checks
from folospec.spec.drafters.base import StepResult
from folospec.trace.records import StepTrace

DRAFT = (7, 30)


class Spoiler(Drafter):
    """Draws from a distribution that it keeps, and spoils what it is given back."""

    is_hostile = True
    kept: list[torch.Tensor] = []

    def propose(self, requests: list[Any]) -> list[Proposal | None]:
        self.kept.clear()
        return [self._proposal() for _ in requests]

    def _proposal(self) -> Proposal:
        one_hot = torch.nn.functional.one_hot(torch.tensor(DRAFT), VOCAB_SIZE).double()
        self.kept.append(one_hot)
        return Proposal(TokenTree(DRAFT, (-1, -1)), draft_probs=one_hot, confidence=(0.5, 0.5))

    def observe(self, results: list[StepResult]) -> None:
        if self.is_hostile:
            spoil(results)


class Witness(Drafter):
    """Is asked after the spoiler, and looks at what is left."""

    results: list[StepResult] = []

    def propose(self, requests: list[Any]) -> list[Proposal | None]:
        for probs in Spoiler.kept if Spoiler.is_hostile else ():
            probs.fill_(math.nan)
        return [None for _ in requests]

    def observe(self, results: list[StepResult]) -> None:
        self.results.extend(results)


register_drafter("spoiler", Spoiler)
register_drafter("witness", Witness)


def run_both(model: str, merge: bool, hostile: bool) -> tuple[Any, list[StepTrace]]:
    Spoiler.is_hostile = hostile
    Spoiler.kept.clear()
    Witness.results.clear()
    drafters = {"drafters": ["spoiler", "witness"], "merge": merge, "acceptance": "rejection"}
    llm = make_llm(model, drafters, strict_drafters=False)
    steps: list[StepTrace] = []
    llm.engine.on_step = steps.append
    bias = dict.fromkeys(DRAFT, 3.0)
    params = SamplingParams(seed=3, max_tokens=24, ignore_eos=True, logit_bias=bias)
    return run(llm, PROMPTS[:3], [params] * 3), steps


def check_seen(steps: list[StepTrace]) -> None:
    assert Witness.results
    for result in Witness.results:
        assert result.proposal is not None
        assert result.proposal.tree.depths == (1, 1)
        assert result.proposal.draft_probs is not None
        assert result.proposal.draft_probs.sum(1).tolist() == [1.0, 1.0]
    nodes = [
        n for t in steps for s in t.sequences if s.proposal is not None for n in s.proposal.nodes
    ]
    assert {node.draft_prob for node in nodes} == {1.0}


@pytest.mark.parametrize("merge", [False, True])
def test_a_drafter_that_spoils_its_proposal_spoils_it_for_itself(merge: bool, models: Any) -> None:
    honest, _ = run_both(models.target, merge, hostile=False)
    found, steps = run_both(models.target, merge, hostile=True)
    assert found.tokens == honest.tokens
    assert found.stats["num_drafter_errors"] == 0
    assert_speculated(found.stats)
    check_seen(steps)


def test_a_result_that_is_shared_is_noticed(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Proposal, "copy", lambda proposal: proposal)
    _, steps = run_both(models.target, merge=True, hostile=True)
    with pytest.raises((AssertionError, IndexError)):
        check_seen(steps)


def test_a_distribution_that_is_shared_is_noticed(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, _ = run_both(models.target, merge=True, hostile=False)
    monkeypatch.setattr(checks.ProposalChecks, "_take_probs", lambda _, probs, size: probs)
    found, _ = run_both(models.target, merge=True, hostile=True)
    assert found.tokens != honest.tokens
