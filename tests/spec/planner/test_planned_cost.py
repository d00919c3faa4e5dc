"""The cost of a step follows what steps take, whatever else the machine does."""

from __future__ import annotations

import random

import pytest

from folospec.spec.planner.step_cost import CostCurve, DraftCall, DraftCost, StepCost, StepShape

CURVE = CostCurve({1: 0.010, 8: 0.011, 64: 0.020})


def ratio(cost, num_rows=8):
    """What a step with drafts costs, against one without."""
    seconds = cost.table(StepShape(1, 1), num_rows)
    return float(seconds[num_rows] + cost.asking) / float(seconds[0])


def feed(cost, true, count, *, noise=0.05, slow=lambda i: 1.0, seed=0):
    rng = random.Random(seed)
    for i in range(count):
        num_rows = rng.choice([0, 4, 8])
        seconds = true(num_rows) * slow(i) * rng.lognormvariate(0, noise)
        cost.observe(StepShape(1, 1), num_rows, seconds)


def dear(num_rows):
    return 0.010 + 0.002 * num_rows


def test_a_curve_is_linear_between_its_points_and_goes_on_beyond_them():
    assert CURVE.at(1) == 0.010
    assert CURVE.at(36) == pytest.approx(0.0155)
    assert CURVE.at(127) == pytest.approx(0.030)


def test_a_pass_with_more_rows_never_costs_less():
    assert CostCurve({1: 0.010, 2: 0.008, 4: 0.011}).at(2) == 0.010


@pytest.mark.parametrize("points", [{}, {0: 1.0}, {1: 0.0}, {1: float("nan")}])
def test_impossible_points_are_refused(points):
    with pytest.raises(ValueError, match="points must have positive"):
        CostCurve(points)


def test_a_wrong_slope_is_learned():
    cost = StepCost(CURVE)
    assert ratio(cost) < 1.2
    feed(cost, dear, 150)
    assert ratio(cost) == pytest.approx(dear(8) / dear(0), rel=0.15)


def test_that_someone_is_asked_costs_something_even_if_nothing_comes_of_it():
    rng = random.Random(0)
    cost = StepCost(CURVE)
    for i in range(150):
        asked = i % 2 == 0
        seconds = (0.010 + 0.001 * asked) * rng.lognormvariate(0, 0.05)
        cost.observe(StepShape(1, 1), 0, seconds, asked=asked)
    assert cost.asking == pytest.approx(0.001, rel=0.3)
    assert cost.table(StepShape(1, 1), 0)[0] == pytest.approx(0.010, rel=0.05)


def observe_questions(cost, count, *, told):
    """Asking costs 0.2 ms, and 3 ms more where it is a model; `told` is whether that is known."""
    rng = random.Random(1)
    for i in range(count):
        asked, model = i % 3 > 0, i % 3 > 1
        seconds = (0.010 + 0.0002 * asked + 0.003 * model) * rng.lognormvariate(0, 0.02)
        cost.observe(StepShape(1, 1), 0, seconds, asked=asked, model=model and told)


def test_what_a_model_leaves_in_caches_is_not_held_against_lookups():
    cost = StepCost(CURVE)
    observe_questions(cost, 200, told=True)
    assert cost.asking < 0.0004
    assert cost.asking_model == pytest.approx(0.003, rel=0.2)


def test_control_where_models_are_not_told_apart_lookups_pay_for_them():
    cost = StepCost(CURVE)
    observe_questions(cost, 200, told=False)
    assert cost.asking > 0.001


def test_a_machine_that_is_half_as_fast_for_a_while_changes_no_ratio():
    cost = StepCost(CURVE)
    feed(cost, dear, 150)
    before = ratio(cost)
    feed(cost, dear, 60, slow=lambda i: 2.0, seed=1)
    assert ratio(cost) == pytest.approx(before, rel=0.15)
    assert cost.slowdown > 1.5


def test_one_step_that_hangs_changes_little():
    cost = StepCost(CURVE)
    feed(cost, dear, 150)
    before = ratio(cost)
    cost.observe(StepShape(1, 1), 8, 5.0)
    assert ratio(cost) == pytest.approx(before, rel=0.15)


def test_the_first_steps_are_not_learned_from():
    cost = StepCost(CURVE)
    before = ratio(cost)
    for _ in range(2):
        cost.observe(StepShape(1, 1), 8, 3.0)
    assert ratio(cost) == before


def test_what_drafting_costs_is_learned_by_rows_passes_and_tokens_behind():
    rng = random.Random(0)
    cost = DraftCost(0.010, in_passes=True)
    for _ in range(200):
        rows, passes, num_uncomputed = (
            rng.choice([1, 4, 8]),
            rng.choice([1, 2, 4]),
            rng.choice([0, 0, 200]),
        )
        seconds = 0.002 * passes + 0.0001 * rows * passes + 0.00002 * num_uncomputed
        call = DraftCall(rows, passes, rows * passes, num_uncomputed)
        cost.observe(call, seconds * rng.lognormvariate(0, 0.05), 1.0)
    call, row, one_pass, level, num_unread = cost.parts(1.0)
    assert call + row < 0.0015
    assert one_pass == pytest.approx(0.002, rel=0.25)
    assert level == pytest.approx(0.0001, rel=0.5)
    assert num_unread == pytest.approx(0.00002, rel=0.3)
