"""The acceptance benchmarks, small: rows say what happened, and a lie or a failure would show."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.acceptance import calibration, coupling, length
from benchmarks.lib import drafters, stepping, tasks
from folospec import Drafter, Proposal, register_drafter
from folospec.core.token_tree import TokenTree
from folospec.models.loader import load_tokenizer
from folospec.spec import verify

SMALL = ["--items", "2", "--max-tokens", "12"]


class BrokenDrafter(Drafter):
    def propose(self, rows):
        raise RuntimeError("not today")


class SureDrafter(Drafter):
    """Says the token 0 of everything, and is sure of it."""

    def propose(self, rows):
        return [Proposal(TokenTree.chain([0]), confidence=[1.0]) for _ in rows]


register_drafter("broken_in_benchmarks", BrokenDrafter)
register_drafter("sure_in_benchmarks", SureDrafter)


def run(tmp_path, *options):
    out = tmp_path / "rows.jsonl"
    status = length.main([*SMALL, *options, "--out", str(out)])
    return status, [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    chosen = ("--drafters", "ngram; draft_model", "--tasks", "completion,editing_steered")
    status, rows = run(tmp_path_factory.mktemp("acceptance"), *chosen)
    assert status == 0
    return {(row["task"], row["temperature"], row["contestant"]): row for row in rows}


def test_there_is_a_row_for_each_cell_and_no_model_is_steered(measured):
    expected = [("completion", t, name) for t in (0.0, 0.8) for name in ("ngram", "draft_model")]
    expected += [("editing_steered", t, "ngram") for t in (0.0, 0.8)]
    assert list(measured) == expected
    assert not any("error" in row for row in measured.values())


def test_acceptance_follows_from_the_counts(measured):
    for row in measured.values():
        assert row["tokens_equal_to_plain"]
        assert sum(row["acceptance_histogram"]) == row["num_drafts"]
        if row["num_drafts"]:  # in two short functions there may be nothing to copy
            accepted = row["acceptance_length"] - 1
            assert sum(row["acceptance_rate_per_pos"]) == pytest.approx(accepted)
        # A pass emits one token, and the accepted ones beside it.
        emitted = row["num_target_passes"] + row["num_accepted_tokens"]
        assert row["num_output_tokens"] == emitted
        assert row["target_passes_per_token"] <= 1
    drafted = measured["completion", 0.0, "draft_model"]
    assert 0 < drafted["num_accepted_tokens"] < drafted["num_draft_tokens"]
    assert measured["editing_steered", 0.0, "ngram"]["num_drafts"] > 0


def test_costs_are_in_passes_of_the_target(measured):
    def step(draft, target, proposal):
        times = SimpleNamespace(draft=draft, target=target)
        return SimpleNamespace(times=times, sequences=[SimpleNamespace(proposal=proposal)])

    # The step without a proposal counts for nothing, and of the others their median.
    steps = [step(0.2, 3.0, [1]), step(9.0, 9.0, None), step(0.1, 2.0, [1]), step(5.0, 4.0, [1])]
    row = length.costs(steps, 2.0)
    assert row == {"plain_pass_seconds": 2.0, "draft_cost": 0.1, "verification_cost": 1.5}
    nothing = {"plain_pass_seconds": 2.0, "draft_cost": None, "verification_cost": None}
    assert length.costs(steps[1:2], 2.0) == nothing
    drafted = measured["completion", 0.0, "draft_model"]
    assert min(drafted["draft_cost"], drafted["verification_cost"]) > 0


def test_no_copier_beats_the_ideal_one(measured):
    row = measured["editing_steered", 0.0, "ngram"]
    assert 0 < row["share_of_ceiling"] <= 1
    assert row["ceiling_target_passes_per_token"] <= row["target_passes_per_token"]
    assert 0 <= row["share_reproduced"] <= 1
    assert "share_of_ceiling" not in measured["completion", 0.0, "ngram"]


def test_the_share_reproduced_is_of_the_expected_tokens_in_order():
    items = [SimpleNamespace(expected_token_ids=list(range(9)), max_tokens=4)] * 2
    plain = length.Plain("", SimpleNamespace(items=items), 0.0)
    plain.token_ids = [[0, 7, 1, 2], [3, 3, 3, 3]]
    assert plain.share_reproduced == (3 + 1) / 8
    nothing = [SimpleNamespace(expected_token_ids=[], max_tokens=4)]
    assert length.Plain("", SimpleNamespace(items=nothing), 0.0).share_reproduced is None


def test_a_row_names_its_source(measured):
    for row in measured.values():
        assert row["provenance"]["command"].startswith(
            "python -m benchmarks.acceptance.length --items 2"
        )
        assert row["settings"]["speculative"]["num_speculative_tokens"] == row["budget"]


def test_control_a_rule_that_emits_other_tokens_ends_with_status_1(tmp_path, monkeypatch):
    really = verify.verify_coupled

    def careless(tree, target_token_ids, candidate=None):
        verdict = really(tree, target_token_ids, candidate)
        return verify.Verdict(verdict.path, 7) if len(tree) else verdict

    monkeypatch.setattr("folospec.spec.verify_rows.verify_coupled", careless)
    status, (row, *_) = run(tmp_path, "--drafters", "ngram", "--tasks", "completion")
    assert status == 1
    assert not row["tokens_equal_to_plain"]
    assert row["first_differences"]


def test_who_fails_has_an_error_and_the_others_go_on(tmp_path, monkeypatch):
    broken = {"broken": "broken_in_benchmarks", "ngram": drafters.CONTESTANTS["ngram"]}
    monkeypatch.setattr(drafters, "CONTESTANTS", broken)
    status, rows = run(tmp_path, "--tasks", "completion")
    assert status == 1
    assert [row.get("error") for row in rows] == ["RuntimeError: not today", None] * 2
    assert length.table(rows).row_count == 4


def test_unknown_names_are_usage_errors(capsys, monkeypatch):
    unknown = {"nobody": {"method": "nobody"}}
    monkeypatch.setattr(drafters, "CONTESTANTS", {**drafters.CONTESTANTS, **unknown})
    cases = [["--drafters", "nobody"], ["--drafters", "ngrams"], ["--tasks", "poetry"]]
    for options in [*cases, ["--items", "0"]]:
        with pytest.raises(SystemExit) as error:
            length.parse_arguments(options)
        assert error.value.code == 2
        assert options[0] in capsys.readouterr().err


def test_a_prediction_reaches_only_who_reads_it():
    """An engine without a reader refuses requests that have one."""
    task = tasks.make_task("editing", load_tokenizer("folospec-demo"), 1, max_tokens=4)
    for name in ("ngram", "prediction"):
        llm = stepping.make_llm("folospec-demo", drafters.CONTESTANTS[name], "float32", 1)
        assert len(stepping.run_task(llm, task, 0.0).token_ids[0]) == 4


def test_who_needs_a_prediction_takes_part_where_there_is_one():
    for name, expected in (("completion", False), ("editing", True), ("prose", False)):
        task = tasks.make_task(name, load_tokenizer("folospec-demo"), 1)
        assert drafters.takes_part("prediction", task) == expected
        assert drafters.takes_part("ngram", task)
    steered = tasks.make_task("editing_steered", load_tokenizer("folospec-demo"), 1)
    assert drafters.takes_part("suffix", steered)
    assert not drafters.takes_part("draft_model", steered)


def test_every_contestant_is_served_by_registered_drafters():
    assert drafters.choose(None, "folospec-demo") == drafters.CONTESTANTS


def test_a_model_without_a_draft_model_meets_those_that_need_none():
    assert drafters.choose(None, "build/models/smollm2/bf16") == drafters.MODEL_FREE
    wanted = {"quantized": drafters.WITH_MODEL["quantized"]}
    assert drafters.choose("quantized", "build/models/smollm2/bf16") == wanted


def test_calibration_error_and_brier_score_of_known_trials():
    tried = [(0.95, True)] * 9 + [(0.95, False)] + [(0.25, False)] * 10 + [(None, True)]
    row = calibration.summary(tried)
    assert (row["num_nodes"], row["num_without_confidence"]) == (20, 1)
    assert row["calibration_error"] == pytest.approx((10 * 0.05 + 10 * 0.25) / 20)
    assert row["brier_score"] == pytest.approx((9 * 0.05**2 + 0.95**2 + 10 * 0.25**2) / 20)
    assert row["brier_score_of_mean"] == pytest.approx(0.45 * 0.55)
    assert [b["from"] for b in row["bins"]] == [0.2, 0.9]
    assert calibration.summary([(None, True)])["num_nodes"] == 0


def test_calibration_sees_the_nodes_that_were_tried(tmp_path):
    out = tmp_path / "rows.jsonl"
    chosen = ["--drafters", "draft_model", "--out", str(out)]
    rows = calibration.main([*SMALL, *chosen])
    assert [json.loads(line)["num_nodes"] for line in out.read_text().splitlines()]
    for row in rows:
        assert row["num_without_confidence"] == 0
        assert 0 < row["mean_accepted"] < 1
        assert row["num_nodes"] == sum(b["num_nodes"] for b in row["bins"])


def test_control_a_drafter_that_is_sure_and_wrong_is_seen(monkeypatch):
    monkeypatch.setattr(drafters, "CONTESTANTS", {"sure": "sure_in_benchmarks"})
    for row in calibration.main(SMALL):
        assert row["mean_confidence"] == 1.0
        assert row["calibration_error"] > 0.9
        assert row["brier_score"] > row["brier_score_of_mean"]


def test_coupling_compares_trees_of_one_shape(tmp_path):
    out = tmp_path / "rows.jsonl"
    options = ["--shape", "3,2", "--prompts", "2", "--max-tokens", "12", "--out", str(out)]
    assert coupling.main([*options, "--min-drafts", "1"]) == 0
    rows = {row["contestant"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == list(coupling.CONTESTANTS)
    assert {tuple(row["settings"]["speculative"]["tree"]) for row in rows.values()} == {(3, 2)}
    for row in rows.values():
        low, high = row["interval"]
        assert low <= row["acceptance_length"] <= high
    lengths = {name: row["acceptance_length"] for name, row in rows.items()}
    ratio = lengths["coupled"] / lengths["top_k"]
    assert rows["top_k"]["coupled_ratio"] == pytest.approx(ratio)
    assert coupling.main([*options, "--min-drafts", "100000"]) == 1


def test_the_bootstrap_is_paired_and_finds_a_difference():
    """Prompts differ much more than the two trees do: only pairing can tell those apart."""
    drafts = np.full(40, 100)
    accepted = np.arange(40) * 10
    better = np.stack([drafts, accepted + 5], 1)
    worse = np.stack([drafts, accepted], 1)
    row = coupling.figures({"coupled": better, "top_k": worse}, "top_k")
    low, high = row["coupled_ratio_interval"]
    assert 1 < low < row["coupled_ratio"] < high < 1.05
    alone = row["interval"]
    assert alone[1] / alone[0] > 1.2
