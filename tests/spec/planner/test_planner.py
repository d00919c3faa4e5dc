"""The planner against the best fixed choice in hindsight, in simulated worlds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from simulator import Credulous, Fixed, Job, Planned, World, best_fixed, make_jobs, simulate

from folospec.spec.planner.acceptance_record import AcceptanceRecord
from folospec.spec.planner.estimates import Estimates
from folospec.spec.planner.feedback import Feedback
from folospec.spec.planner.plan_terms import REASONS, PlannedSequence, Source
from folospec.spec.planner.planner import Planner
from folospec.spec.planner.probing import Probing
from folospec.spec.planner.step_cost import CostCurve, DraftCost, StepCost, StepShape
from folospec.spec.planner.step_plan import StepPlan

REGRET, REGRET_TO_PLAIN = 0.05, 0.015
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def linear(slope, base=0.010, per_sequence=0.0001):
    """Seconds of a step: what the weights cost, and a little per row and sequence."""
    return lambda rows, sequences: base + slope * (rows - 1) + per_sequence * sequences


def shelf(free, slope, base=0.010, per_sequence=0.0001):
    """The same where some rows are free, as they are while memory is the limit."""
    return lambda rows, sequences: base + slope * max(0, rows - free) + per_sequence * sequences


def curve_of(step):
    return CostCurve({count: step(count, 0) for count in COUNTS})


FLAT, STEEP = linear(0.00015), linear(0.0018)
WORLD = World(FLAT)
LOOKUP = World(FLAT, in_passes=False, limit=24, row=0.0001, call=0.0001)


def tail_jobs():
    """An offline batch whose requests are of very different lengths."""
    jobs = make_jobs(48, 700, lambda job, place: 0.75)
    return [
        replace(job, chances=job.chances[: 50 + 12 * number]) for number, job in enumerate(jobs)
    ]


def busy_at(begin):
    """One second in five, another process takes half the machine."""
    return lambda now: 2.0 if int(now + begin) % 5 == 3 else 1.0


def never(count, length, confidence=0.0):
    """Drafts that are never accepted, whatever the drafter says of them."""
    jobs = make_jobs(count, length, lambda job, place: 0.0, spread=0.0)
    return [replace(job, chances=[confidence] * length) for job in jobs]


def half_good(job, place):
    return 0.9 if job % 2 else 0.1


def late_answers(job, place):
    """In a short text there is nothing to look up at first, and then in runs."""
    return 0.9 if place >= 20 and (place + 7 * job) % 14 < 5 else 0.0


# name: the world, what was measured of a step at start, the jobs, seats
SCENARIOS = {
    "one good request": (WORLD, FLAT, make_jobs(1, 1000, lambda j, p: 0.75), 64),
    "acceptance collapses midway": (
        WORLD,
        FLAT,
        make_jobs(1, 1500, lambda j, p: 0.85 if p < 750 else 0.05, spread=0.05),
        64,
    ),
    "the batch fills and drains": (
        WORLD,
        FLAT,
        make_jobs(60, 200, lambda j, p: 0.75, every=0.05),
        64,
    ),
    "a full batch with a long tail": (WORLD, FLAT, tail_jobs(), 64),
    "requests differ": (WORLD, FLAT, make_jobs(60, 100, half_good, spread=0.1), 16),
    "rows cost 3 times what was measured": (
        replace(WORLD, step=linear(0.00045)),
        FLAT,
        make_jobs(8, 600, lambda j, p: 0.7),
        64,
    ),
    "rows cost a third of what was measured": (
        WORLD,
        linear(0.00045),
        make_jobs(8, 600, lambda j, p: 0.7),
        64,
    ),
    "rows are dear and were measured cheap": (
        replace(WORLD, step=STEEP),
        linear(0.0006),
        make_jobs(8, 500, lambda j, p: 0.7),
        64,
    ),
    "four rows are free and were measured dear": (
        replace(WORLD, step=shelf(4, 0.0017)),
        linear(0.0013),
        make_jobs(4, 120, lambda j, p: 0.7),
        1,
    ),
    "a lookup that finds something now and then": (
        LOOKUP,
        FLAT,
        make_jobs(1, 1000, lambda j, p: 0.9 if p % 40 < 10 else 0.02, spread=0.05),
        64,
    ),
    "short texts in which answers come late": (
        replace(LOOKUP, call=0.0008, cold=3.0, silent=0.05),
        FLAT,
        make_jobs(40, 64, late_answers, spread=0.04),
        1,
    ),
    "catching up costs more than drafts bring": (
        replace(WORLD, num_uncomputed=0.0001),
        FLAT,
        [replace(job, context=4000) for job in make_jobs(20, 60, lambda j, p: 0.7, every=0.3)],
        64,
    ),
}
NOTHING_ACCEPTED = {
    "alone": (WORLD, FLAT, never(1, 1500), 64),
    "in a batch": (WORLD, FLAT, never(8, 700), 64),
    "many short requests": (WORLD, FLAT, never(60, 100), 8),
    "by a boastful drafter": (WORLD, FLAT, never(4, 700, confidence=0.7), 64),
    "by a boastful lookup": (LOOKUP, FLAT, never(8, 700, confidence=0.7), 64),
    "by a lookup that is dear and finds nothing": (
        replace(LOOKUP, call=0.0008, cold=3.0, silent=0.05),
        FLAT,
        never(20, 200),
        1,
    ),
}


def run_planned(scenario, planner=None):
    world, measured, jobs, seats = scenario
    return simulate(world, jobs, Planned(world, curve_of(measured), planner), seats=seats)


def regret(scenario, planner=None):
    world, _, jobs, seats = scenario
    _, best = best_fixed(world, jobs, seats=seats)
    return run_planned(scenario, planner).seconds / best - 1.0


def regret_to_plain(scenario, planner=None):
    world, _, jobs, seats = scenario
    plain = simulate(world, jobs, Fixed(0), seats=seats).seconds
    return run_planned(scenario, planner).seconds / plain - 1.0


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_planner_is_near_the_best_fixed_choice_in_hindsight(name):
    assert regret(SCENARIOS[name]) < REGRET


def test_a_machine_that_is_half_as_fast_at_times_confuses_the_planner_little():
    """The best fixed choice cannot be confused; a planner that measures can, for a while."""
    regrets = []
    for seed in range(4):
        world = replace(WORLD, noise=0.1, slow=busy_at(0.37 * seed))
        jobs = make_jobs(4, 1200, lambda j, p: 0.7, seed=seed)
        planned = run_planned((world, FLAT, jobs, 64)).seconds
        regrets.append(planned / best_fixed(world, jobs)[1] - 1.0)
        assert planned < 0.9 * simulate(world, jobs, Fixed(0)).seconds
    assert sum(regrets) / len(regrets) < 0.08, regrets


@pytest.mark.parametrize("name", NOTHING_ACCEPTED)
def test_where_nothing_is_accepted_the_planner_is_near_plain_decoding(name):
    assert regret_to_plain(NOTHING_ACCEPTED[name]) < REGRET_TO_PLAIN


def test_where_acceptance_changes_the_planner_beats_every_fixed_choice():
    assert regret(SCENARIOS["acceptance collapses midway"]) < -0.1


class Believing(AcceptanceRecord):
    """Learns nothing of what became of drafts."""

    def add_level(self, *_):
        pass

    def add_trial(self, *_):
        pass


class Free(StepCost):
    """Takes every row for free."""

    def table(self, shape, most):
        return super().table(shape, most)[:1] * (most + 1)


class FreeDraft(DraftCost):
    def parts(self, slowdown):
        return 0.0, 0.0, 0.0, 0.0, 0.0


def planner_for(scenario, feedback=None):
    world, measured, _, _ = scenario
    source = Source("draft", world.limit, world.in_passes)
    return Planner([source], curve_of(measured), feedback)


def test_control_a_planner_that_ignores_acceptance_is_slower_than_plain():
    scenario = NOTHING_ACCEPTED["by a boastful drafter"]
    planner = planner_for(scenario, Credulous())
    planner.estimates.records["draft"] = Believing()
    assert regret_to_plain(scenario, planner) > 0.1


def test_feedback_makes_up_for_acceptance_that_is_ignored():
    scenario = NOTHING_ACCEPTED["by a boastful drafter"]
    planner = planner_for(scenario)
    planner.estimates.records["draft"] = Believing()
    assert regret_to_plain(scenario, planner) < 0.07


@pytest.mark.parametrize(
    "name", ["rows are dear and were measured cheap", "the batch fills and drains"]
)
def test_control_a_planner_that_ignores_cost_regrets_it(name):
    scenario = SCENARIOS[name]
    planner = planner_for(scenario, Credulous())
    planner.estimates.cost = Free(curve_of(scenario[1]))
    planner.estimates.draft_costs["draft"] = FreeDraft(0.01, in_passes=True)
    assert regret(scenario, planner) > REGRET


def test_a_full_batch_drafts_little_and_its_tail_much():
    """Rows that cost more than they bring beside many others pay when few are left."""
    world = replace(WORLD, step=linear(0.0005))
    jobs = [
        replace(job, chances=job.chances[: 60 if number else 500])
        for number, job in enumerate(make_jobs(32, 500, lambda j, p: 0.6))
    ]
    result = run_planned((world, linear(0.0005), jobs, 64))
    full = [rows / count for count, rows in result.drafts if count > 24]
    tail = [rows / count for count, rows in result.drafts if count < 4]
    assert sum(full) / len(full) < 0.3
    assert sum(tail) / len(tail) > 0.9


def rows_of(count, uncomputed, room=100, wanted=None):
    return [PlannedSequence(f"s{i}", room, wanted, dict(uncomputed)) for i in range(count)]


def settled(planner, steps=6):
    """Past the first steps, which are plain."""
    for _ in range(steps):
        if not planner.resting(["first"]):
            planner.plan(["first"], rows_of(1, {"draft": 1}), StepShape(1, 1))
        planner.record_step(StepShape(1, 1), 0, 0.0101)
    return planner


class Gaining(Feedback):
    """Drafts have gained so much."""

    def __init__(self, measured):
        super().__init__()
        self.measured = measured

    def gain(self, source):
        return self.measured


def asks_learned_from(gain, count, name="lookup", *, in_passes=False):
    """Of answers to `count` sequences in steps with drafts, the share that the record has."""
    planner = Planner([Source(name, 8, in_passes)], curve_of(FLAT), Gaining(gain))
    seq_ids, shape, num_asked = [f"s{i}" for i in range(count)], StepShape(count, count), 0
    for _ in range(600):
        planner.begin_step()
        if not planner.resting(seq_ids):
            planner.plan(seq_ids, rows_of(count, {name: 1}), shape)
        proposals = [
            planner.score(name, seq_id, (-1, 0), (1, 2), (0.9, 0.9)) for seq_id in planner.last_plan
        ]
        num_asked += len(proposals)
        if proposals:
            planner.record_draft(name, dict.fromkeys(seq_ids, 60), [2] * count, 0, 0.0001)
            planner.prune(proposals, shape, 0.0001)
        for scored in proposals:
            planner.observe(scored, [0, 1])
        if not planner.skip_step():
            planner.record_step(shape, 2 * len(proposals), 0.0105)
    assert num_asked > 300 * count
    return planner.estimates.records[name].num_asks / num_asked


def test_of_a_lookup_that_gains_beyond_doubt_every_fourth_step_is_learned_from():
    assert 0.25 <= asks_learned_from(1.3, 1) < 0.4


@pytest.mark.parametrize(
    ("gain", "count", "in_passes"), [(1.1, 1, False), (1.3, 2, False), (1.3, 1, True)]
)
def test_where_there_is_doubt_or_several_are_drafted_for_every_answer_is_noted(
    gain, count, in_passes
):
    assert asks_learned_from(gain, count, in_passes=in_passes) == 1.0


def test_a_wish_for_fewer_tokens_is_kept():
    planner = settled(Planner([Source("draft", 8, True)], curve_of(FLAT)))
    for wanted in (1, 2):
        plan = planner.plan([], rows_of(1, {"draft": 1}, wanted=wanted), StepShape(1, 1))
        assert plan["s0"]["draft"] == wanted


def test_a_batch_that_stays_the_same_is_not_planned_again_at_once():
    planner = settled(Planner([Source("draft", 8, True)], curve_of(FLAT)))
    for _ in range(4):
        if not planner.resting(["s0"]):
            planner.plan(["s0"], rows_of(1, {"draft": 1}), StepShape(1, 1))
    assert planner.resting(["s0"])
    assert not planner.resting(["s0", "s1"])


def hopeless(planner):
    """A planner whose drafter is never right."""
    for _ in range(200):
        planner.estimates.records["draft"].add_level("other", 1, 0.0)
    return planner


def is_resting(planner, count):
    """How long each of `count` plans in a row holds for one sequence that nobody drafts for, and
    whether it had a probe."""
    held = []
    for _ in range(count):
        planner.plan(["s0"], rows_of(1, {"draft": 1}), StepShape(1, 1))
        has_probe, steps = bool(planner.last_plan), 0
        planner.record_step(StepShape(1, 1), 0, 0.0101)
        while planner.resting(["s0"]):
            steps += 1
            planner.record_step(StepShape(1, 1), 0, 0.0101)
        held.append((steps, has_probe))
    return held


def test_a_plan_without_drafts_holds_longer_and_longer_and_a_probe_does_not_end_that():
    planner = hopeless(settled(Planner([Source("draft", 8, True)], curve_of(STEEP))))
    held = is_resting(planner, 12)
    backoff = [steps for steps, has_probe in held if not has_probe]
    assert backoff == sorted(backoff)
    assert backoff[0] == 31
    assert backoff[-1] == 63
    assert {steps for steps, has_probe in held if has_probe} == {0}


class Noting(StepCost):
    """Notes what it is told of every step: whether anyone was asked, and whether to learn."""

    def __init__(self, curve):
        super().__init__(curve)
        self.told = []

    def observe(self, shape, num_draft_rows, seconds, *, asked=False, model=False, learn=True):
        self.told.append((asked, learn))


def test_the_steps_of_reference_are_learned_from_however_long_it_goes_on():
    planner = settled(Planner([Source("draft", 8, True)], curve_of(FLAT)), 600)
    cost = planner.estimates.cost = Noting(curve_of(FLAT))
    num_references = 0
    for _ in range(2000):
        if not planner.resting(["s0"]):
            planner.plan(["s0"], rows_of(1, {"draft": 1}), StepShape(1, 1))
        is_reference = planner.reasons.get("s0") == "reference"
        if not is_reference:
            planner.record_draft("draft", {"s0": 60}, [3], 0, 0.001)
        before = len(cost.told)
        planner.record_step(StepShape(1, 1), 0 if is_reference else 3, 0.0101)
        if is_reference:
            # The first ones of a row are not: they are slow after drafted steps.
            assert cost.told[before:] == [(False, True)] * (planner._rested == 2)
            num_references += len(cost.told) - before
    assert num_references >= 8
    assert (True, True) in cost.told


def test_the_first_to_be_asked_bears_what_asking_costs():
    estimates = Planner([Source("draft", 8, True)], curve_of(FLAT)).estimates
    first, other = estimates.prices("draft", is_first=True), estimates.prices("draft")
    assert estimates.cost.asking > 0
    assert first.call == pytest.approx(other.call + estimates.cost.asking)


@pytest.mark.parametrize(("count", "reason"), [(1, "rejected"), (48, "batch_full")])
def test_who_is_not_drafted_for_is_told_why(count, reason):
    step = linear(0.0018)
    planner = settled(Planner([Source("draft", 8, True)], curve_of(step)))
    for _ in range(200):
        planner.estimates.records["draft"].add_level("other", 1, 0.0 if count == 1 else 0.6)
    planner.probing.spend(1e9)
    plan = planner.plan([], rows_of(count, {"draft": 1}), StepShape(count, count))
    assert plan == {}
    assert set(planner.reasons.values()) == {reason}
    assert reason in REASONS


def test_a_simulated_job_is_done_once_by_every_policy():
    jobs = make_jobs(3, 40, lambda j, p: 0.7)
    assert all(isinstance(job, Job) for job in jobs)
    for policy in (Fixed(0), Fixed(3), Planned(WORLD, curve_of(FLAT))):
        steps = simulate(WORLD, jobs, policy).drafts
        assert steps[0][0] == 3
        assert len(steps) <= 40
    assert len(simulate(WORLD, jobs, Fixed(0)).drafts) == 40


def plans_beside_prompts(planner, steps):
    """What is planned for one sequence while every step computes some prompt too."""
    plans = []
    for _ in range(steps):
        if not planner.resting(["s0"]):
            planner.plan(["s0"], rows_of(1, {"draft": 1}), StepShape(1, 1))
        plans.append(planner.last_plan)
        planner.pass_over(0.0101)
    return plans


@pytest.mark.parametrize("steps_alone", [0, 5])
def test_prompts_in_every_step_do_not_end_drafting(steps_alone):
    planner = settled(Planner([Source("draft", 8, True)], curve_of(FLAT)), steps_alone)
    plans = plans_beside_prompts(planner, 400)
    assert sum(map(bool, plans)) > 380
    assert plans.count({}) >= 3  # the steps of reference are still asked for


@pytest.mark.parametrize("others", [[], ["s1"]])
def test_a_plan_made_while_a_prompt_is_computed_does_not_outlast_it(others):
    """Nobody was ready, or somebody was not: the next step is planned anew."""
    planner = settled(Planner([Source("draft", 8, True)], curve_of(FLAT)))
    ready = rows_of(len(others), {"draft": 1})
    for _ in range(40):
        assert not planner.resting(["s0", *others])
        planner.plan(["s0", *others], ready, StepShape(1, 1))
        planner.pass_over(0.0101)
    assert not planner.resting(["s0", *others])


def test_what_was_drafted_in_a_step_that_failed_teaches_nothing():
    class Counting(DraftCost):
        num_observed = 0

        def observe(self, *_):
            self.num_observed += 1

    for begins, num_observed in ((False, 2), (True, 1)):
        planner = settled(Planner([Source("draft", 8, True)], curve_of(FLAT)))
        cost = planner.estimates.draft_costs["draft"] = Counting(0.01, in_passes=True)
        for _ in range(2):  # only the second step is recorded
            if begins:
                planner.begin_step()
            planner.plan(["s0"], rows_of(1, {"draft": 1}), StepShape(1, 1))
            planner.record_draft("draft", {"s0": 50}, [2], 0, 0.001)
        planner.record_step(StepShape(1, 1), 2, 0.011)
        assert cost.num_observed == num_observed


def closed_weights(step, rooms):
    estimates = Estimates([Source("draft", 8, False)], curve_of(step))
    rows = [PlannedSequence(f"s{i}", room, None, {"draft": 1}) for i, room in enumerate(rooms)]
    shape = StepShape(len(rooms), len(rooms))
    plan = StepPlan(estimates, Probing(), Feedback(), rows, shape, ends_together=True)
    return list(plan.weights.values())


def test_where_a_batch_ends_with_its_slowest_its_tokens_count_for_most():
    flat = closed_weights(linear(0.0, per_sequence=0.0), [90, 30, 90, 10])
    assert flat[0] == flat[2] > 1.5
    assert flat[3] < flat[1] < 0.5
    assert sum(flat) == pytest.approx(4)
    assert closed_weights(FLAT, [50] * 8) == pytest.approx([1.0] * 8)


def test_where_rows_are_all_that_a_step_costs_every_token_counts_alike():
    weights = closed_weights(lambda rows, sequences: 0.1 * rows, [90, 30, 10])
    assert weights == pytest.approx([1.0] * 3, abs=0.1)


def test_while_sequences_come_all_tokens_count_alike():
    planner = settled(Planner([Source("draft", 8, True)], curve_of(FLAT)))
    rows = [
        PlannedSequence("a", 90, None, {"draft": 1}),
        PlannedSequence("b", 10, None, {"draft": 1}),
    ]
    seen = []
    for _ in range(30):
        if not planner.resting(["a", "b"]):
            planner.plan(["a", "b"], rows, StepShape(2, 2))
        seen.append(dict(planner._plan.weights))
        planner.record_step(StepShape(2, 2), 0, 0.0102)
    assert seen[0] == {"a": 1.0, "b": 1.0}
    assert seen[-1]["a"] > 1.5 > seen[-1]["b"]
