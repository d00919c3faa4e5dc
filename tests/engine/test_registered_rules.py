"""Acceptance rules that are registered run in the engine and promise what they say."""

from __future__ import annotations

from typing import Any

import pytest
from harness import PROMPTS, Run, assert_speculated, make_llm, mixed_params, run
from registered_rules import RULES

from folospec import EngineBrokenError
from folospec.spec.acceptance import AcceptanceRule, register_acceptance_rule
from folospec.spec.verify import Verdict

pytestmark = pytest.mark.usefixtures("oracle")


def speculative(acceptance: str, **settings: Any) -> dict[str, Any]:
    return {
        "method": "oracle_tree",
        "num_speculative_tokens": 12,
        "acceptance": acceptance,
        **settings,
    }


def test_a_rule_that_shares_noise_gives_the_tokens_of_plain_decoding(
    models: Any, plain: Run
) -> None:
    found = run(make_llm(models.target, speculative("one")))
    assert found.tokens == plain.tokens
    assert found.stats["lossless"] == "tokens"
    assert_speculated(found.stats, moved=True)
    histograms = [output.metrics.acceptance_histogram for output in found.outputs]
    assert {len(histogram) for histogram in histograms} <= {1, 2}, "it accepts one at a time"


def test_a_rule_of_its_own_coins_is_called_for_every_proposal(models: Any, plain: Run) -> None:
    found = run(make_llm(models.target, speculative("first_children")))
    greedy = [0, 3]
    assert [found.tokens[i] for i in greedy] == [plain.tokens[i] for i in greedy]
    assert found.stats["lossless"] == "distribution"
    assert_speculated(found.stats)


def test_a_lossy_rule_is_refused_unless_it_is_allowed(models: Any) -> None:
    with pytest.raises(ValueError, match="allow_lossy must be True, got 'likely'"):
        make_llm(models.target, speculative("likely"))


def test_a_lossy_rule_says_that_it_is_one(models: Any, plain: Run) -> None:
    found = run(make_llm(models.target, speculative("likely", allow_lossy=True)))
    assert found.stats["lossless"] == "none"
    assert found.tokens != plain.tokens
    assert_speculated(found.stats)


def test_a_verdict_that_is_no_path_is_refused(models: Any) -> None:
    llm = make_llm(models.target, speculative("nowhere", allow_lossy=True))
    words = "acceptance rule 'nowhere' must return a path of the tree"
    with pytest.raises(EngineBrokenError, match=words) as caught:
        run(llm)
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("name", ["fails_on_tokens", "fails_on_probs"])
def test_what_a_rule_raises_reaches_the_user_with_the_name_of_the_rule(
    models: Any, name: str
) -> None:
    words = f"acceptance rule '{name}' raised TypeError: a tree is no list"
    with pytest.raises(EngineBrokenError, match=words) as caught:
        run(make_llm(models.target, speculative(name)))
    error = caught.value.__cause__
    assert isinstance(error, RuntimeError)
    assert isinstance(error.__cause__, TypeError)
    [alone] = run(
        make_llm(models.target, speculative(name)), PROMPTS[:1], mixed_params()[:1]
    ).outputs
    assert words in (alone.error or "")


def test_allowing_lossy_rules_changes_none_that_is_lossless(models: Any, plain: Run) -> None:
    found = run(make_llm(models.target, speculative("coupled", allow_lossy=True)))
    assert found.tokens == plain.tokens
    assert found.stats["lossless"] == "tokens"


@pytest.mark.parametrize(
    ("name", "rule", "message"),
    [
        ("coupled", RULES["one"], "name must be a name that none of"),
        ("", RULES["one"], "name must be a name"),
        ("new", verify := lambda *_: Verdict([], 0), "must be an AcceptanceRule"),
        ("new", AcceptanceRule(verify, "none", True, False, has_kernels=True), "has_kernels=False"),
    ],
)
def test_what_is_no_rule_is_not_registered(name: str, rule: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register_acceptance_rule(name, rule)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"promise": "path"}, "promise must be one of tokens, distribution, none, got 'path'"),
        ({"verify": None}, "verify must be a function"),
        ({"takes_trees": 1}, "takes_trees must be True or False"),
    ],
)
def test_a_rule_has_to_say_what_it_is(values: dict[str, Any], message: str) -> None:
    facts = {"promise": "none", "takes_trees": True, "shares_noise": True, **values}
    with pytest.raises(ValueError, match=message):
        AcceptanceRule(**{"verify": verify, **facts})


def test_a_rule_for_chains_cannot_be_merged(models: Any) -> None:
    settings = {"drafters": ["ngram", "suffix"], "merge": True, "acceptance": "block"}
    with pytest.raises(ValueError, match="merge must be False with acceptance='block'"):
        make_llm(models.target, settings)
