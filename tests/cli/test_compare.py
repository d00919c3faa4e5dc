import json
import re

import pytest

from folospec.cli import compare
from folospec.cli.runner import first_difference

PROMPTS = ("w1 w2 w3 w4 w5", "w6 w6 w6")


@pytest.fixture
def run(folospec, target, draft):
    def call(*arguments, prompts=PROMPTS, rounds=1):
        return folospec(
            "generate",
            *prompts,
            *("--model", target, "--speculative", f"draft_model:{draft}", "--compare"),
            *("--max-tokens", "24", "--rounds", str(rounds), *arguments),
        )

    return call


@pytest.fixture
def speculative_runs_lie(monkeypatch):
    """The last token of every run with drafts is another one."""
    real = compare.drive

    def drive(*arguments):
        run = real(*arguments)
        if run.counts.num_drafts:
            token_ids = run.outputs[-1].outputs[-1].token_ids
            token_ids[-1] = (token_ids[-1] + 1) % 64
        return run

    monkeypatch.setattr(compare, "drive", drive)


@pytest.mark.parametrize("sampling", [(), ("--temperature", "0.8", "-n", "2", "--seed", "1")])
def test_plain_and_speculative_have_the_same_tokens_and_fewer_passes(run, sampling):
    result = run("--json", *sampling, rounds=2)
    record = json.loads(result.stdout)
    plain, speculative = record["methods"]
    assert result.exit_code == 0
    assert record["tokens_equal"] is speculative["tokens_equal"] is True
    assert record["first_difference"] is None
    assert 0 < speculative["num_accepted_tokens"] < speculative["num_draft_tokens"]
    assert plain["num_drafts"] == 0
    assert speculative["num_target_passes"] < plain["num_target_passes"]
    assert plain["num_tokens"] == speculative["num_tokens"] == 48 * (1 + ("-n" in sampling))


def test_the_table_says_what_was_measured(run):
    result = run()
    for words in ("plain", "draft_model", "speed", "1.00x", "acceptance length: 1 + accepted"):
        assert words in result.stdout
    assert result.stdout.endswith("tokens equal: yes\n")
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_without_a_seed_sampled_prompts_differ_and_methods_do_not(run):
    result = run("--json", "--temperature", "1", prompts=("w1", "w1"))
    record = json.loads(result.stdout)
    one, other = (output["outputs"][0]["token_ids"] for output in record["outputs"])
    assert record["tokens_equal"]
    assert one != other


def test_a_single_prompt_is_shown(run):
    assert run(prompts=PROMPTS[:1]).stdout.startswith(PROMPTS[0] + " ─")


def test_other_tokens_are_found_and_exit_code_is_1(run, speculative_runs_lie):
    result = run()
    assert result.exit_code == 1
    assert "tokens equal: no" in result.stdout
    token = r"'w\d+' \(\d+\)"
    pattern = rf"prompt 2, completion 1, token 24: plain {token}, the other run {token}"
    assert re.search(pattern, result.stdout)


def test_a_rule_that_promises_the_distribution_may_differ(run):
    result = run("--acceptance", "rejection", "--temperature", "1")
    assert result.exit_code == 0
    assert "tokens equal: no" in result.stdout
    assert "promises the same distribution, not the same tokens" in result.stdout
    assert (
        json.loads(run("--acceptance", "rejection", "--json").stdout)["promise"] == "distribution"
    )


@pytest.mark.parametrize(
    ("left", "right", "where"),
    [
        ([[[1, 2]]], [[[1, 2]]], None),
        ([[[1, 2]], [[3]]], [[[1, 2]], [[4]]], (1, 0, 0)),
        ([[[1], [1, 2, 3]]], [[[1], [1, 2]]], (0, 1, 2)),
        ([[[1, 2, 3]]], [[[1, 5, 3]]], (0, 0, 1)),
    ],
)
def test_the_first_difference_is_where_two_runs_part(left, right, where):
    assert first_difference(left, right) == where
    assert first_difference(right, left) == where
