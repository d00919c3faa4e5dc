"""A world without models, for the planner: requests whose drafts are accepted as it is written, and
steps that take as long as a formula says.

A request is a line of tokens. For each there is a chance that the drafter gets it right, which it
also states as its confidence, and a draw that says whether it does. So all policies meet the same
luck: what is right at a place is right whoever comes there, by whatever steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from folospec.spec.planner.feedback import Feedback
from folospec.spec.planner.plan_terms import PlannedSequence, Source
from folospec.spec.planner.planner import Planner
from folospec.spec.planner.step_cost import CostCurve, StepShape


@dataclass
class World:
    """What things really cost, in seconds. `slow` multiplies all of it at a time."""

    step: Callable[[int, int], float]
    """Of rows and sequences."""
    call: float = 0.0002
    row: float = 0.0
    one_pass: float = 0.002
    level: float = 0.0001
    num_uncomputed: float = 0.0
    noise: float = 0.05
    slow: Callable[[float], float] = lambda now: 1.0
    in_passes: bool = True
    limit: int = 8
    cold: float = 1.0
    """How many times as long a call takes if there was none in the step before."""
    silent: float = 0.0
    """Where the drafter is right with a smaller chance, it has nothing to say."""


@dataclass
class Job:
    """A request: when it comes, and the chance of the drafter at each of its tokens."""

    arrival: float
    chances: list[float]
    context: int = 100
    right: list[bool] = field(default_factory=list)
    name: str = ""
    done: int = 0
    num_uncomputed: int = 0

    @property
    def room(self) -> int:
        return len(self.chances) - self.done


def make_jobs(
    count: int,
    length: int,
    chance: Callable[[int, int], float],
    *,
    spread: float = 0.2,
    every: float = 0.0,
    seed: int = 0,
) -> list[Job]:
    """`count` requests of `length` tokens, one `every` so many seconds; `chance(job, place)` is the
    mean chance, around which the drafter's confidence varies by up to `spread`."""
    rng = random.Random(seed)
    jobs = []
    for number in range(count):
        chances = [
            min(max(chance(number, place) + spread * rng.uniform(-1, 1), 0.0), 1.0)
            for place in range(length)
        ]
        right = [rng.random() < c for c in chances]
        jobs.append(Job(number * every, chances, right=right, name=f"job-{number}"))
    return jobs


class Credulous(Feedback):
    """Believes every promise."""

    def trusts(self, source: str, promised: float) -> bool:
        return True


@dataclass
class Result:
    seconds: float = 0.0
    drafting: float = 0.0
    num_steps: int = 0
    num_plain_steps: int = 0
    drafts: list[tuple[int, int]] = field(default_factory=list)
    """Of each step: sequences, and draft rows."""


class Fixed:
    """The policy of `k` draft tokens, always."""

    def __init__(self, k: int) -> None:
        self.k = k

    def depths(self, jobs: Sequence[Job]) -> dict[str, int]:
        return {job.name: min(self.k, job.room - 1) for job in jobs if min(self.k, job.room - 1)}

    def prune(self, drafts: dict[str, list[float]], jobs: Sequence[Job]) -> dict[str, int]:
        return {name: len(draft) for name, draft in drafts.items()}

    def learn(self, *_: object) -> None: ...

    min_chance = 0.0


class Planned:
    """The planner, driven as the engine drives it."""

    def __init__(self, world: World, curve: CostCurve, planner: Planner | None = None) -> None:
        guess = None
        if world.in_passes:  # as the engine measures it at start, roughly
            guess = (0.0, 0.0, 0.7 * world.one_pass, 0.7 * world.level, 0.7 * world.num_uncomputed)
        source = Source("draft", world.limit, world.in_passes, guess)
        self.planner = planner or Planner([source], curve)
        self.offers: dict = {}
        self.shape = StepShape(1, 1)

    @property
    def min_chance(self) -> float:
        return self.planner.min_path_probability("draft")

    def depths(self, jobs: Sequence[Job]) -> dict[str, int]:
        names = [job.name for job in jobs]
        self.shape = StepShape(len(jobs), len(jobs), sum(j.context + j.done for j in jobs))
        planner, self.offers = self.planner, {}
        if planner.resting(names):
            plan = planner.last_plan
        else:
            rows = [
                PlannedSequence(j.name, j.room, None, {"draft": j.num_uncomputed + 1})
                for j in jobs
                if j.room > 1
            ]
            plan = planner.plan(names, rows, self.shape)
        wanted = {
            job.name: min(plan.get(job.name, {}).get("draft", 0), job.room - 1) for job in jobs
        }
        return {name: depth for name, depth in wanted.items() if depth > 0}

    def prune(self, drafts: dict[str, list[float]], jobs: Sequence[Job]) -> dict[str, int]:
        for name, draft in drafts.items():
            parents = list(range(-1, len(draft) - 1))
            depths = list(range(1, len(draft) + 1))
            self.offers[name] = self.planner.score("draft", name, parents, depths, draft)
        offers = list(self.offers.values())
        self.planner.prune(offers, self.shape, self.drafting)
        return {offer.seq_id: len(offer.kept) for offer in offers}

    def learn(self, accepted: dict[str, int], num_rows: int, seconds: float) -> None:
        for name, count in accepted.items():
            if name in self.offers and self.offers[name].kept:
                self.planner.observe(self.offers[name], list(range(count)))
        self.planner.record_step(self.shape, num_rows, seconds)


def simulate(
    world: World, jobs: list[Job], policy: Fixed | Planned, *, seats: int = 64, seed: int = 1
) -> Result:
    """Run all jobs to their ends."""
    rng = random.Random(seed)
    result, was_asked = Result(), False
    jobs = [Job(j.arrival, j.chances, j.context, j.right, j.name, 0, j.context) for j in jobs]
    waiting, running = sorted(jobs, key=lambda job: job.arrival), []

    def spend(seconds: float) -> float:
        seconds *= world.slow(result.seconds) * rng.lognormvariate(0.0, world.noise)
        result.seconds += seconds
        return seconds

    while waiting or running:
        if not running and waiting[0].arrival > result.seconds:
            result.seconds = waiting[0].arrival
        while waiting and len(running) < seats and waiting[0].arrival <= result.seconds:
            running.append(waiting.pop(0))
        wanted = policy.depths(running)
        drafts = _draft(running, wanted, policy.min_chance, world.silent)
        if wanted:
            cold = 0.0 if was_asked else (world.cold - 1.0) * world.call
            taken = spend(_draft_seconds(world, running, wanted, drafts) + cold)
            result.drafting += taken
            if isinstance(policy, Planned):
                for name in wanted.keys() - drafts.keys():
                    policy.planner.score("draft", name, (), (), None)
                num_uncomputed = sum(job.num_uncomputed for job in running if job.name in wanted)
                counts = {job.name: job.done for job in running if job.name in wanted}
                depths = [len(draft) for draft in drafts.values()]
                policy.planner.record_draft("draft", counts, depths, num_uncomputed, taken)
                policy.drafting = taken
        was_asked = bool(wanted)
        kept = policy.prune(drafts, running) if wanted else {}
        num_rows = sum(kept.values())
        seconds = spend(world.step(len(running) + num_rows, len(running)))
        accepted = _advance(running, wanted, kept)
        policy.learn(accepted, num_rows, seconds)
        result.num_steps += 1
        result.num_plain_steps += not wanted
        result.drafts.append((len(running), num_rows))
        for job in [job for job in running if job.room == 0]:
            running.remove(job)
            if isinstance(policy, Planned):
                policy.planner.drop(job.name, finished=True)
    return result


def _draft(
    running: list[Job], wanted: dict[str, int], least: float, silent: float
) -> dict[str, list[float]]:
    drafts = {}
    for job in running:
        chance, draft = 1.0, []
        for place in range(job.done, job.done + wanted.get(job.name, 0)):
            if job.chances[place] < silent:
                break
            draft.append(job.chances[place])
            chance *= job.chances[place]
            if chance < least:
                break
        if draft:
            drafts[job.name] = draft
    return drafts


def _draft_seconds(
    world: World, running: list[Job], wanted: dict[str, int], drafts: dict[str, list[float]]
) -> float:
    depths = [len(draft) for draft in drafts.values()]
    num_uncomputed = sum(job.num_uncomputed for job in running if job.name in wanted)
    seconds = world.call + world.row * len(wanted) + world.num_uncomputed * num_uncomputed
    if world.in_passes:
        seconds += world.one_pass * max(depths) + world.level * sum(depths)
    for job in running:
        job.num_uncomputed = 0 if job.name in wanted else job.num_uncomputed
    return seconds


def _advance(running: list[Job], wanted: dict[str, int], kept: dict[str, int]) -> dict[str, int]:
    accepted = {}
    for job in running:
        count = 0
        while count < kept.get(job.name, 0) and job.right[job.done + count]:
            count += 1
        if job.name in wanted:
            accepted[job.name] = count
        job.done += count + 1
        job.num_uncomputed = 0 if job.name in wanted else job.num_uncomputed + count + 1
    return accepted


def best_fixed(world: World, jobs: list[Job], *, seats: int = 64) -> tuple[int, float]:
    """The best fixed number of draft tokens in hindsight, 0 to 8, and its time."""
    times = {k: simulate(world, jobs, Fixed(k), seats=seats).seconds for k in range(9)}
    k = min(times, key=lambda k: times[k])
    return k, times[k]
