"""What hindsight says: the best rule and foresight, on steps that can be reckoned by hand."""

import json
from types import SimpleNamespace

import pytest

from benchmarks.acceptance import bound
from benchmarks.acceptance.hindsight import Node, RowCurve, best_rule, foresight

FLAT = RowCurve({1: 2.0, 9: 2.0})
"""Rows cost nothing."""
STEEP = RowCurve({1: 1.0, 2: 2.0, 9: 9.0})
"""A row costs as much as a step."""


def draft(*chances, accepted):
    """A chain of which so many tokens are accepted."""
    return [Node(chance, place < accepted) for place, chance in enumerate(chances)]


LONG = draft(0.9, 0.8, 0.7, 0.6, accepted=4)
WRONG = draft(0.3, 0.2, accepted=0)


def test_a_row_curve_is_in_steps_of_one_row_and_straight_between_its_points():
    curve = RowCurve({1: 2.0, 2: 2.5, 4: 3.5})
    assert [curve(rows) for rows in (1, 2, 3, 4, 6)] == [1.0, 1.25, 1.5, 1.75, 2.25]


def test_more_rows_are_never_cheaper():
    curve = RowCurve({1: 1.0, 2: 0.9, 4: 1.5, 8: 1.2})
    assert [curve(rows) for rows in (1, 2, 4, 6, 8)] == [1.0, 1.0, 1.5, 1.5, 1.5]
    assert RowCurve({1: 3.0})(20) == 1.0
    with pytest.raises(ValueError, match="1 row, got "):
        RowCurve({2: 1.0})


def test_where_rows_cost_nothing_all_is_drafted():
    rule = best_rule([LONG, WRONG, []], FLAT)
    assert rule.limit >= 4
    assert rule.floor <= 0.6
    assert rule.plain_steps_per_token == pytest.approx(3 / 7)  # 5, 1 and 1 tokens
    assert foresight([LONG, WRONG, []], FLAT) == pytest.approx(3 / 7)


def test_where_a_row_costs_a_step_nothing_is_drafted():
    assert best_rule([LONG, WRONG], STEEP).plain_steps_per_token == 1.0
    assert foresight([LONG, WRONG], STEEP) == pytest.approx(1.0)


def test_the_best_rule_leaves_out_what_is_unlikely_and_foresight_what_is_wrong():
    curve = RowCurve({1: 1.0, 5: 1.8})  # 0.2 a row
    surprise = draft(0.3, 0.2, accepted=2)
    drafts = [LONG, WRONG, WRONG, WRONG, surprise]
    rule = best_rule(drafts, curve)
    assert 0.3 < rule.floor <= 0.6
    assert rule.plain_steps_per_token == pytest.approx((1.8 + 3 + 1) / (5 + 3 + 1))
    assert foresight(drafts, curve) == pytest.approx((1.8 + 3 + 1.4) / (5 + 3 + 3))


def test_foresight_stops_where_more_rows_do_not_pay():
    curve = RowCurve({1: 1.0, 3: 1.0, 4: 9.0})
    assert foresight([draft(0.9, 0.9, 0.9, accepted=3)], curve) == pytest.approx(1 / 3)


def test_control_a_rule_of_one_limit_alone_is_slower():
    curve = RowCurve({1: 1.0, 5: 1.8})
    drafts = [LONG, WRONG, WRONG, WRONG]
    of_limits = min(
        (1.8 + 3 * curve(1 + min(limit, 2))) / (1 + min(limit, 4) + 3) for limit in (1, 2, 3, 4)
    )
    assert best_rule(drafts, curve).plain_steps_per_token < of_limits


def test_without_steps_nothing_can_be_said():
    for ask in (best_rule, foresight):
        with pytest.raises(ValueError, match="got none"):
            ask([], FLAT)


def test_chances_multiply_along_a_tree():
    def node(parent, confidence, verdict):
        return SimpleNamespace(parent=parent, confidence=confidence, verdict=verdict)

    nodes = [node(-1, 0.5, "accepted"), node(0, 0.5, "rejected"), node(0, None, "accepted")]
    proposal = SimpleNamespace(nodes=nodes)
    step = SimpleNamespace(sequences=[SimpleNamespace(proposal=proposal)])
    assert bound.draft_of(step) == [Node(0.5, True), Node(0.25, False), Node(0.5, True)]
    assert bound.draft_of(SimpleNamespace(sequences=[SimpleNamespace(proposal=None)])) == []


def test_the_prompts_take_their_time_whatever_is_drafted():
    found = bound.Measured(
        seconds={"plain": [4.0, 4.0, 4.0], "auto": [2.0, 4.0, 3.2]},
        prompt_seconds=[1.0, 1.0, 1.0],
        curves=[dict.fromkeys(bound.ROWS, 0.01)] * 3,
        drafts=[draft(0.9, 0.8, accepted=2)],
    )
    row = bound.summary(found, tokens=100)
    assert row["plain_tokens_per_second"] == 25.0
    assert row["auto_ratio"] == 1.25
    assert row["bound_ratio"] == row["foresight_ratio"] == pytest.approx(4 / (1 + 3 / 3))
    assert row["share_of_bound"] == pytest.approx(1.25 / 2)
    assert (row["acceptance_length"], row["share_drafted"]) == (3.0, 1.0)


def test_a_run_has_a_row_for_every_task_and_temperature(tmp_path, monkeypatch):
    monkeypatch.setattr(bound, "ROWS", (1, 2, 8))
    out = tmp_path / "rows.jsonl"
    options = ["--tasks", "completion", "--temperatures", "0,0.8", "--rounds", "1"]
    model = ["--model", "folospec-demo", "--dtype", "float32", "--max-tokens", "12"]
    bound.main([*model, *options, "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["task"], row["temperature"]) for row in rows] == [
        ("completion", 0.0),
        ("completion", 0.8),
    ]
    for row in rows:
        assert row["tokens_equal"]
        assert row["foresight_ratio"] >= row["bound_ratio"] > 0
        assert list(row["row_curve"]) == ["1", "2", "8"]
    assert bound.table(rows).row_count == 2


def test_unknown_tasks_are_refused(capsys):
    with pytest.raises(SystemExit):
        bound.main(["--tasks", "poetry"])
    assert "got 'poetry'" in capsys.readouterr().err
