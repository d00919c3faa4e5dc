"""How much to draft for each sequence. Core is told integers; what they rest on stays here.

    plan      who is asked, and how deep: acceptance so far, against the cost of a step and a draft
    offer     a proposal came: its confidence, corrected by what came of earlier ones
    prune     which nodes the target judges
    observe   what became of them
    record    how long it took

No torch and no clock: the same object runs in the engine and in a simulation. What is decided about
a node rests on earlier steps, on its rank, depth and stated confidence, and on those of other
nodes, never on its token; where even which nodes there are may tell of a token that must not
decide, nothing is pruned. So whatever rule a confidence is fit for, this is too; see
`Proposal.prune`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from folospec.spec.acceptance_record import AcceptanceRecord
from folospec.spec.offers import learn_end, learn_offer, make_offer, prune_offers
from folospec.spec.plan_core import (
    Array,
    DepthRow,
    DraftPrices,
    choose_depths,
    price_of_row,
)
from folospec.spec.plan_terms import Offer, PlanRow, Source
from folospec.spec.probing import Probing
from folospec.spec.step_cost import DEFAULT_CURVE, CostCurve, DraftCost, StepCost, StepShape

_HORIZON = 64
"""Steps over which the cost of catching up is spread, if the output is that long."""
_MOST_REST, _MOST_HOLD = 32, 7
"""A plan of no drafts, or of some, is kept for so many steps at most."""
_LEARN_EVERY = 8
_LEARN_ALL, _LEARN_ROUTINE = 64, 3
"""Of drafted steps the first ones are all learned from, and then every third: that takes time."""
_RELAXING_STEPS = 1000
_FIRST_PLAIN, _REFERENCE_EVERY = 4, 100
_MARGIN, _ASK_MARGIN = 1.02, 1.5
"""Drafts must promise so many times the rate without any, and answers so many times what asking
costs: what is chosen for its promise tends to keep less, and pruning and learning take time too."""
_FIRST_ASKS, _FIRST_ROWS = 16, 4
"""Until a source was asked so often, it is asked for so many sequences at a time."""


class FixedPlanner:
    """The same number of draft tokens in every step.

    Args:
        limit: most draft tokens per sequence and step, of all drafters together.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit

    def num_draft_tokens(self, wanted: int | None) -> int:
        """Most draft tokens of a sequence; `wanted` is the request's own limit."""
        return self._limit if wanted is None else min(wanted, self._limit)


class Planner:
    """Spends rows and drafting where the batch gets most tokens per second of them.

    Args:
        sources: in order of precedence.
        curve: the cost of the target's pass.
    """

    def __init__(self, sources: Sequence[Source], curve: CostCurve = DEFAULT_CURVE) -> None:
        self.sources = {source.name: source for source in sources}
        self.cost = StepCost(curve)
        unit = curve.at(1)
        self.draft_costs = {
            s.name: DraftCost(unit, in_passes=s.in_passes, guess=s.guess) for s in sources
        }
        self.records = {source.name: AcceptanceRecord() for source in sources}
        self.probing = Probing()
        self.reasons: dict[str, str] = {}
        """Of the last plan: why sequences without a draft have none."""
        self._plan: dict[str, dict[str, int]] = {}
        self._batch: list[str] = []
        self._rest = self._rested = 0
        self._has_probes = False
        self._drafted: list[tuple[str, int, int, int, int, float]] = []
        self._seen: dict[tuple[str, str], int] = {}
        self._rate = self._price = 0.0
        self._weights: dict[str, float] = {}
        self._num_plain = self._since_plain = self._num_routine = 0
        self._is_reference = False

    # Plan -----------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Forget what was drafted in a step that failed before it was recorded."""
        self._drafted.clear()

    def resting(self, seq_ids: list[str]) -> bool:
        """Whether the last plan still holds: the batch is the same, and it was made lately."""
        if self._rested >= self._rest or seq_ids != self._batch:
            return False
        self._rested += 1
        return True

    @property
    def last_plan(self) -> dict[str, dict[str, int]]:
        return self._plan

    def plan(
        self, seq_ids: list[str], rows: Sequence[PlanRow], shape: StepShape
    ) -> dict[str, dict[str, int]]:
        """Choose whom to ask for whom, and how deep.

        Args:
            seq_ids: of all running sequences: when they change, the plan is made anew.
            rows: those that could be drafted for.
            shape: the step without drafts.

        Returns:
            for each sequence that is drafted for, how deep by the name of the source.
        """
        changed = seq_ids != self._batch
        num_steps = 1 + self._rested
        self._since_plain += num_steps
        self._relax(num_steps)
        self._batch, self._rested, self.reasons = seq_ids, 0, {}
        self.probing.next_plan(self._rest if not changed else 0)
        plan: dict[str, dict[str, int]] = {}
        self._is_reference = bool(rows) and self._needs_reference()
        if rows:
            self._weights = _weights(rows)
            seconds = self.cost.table(shape, self._most_nodes(rows))
            self._rate = shape.num_sequences / float(seconds[0])
            if self._is_reference:
                self._plan, self._rest = plan, 0
                self.reasons = {row.seq_id: "reference" for row in rows}
                return plan
            for source in self.sources.values():
                if source.in_passes:
                    self._plan_passes(plan, source, rows, seconds, shape.num_sequences)
            self._price = self._price_of_row(seconds, shape.num_sequences)
            for source in self.sources.values():
                if not source.in_passes:
                    self._plan_lookups(plan, source, rows)
            self._plan_probes(plan, rows, seconds, shape.num_sequences)
            self.reasons = self._reasons([row for row in rows if row.seq_id not in plan], shape)
        most = _MOST_HOLD if plan else _MOST_REST
        # Who is still at the prompt, or could not be drafted for, may be ready in the next step.
        is_settled = bool(rows) and shape.num_sequences >= len(seq_ids)
        may_rest = is_settled and not changed and not self._has_probes
        self._rest = min(2 * self._rest + 1, most) if may_rest else 0
        self._plan = plan
        return plan

    def _relax(self, num_steps: int) -> None:
        """What drafts were found to cost is believed less and less while there are none: a machine
        that was busy at a bad time must not end them for good."""
        share = num_steps / _RELAXING_STEPS
        if not self._plan:
            self.cost.relax(share)
        asked = {name for depths in self._plan.values() for name in depths}
        for name, cost in self.draft_costs.items():
            if name not in asked:
                cost.relax(share)

    def _needs_reference(self) -> bool:
        """Whether to take a step without drafts, so that it is known what one costs: the first
        ones, and then every so often where there are always drafts."""
        if self._num_plain < _FIRST_PLAIN:
            return True
        return self._since_plain >= _REFERENCE_EVERY

    def _most_nodes(self, rows: Sequence[PlanRow]) -> int:
        most = max(source.limit for source in self.sources.values())
        return max(8, most * len(rows))

    def _depth_limit(self, row: PlanRow, source: Source) -> int:
        wanted = source.limit if row.wanted is None else min(row.wanted, source.limit)
        return min(wanted, row.room - 1)

    def _prices(self, name: str) -> tuple[DraftPrices, float]:
        call, per_row, one_pass, level, lag = self.draft_costs[name].parts(self.cost.slowdown)
        return DraftPrices(call, per_row, one_pass, level), lag

    def behind(self, name: str, seq_id: str, lag: int) -> int:
        """Tokens that a source has to catch up with, besides the last; `lag` counts from the last
        that it has KV for, or from the first."""
        return max(0, lag - self._seen.get((name, seq_id), 0) - 1)

    def _catching_up(self, row: PlanRow, name: str, lag_price: float) -> float:
        """Seconds of this step's share in catching up. It is spent before anything is gained, and
        the output ends sooner with drafts, so the steps that share it are counted low."""
        behind = max(0, self.behind(name, row.seq_id, row.lags[name]) - 1)
        return lag_price * behind / (0.5 * min(row.room, _HORIZON))

    def _price_of_row(self, seconds: Array, num_sequences: int) -> float:
        window = min(len(seconds) - 1, max(4, 2 * num_sequences))
        return price_of_row(self._rate, seconds[: window + 1])

    def _plan_passes(
        self,
        plan: dict[str, dict[str, int]],
        source: Source,
        rows: Sequence[PlanRow],
        seconds: Array,
        base_tokens: float,
    ) -> None:
        asked = [row for row in rows if source.name in row.lags]
        prices, lag_price = self._prices(source.name)
        record = self.records[source.name]
        choice = choose_depths(
            [
                DepthRow(
                    record.reach(row.seq_id, self._depth_limit(row, source)),
                    self._catching_up(row, source.name, lag_price),
                    self._weights[row.seq_id],
                )
                for row in asked
            ],
            base_tokens,
            seconds,
            prices,
            record.nodes_per_level,
        )
        plain = base_tokens / float(seconds[0])
        if choice.rate < _MARGIN * plain:
            return
        chosen = {row.seq_id: depth for row, depth in zip(asked, choice.depths, strict=True)}
        for row in self._first_few(record, [row for row in asked if chosen[row.seq_id]]):
            plan.setdefault(row.seq_id, {})[source.name] = chosen[row.seq_id]
            self.probing.forget(source.name, row.seq_id)
        self._rate = max(self._rate, choice.rate)

    def _first_few(self, record: AcceptanceRecord, rows: list[PlanRow]) -> list[PlanRow]:
        """Of a source that little is known of, the sequences that it is tried with: those with the
        longest way to go."""
        if record.num_asks >= _FIRST_ASKS or len(rows) <= _FIRST_ROWS:
            return rows
        return sorted(rows, key=lambda row: -row.room)[:_FIRST_ROWS]

    def _plan_lookups(
        self, plan: dict[str, dict[str, int]], source: Source, rows: Sequence[PlanRow]
    ) -> None:
        prices, lag_price = self._prices(source.name)
        record, found, gain = self.records[source.name], [], 0.0
        for row in rows:
            if source.name not in row.lags:
                continue
            cost = prices.row + self._catching_up(row, source.name, lag_price)
            worth = record.worth(row.seq_id, self._price / self._weights[row.seq_id])
            net = worth * self._weights[row.seq_id] / self._rate - _ASK_MARGIN * cost
            if net > 0:
                found.append(row)
                gain += net
        if gain > prices.call:
            for row in self._first_few(record, found):
                depth = self._depth_limit(row, source)
                plan.setdefault(row.seq_id, {})[source.name] = depth
                self.probing.forget(source.name, row.seq_id)

    def _plan_probes(
        self,
        plan: dict[str, dict[str, int]],
        rows: Sequence[PlanRow],
        seconds: Array,
        num_sequences: int,
    ) -> None:
        """Ask once more where it was given up, if the purse allows it and it could pay."""
        self._has_probes = False
        for source in self.sources.values():
            idle = [
                row
                for row in rows
                if source.name in row.lags and source.name not in plan.get(row.seq_id, ())
            ]
            if not idle or not self.probing.has_money:
                continue
            row = self.probing.choose(source.name, [row.seq_id for row in idle])
            if row is None:
                continue
            chosen = idle[row]
            if not self._could_pay(source, idle, seconds, num_sequences):
                continue
            prices, lag_price = self._prices(source.name)
            depth = self._depth_limit(chosen, source)
            if source.in_passes:
                depth = min(depth, 2)
            behind = self.behind(source.name, chosen.seq_id, chosen.lags[source.name])
            num_nodes = min(2, len(seconds) - 1)
            loss = (
                prices.call
                + prices.row
                + depth * (prices.one_pass + prices.level)
                + lag_price * behind
                + float(seconds[num_nodes] - seconds[0])
            )
            self.probing.begin(source.name, chosen.seq_id, loss)
            self._has_probes = True
            plan.setdefault(chosen.seq_id, {})[source.name] = depth

    def _could_pay(
        self, source: Source, rows: Sequence[PlanRow], seconds: Array, num_sequences: int
    ) -> bool:
        """Whether drafts would pay if nearly all were accepted."""
        prices, _ = self._prices(source.name)
        limit = max(self._depth_limit(row, source) for row in rows)
        reach = [0.9**level for level in range(1, min(limit, 8) + 1)]
        if source.in_passes:
            optimistic = [DepthRow(reach)] * len(rows)
            return any(choose_depths(optimistic, num_sequences, seconds, prices).depths)
        worth = sum(chance - self._price for chance in reach if chance > self._price)
        return worth > self._rate * (prices.row + prices.call / len(rows))

    def _reasons(self, rows: Sequence[PlanRow], shape: StepShape) -> dict[str, str]:
        """Why these rows have no draft: whether they would have one if they were alone."""
        if not rows or shape.num_sequences == 1:
            return {row.seq_id: "rejected" for row in rows}
        alone = StepShape(1, 1, shape.context // shape.num_sequences)
        seconds = self.cost.table(alone, 4)
        rate = 1.0 / float(seconds[0])
        price = price_of_row(rate, seconds)
        least = {}
        for name, source in self.sources.items():
            prices, _ = self._prices(name)
            passes = prices.one_pass + prices.level if source.in_passes else 0.0
            least[name] = rate * (prices.call + prices.row + passes)
        return {row.seq_id: self._reason(row, price, least) for row in rows}

    def _reason(self, row: PlanRow, price: float, least: Mapping[str, float]) -> str:
        for name in row.lags:
            record = self.records[name]
            if self.sources[name].in_passes:
                pays = record.conditional(row.seq_id, 1) > price + least[name]
            else:
                pays = record.worth(row.seq_id, price) > least[name]
            if pays:
                return "batch_full"
        return "rejected"

    def min_path_chance(self, name: str) -> float:
        """The chance below which a draft with a model is not worth another level."""
        num_rows = sum(name in depths for depths in self._plan.values())
        if not num_rows or not self.sources[name].in_passes:
            return 0.0
        prices, _ = self._prices(name)
        level = self._rate * (prices.one_pass / num_rows + prices.level) + self._price
        return min(0.9, level / max(0.3, self.records[name].conditional("", 2)))

    # Offers ---------------------------------------------------------------------------------------

    def offer(
        self,
        name: str,
        seq_id: str,
        parents: Sequence[int],
        depths: Sequence[int],
        stated: Sequence[float] | None,
        judged: Sequence[bool] | None = None,
        *,
        follows_draws: bool = False,
    ) -> Offer:
        """Take a proposal of a source in; an empty one says that it has nothing to say.

        Args:
            follows_draws: the shape may depend on tokens that were drawn, under a rule that does
                not allow them to decide. The proposal is kept whole then, and stands for as much
                as earlier answers were worth.
        """
        record = self.records[name]
        worth = record.worth(seq_id, self._price) if follows_draws else None
        offer = make_offer(record, name, seq_id, parents, depths, stated, judged)
        offer.worth = worth
        offer.is_probe = self.probing.is_probing(name, seq_id)
        return offer

    def record_draft(
        self, name: str, rows: Mapping[str, int], depths: Sequence[int], lag: int, seconds: float
    ) -> None:
        """Learn what asking cost.

        Args:
            rows: the asked sequences, and how many tokens each has.
            depths: how deep each answer went.
            lag: tokens that had to be caught up with, all together, besides one for each.
        """
        for seq_id, num_tokens in rows.items():
            if not self.sources[name].in_passes:
                self._seen[name, seq_id] = num_tokens
        # How fast the machine was is known when the step is over.
        self._drafted.append((name, len(rows), max(depths, default=0), sum(depths), lag, seconds))

    def better(self, first: Offer | None, second: Offer | None) -> Offer | None:
        """Of two offers for one sequence, the one that brings more; the first of equal ones."""
        if first is None or second is None:
            return first or second
        return second if second.net(self._price) > first.net(self._price) else first

    def still_asked(
        self, name: str, asked: Mapping[str, int], offers: Mapping[str, Offer]
    ) -> dict[str, int]:
        """Of the sequences for which a source was to be asked, those for which it still pays, given
        what the sources before it have offered."""
        record, kept = self.records[name], {}
        for seq_id, depth in asked.items():
            offer = offers.get(seq_id)
            if offer is not None:
                reach = record.reach(seq_id, depth)
                prices, _ = self._prices(name)
                cost = self._price + self._rate * (prices.level + prices.one_pass / len(asked))
                if offer.net(self._price) >= sum(max(0.0, c - cost) for c in reach):
                    continue
            kept[seq_id] = depth
        return kept

    # Prune ----------------------------------------------------------------------------------------

    def prune(self, offers: Sequence[Offer], shape: StepShape, drafting: float) -> None:
        """Say in `Offer.kept` which nodes the target judges. One that `stays_whole` is kept as it
        is. Of a probe the likeliest path is kept, two levels of it.

        Args:
            drafting: seconds that were spent on the offers.
        """
        num_nodes = sum(len(offer.parents) for offer in offers)
        seconds = self.cost.table(shape, num_nodes)
        prune_offers(offers, shape.num_sequences, seconds, drafting, self._weights)
        for offer in offers:
            if not offer.kept:
                learn_end(self.records[offer.source], offer, -1)

    # Learn ----------------------------------------------------------------------------------------

    def observe(self, offer: Offer, path: Sequence[int]) -> None:
        """Learn from a verdict: `path` are the accepted nodes, as they are numbered in the
        offer."""
        learn_offer(self.records[offer.source], offer, path)

    def record_step(self, shape: StepShape, num_draft_rows: int, seconds: float) -> None:
        """Learn how long a step took, drafting left out."""
        self.probing.earn(seconds)
        if num_draft_rows == 0 and not self._plan:
            self._count_plain()
            if self._num_plain % _LEARN_EVERY != 1 and self._rested > 2:
                return
        self.cost.observe(shape, num_draft_rows, seconds, learn=not self._is_routine())
        for name, num_rows, num_passes, num_levels, lag, spent in self._drafted:
            self.draft_costs[name].observe(
                num_rows=num_rows,
                num_passes=num_passes,
                num_levels=num_levels,
                lag=lag,
                seconds=spent,
                slowdown=self.cost.speed_now,
            )
        self._drafted.clear()

    def pass_over(self, seconds: float) -> None:
        """A step took so long that teaches nothing, since it computed prompts too. It counts as the
        reference that it was to be: where prompts never end, so would the steps without drafts."""
        self.probing.earn(seconds)
        if self._is_reference:
            self._count_plain()
        self._drafted.clear()

    def _count_plain(self) -> None:
        self._num_plain += 1
        self._since_plain = 0

    def stats(self) -> dict[str, Any]:
        """What is believed at present, times in seconds."""
        alone = self.cost.table(StepShape(1, 1), 8)
        return {
            "step_seconds": {rows + 1: float(alone[rows]) for rows in (0, 1, 3, 7)},
            "slowdown": self.cost.slowdown,
            "sources": {
                name: {
                    "acceptance_by_depth": self.records[name].reach("", 8),
                    "seconds": dict(
                        zip(
                            ("call", "row", "pass", "row_and_pass", "token_behind"),
                            self.draft_costs[name].parts(self.cost.slowdown),
                            strict=True,
                        )
                    ),
                }
                for name in self.sources
            },
        }

    def _is_routine(self) -> bool:
        """Whether enough drafted steps were learned from to pass over this one."""
        self._num_routine += 1
        return self.cost.num_seen > _LEARN_ALL and self._num_routine % _LEARN_ROUTINE != 0

    def keeps(self, name: str, seq_id: str, num_tokens: int) -> bool:
        """Whether a source should keep what it can of an output that has ended. Where it is in use
        it should; where it is given up, as often as the purse allows."""
        prices, lag_price = self._prices(name)
        if name in self._plan.get(seq_id, ()) and not self.probing.is_probing(name, seq_id):
            return True
        if not self.probing.has_money:
            return False
        self.probing.pay(lag_price * num_tokens)
        return True

    def drop(self, seq_id: str, *, finished: bool) -> None:
        """Forget a sequence that has ended, or the places of drafters in one that was preempted."""
        for name in self.sources:
            self._seen.pop((name, seq_id), None)
            if finished:
                self.records[name].drop(seq_id)
                self.probing.forget(name, seq_id)


def _weights(rows: Sequence[PlanRow]) -> dict[str, float]:
    """What a token of each sequence counts: more for those that have a longer way to go, so that a
    batch ends together, and no sequence is always the one that is left out."""
    mean = sum(row.room for row in rows) / len(rows)
    return {row.seq_id: min(max((row.room / mean) ** 3, 0.5), 2.0) for row in rows}
