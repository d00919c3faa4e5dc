"""What drafting really gained corrects what plans promise."""

from __future__ import annotations

import random

import pytest
from simulator import Credulous, Fixed, Planned, World, make_jobs, simulate

from folospec.spec.planner.feedback import Feedback
from folospec.spec.planner.plan_terms import Source
from folospec.spec.planner.planner import Planner
from folospec.spec.planner.step_cost import CostCurve, DraftCost, StepCost

CALL = 0.0004


def fed(count, promised, got, expected, taken, *, plain=(), seed=0):
    """The factor after so many steps, whose tokens are 1 or 2 and come to `got` on average."""
    rng = random.Random(seed)
    feedback = Feedback()
    for ratio in plain:
        feedback.note_plain(ratio)
    for _ in range(count):
        tokens = 1.0 + (rng.random() < got - 1.0)
        feedback.note_drafted(["draft"], promised, tokens, expected, taken(rng))
    return feedback.factor("draft")


def steady(rng):
    return rng.lognormvariate(0.0, 0.1)


def hanging(rng):
    return 500.0 if rng.random() < 0.1 else steady(rng)


PLAIN = [0.98, 1.0, 1.02] * 5


def test_where_promises_are_kept_the_factor_is_near_1():
    assert fed(400, 1.3 / 1.1, 1.3, 1.1, steady, plain=PLAIN) > 0.95
    assert Feedback().factor("draft") == 1.0


def test_tokens_that_do_not_come_are_found_after_some_steps():
    assert fed(300, 1.2, 1.2, 1.2, steady, plain=PLAIN) == pytest.approx(1 / 1.2, abs=0.06)


def test_more_than_was_promised_is_not_expected():
    assert fed(300, 1.0, 1.9, 1.0, steady, plain=PLAIN) == 1.0


def test_steps_that_hang_count_little():
    plain = [one if number % 5 else 500.0 for number, one in enumerate(PLAIN)]
    assert fed(300, 1.3 / 1.1, 1.3, 1.1, hanging, plain=plain) > 0.95


def test_plain_steps_that_take_less_than_expected_say_that_drafted_ones_take_more():
    arguments = (300, 1.3 / 1.1, 1.3, 1.1, steady)
    assert fed(*arguments, plain=[0.85] * 15) < 0.91
    assert fed(*arguments, plain=[0.85] * 2) > 0.95  # too few to be believed
    assert fed(*arguments, plain=[0.01] * 15) > 0.7  # too little to be true


def test_a_source_that_is_not_asked_is_forgiven_in_the_end():
    feedback = Feedback()
    for _ in range(200):
        feedback.note_drafted(["draft", "other"], 1.5, 1.0, 1.0, 1.0)
    before = feedback.factor("draft")
    assert before == feedback.factor("other") < 0.8
    for _ in range(300):
        feedback.relax(64, ["other"])
    assert feedback.factor("draft") > 0.99
    assert feedback.factor("other") == before


class Unlearning(StepCost):
    """Follows the machine's speed, and never learns what drafted steps cost."""

    def observe(self, *args, learn=True, **options):
        super().observe(*args, learn=False, **options)


class Known(DraftCost):
    def observe(self, *_):
        pass


def estimated(rows, sequences):
    return 0.010 + 0.00015 * (rows - 1) + 0.0001 * sequences


def world_of(bias, **options):
    """Steps with drafts cost so much more than the planner believes."""

    def step(rows, sequences):
        return estimated(rows, sequences) * (1.0 + bias * (rows > sequences))

    return World(step, in_passes=False, call=CALL, **options)


def ratio_to_plain(world, chance, feedback, *, count=4, seed=0):
    jobs = make_jobs(count, 2000, lambda job, place: chance, spread=0.1, seed=seed)
    curve = CostCurve({rows: estimated(rows, 0) for rows in range(1, 65)})
    guess = (CALL, 0.0, 0.0, 0.0, 0.0)
    planner = Planner([Source("draft", 8, False, guess)], curve, feedback)
    planner.estimates.cost = Unlearning(curve)
    planner.estimates.draft_costs["draft"] = Known(curve.at(1), in_passes=False, guess=guess)
    plain = simulate(world, jobs, Fixed(0)).seconds
    return simulate(world, jobs, Planned(world, curve, planner)).seconds / plain


def bursts(now):
    """For 0.3 seconds of every three the machine is at a third of its speed."""
    return 3.0 if now % 3.0 < 0.3 else 1.0


def phases(now):
    return 1.7 if int(now / 7.0) % 3 == 1 else 1.0


def starved(now):
    """One step in five waits for a core."""
    return 8.0 if hash(round(now * 1e6)) % 5 == 0 else 1.0


MACHINES = {
    "quiet": {},
    "noisy": {"noise": 0.2},
    "with bursts": {"noise": 0.1, "slow": bursts},
    "starved": {"noise": 0.1, "slow": starved},
    "with slow phases": {"noise": 0.1, "slow": phases},
}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("bias", [0.1, 0.2, 0.3])
def test_a_cost_model_that_is_wrong_costs_little(bias, machine):
    assert ratio_to_plain(world_of(bias, **MACHINES[machine]), 0.2, Feedback()) < 1.035


@pytest.mark.parametrize("machine", MACHINES)
def test_control_without_feedback_a_wrong_cost_model_makes_drafting_slower(machine):
    assert ratio_to_plain(world_of(0.2, **MACHINES[machine]), 0.2, Credulous()) > 1.05


@pytest.mark.parametrize("machine", MACHINES)
def test_drafts_that_gain_go_on(machine):
    world = world_of(0.0, **MACHINES[machine])
    with_it, without = (ratio_to_plain(world, 0.5, one) for one in (Feedback(), Credulous()))
    assert with_it < 0.75
    assert with_it < 1.02 * without


def test_a_source_that_gains_is_trusted_whatever_it_promised():
    gaining, losing = Feedback(), Feedback()
    for _ in range(200):
        gaining.note_drafted(["draft"], 2.0, 1.3, 1.1, 1.0)
        losing.note_drafted(["draft"], 1.3, 1.0, 1.1, 1.0)
    assert gaining.factor("draft") < 0.7
    assert gaining.trusts("draft", 1.01)
    assert not losing.trusts("draft", 1.1)
    assert losing.trusts("draft", 2.0)
