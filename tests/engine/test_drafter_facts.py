"""What a drafter says of itself is read and checked when the engine is made, and never again."""

from __future__ import annotations

from typing import Any

import pytest
from harness import PROMPTS, Run, make_llm, run

from folospec import Drafter, Proposal, register_drafter
from folospec.core.token_tree import TokenTree
from folospec.spec.drafters.base import DrafterNeeds


class Plain(Drafter):
    def propose(self, rows: list[Any]) -> list[Proposal | None]:
        return [Proposal(TokenTree.chain([1])) for _ in rows]


FACTS: dict[str, tuple[Any, str]] = {
    "num_speculative_tokens": (2.5, "integer of at least 1"),
    "max_scratch_slots": (-1, "integer of at least 0"),
    "needs": ({"prediction": True}, "must be a DrafterNeeds"),
    "kv_owner": ("target", "None or a name under which it has loaded a model"),
    "drafts_in_passes": (1, "True or False"),
    "has_static_tree": (None, "True or False"),
}


@pytest.mark.parametrize("fact", FACTS)
def test_a_fact_out_of_range_is_refused_when_the_engine_is_made(fact: str, models: Any) -> None:
    value, message = FACTS[fact]
    name = f"wrong {fact}"
    register_drafter(name, type("Wrong", (Plain,), {fact: value}))
    with pytest.raises(ValueError, match=f"{fact} of {name} must be .*{message}|{message}"):
        make_llm(models.target, name)


@pytest.mark.parametrize(
    "needs",
    [
        DrafterNeeds(aux_hidden_state_layers=(9,)),
        DrafterNeeds(aux_hidden_state_layers=[0]),
        DrafterNeeds(num_top_tokens=1.0),
        DrafterNeeds(prediction=1),
    ],
)
def test_needs_out_of_range_are_refused(needs: Any, models: Any) -> None:
    name = f"wrong {needs}"
    register_drafter(name, type("Wrong", (Plain,), {"needs": needs}))
    with pytest.raises(ValueError, match="must be"):
        make_llm(models.target, name)


def test_a_factory_that_builds_no_drafter_is_refused(models: Any) -> None:
    register_drafter("no drafter", lambda context: object())
    with pytest.raises(ValueError, match="must be built as a Drafter, got a object"):
        make_llm(models.target, "no drafter")


@pytest.mark.parametrize("fact", FACTS)
def test_a_fact_that_can_no_longer_be_read_ends_no_step(fact: str, models: Any, plain: Run) -> None:
    def read(drafter: Any) -> Any:
        if drafter.is_broken:
            raise RuntimeError("no longer")
        return getattr(Plain(drafter.context), fact)

    class Forgetful(Plain):
        is_broken = False

        def __init__(self, context: Any) -> None:
            super().__init__(context)
            self.context = context

    name = f"forgetful {fact}"
    register_drafter(name, type("Forgetful", (Forgetful,), {fact: property(read)}))
    llm = make_llm(models.target, name)
    llm.drafter(name).is_broken = True  # type: ignore[attr-defined]
    found = run(llm)
    assert found.tokens == plain.tokens
    assert found.stats["num_drafts"] > 0
    assert found.stats["num_drafter_errors"] == 0


def test_an_interrupt_in_a_drafter_is_no_failure_of_it(models: Any) -> None:
    class Interrupted(Plain):
        def propose(self, rows: list[Any]) -> list[Proposal | None]:
            raise KeyboardInterrupt

    register_drafter("interrupted", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(make_llm(models.target, "interrupted", strict_drafters=False), PROMPTS)
