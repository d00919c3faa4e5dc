"""Plans one step: which sources draft for which sequences, and how deep.

passes    of a model: every level costs, so the depth is chosen
lookups   cost the same at any depth: whether to ask is chosen, at the price of a row by then
probes    where it was given up, now and then, out of a probe budget
reasons   for those that are left
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from folospec.spec.planner.acceptance_record import AcceptanceRecord
from folospec.spec.planner.estimates import Estimates
from folospec.spec.planner.feedback import Feedback
from folospec.spec.planner.plan_core import DepthRow, DraftPrices, choose_depths, price_of_row
from folospec.spec.planner.plan_terms import PlannedSequence, Source
from folospec.spec.planner.probing import Probing
from folospec.spec.planner.step_cost import StepShape

_MARGIN, _ASK_MARGIN, _ASK_MARGIN_OF_MANY = 1.05, 1.5, 5.0
"""Drafts must promise so many times the rate without any, and answers so many times what asking
costs: what is chosen for its promise tends to keep less, and pruning and learning take time too. Of
many sequences all wait while one is asked for."""
_TRIAL_ASKS, _TRIAL_STEPS = 256, 20.0
"""A lookup is first tried for so many questions, or for as many as take as long as so many plain
steps."""
_SLOWEST = 4
_FIRST_ASKS, _FIRST_ROWS = 16, 4
"""Until a source was asked so often, it is asked for so many sequences at a time."""


class StepPlan:
    """A plan, empty until `choose`.

    Args:
        rows: those that could be drafted for.
        shape: the step without drafts.
        ends_together: nobody comes to take the place of a sequence that is done.
    """

    def __init__(
        self,
        estimates: Estimates,
        probing: Probing,
        feedback: Feedback,
        rows: Sequence[PlannedSequence],
        shape: StepShape,
        *,
        ends_together: bool = False,
    ) -> None:
        self._estimates, self._probing, self._feedback = estimates, probing, feedback
        self._rows, self._num_sequences, self._shape = rows, shape.num_sequences, shape
        self.depths: dict[str, dict[str, int]] = {}
        """seq_id -> name of the source -> how deep."""
        self.reasons: dict[str, str] = {}
        """Why sequences without a draft have none."""
        self.probe_loss: float | None = None
        """Seconds that probes are expected to cost; None where there are none."""
        self.promised, self.corrected = 1.0, 1.0
        """The expected rate over that without drafts: by the estimates, and by what those were
        found to keep."""
        self.rate = self.price = 0.0
        """Tokens per second that are expected, and tokens that a draft row must bring."""
        self.weights = dict.fromkeys((row.seq_id for row in rows), 1.0)
        if ends_together and len(rows) > 1:
            self.weights = self._closed_weights()
        self._seconds = [0.0]
        """Of the step with 0, 1, ... draft rows."""

    @property
    def has_probes(self) -> bool:
        return self.probe_loss is not None

    @property
    def asked(self) -> set[str]:
        """The sources that are asked for anyone."""
        return {name for depths in self.depths.values() for name in depths}

    def seconds(self, shape: StepShape, num_nodes: int) -> list[float]:
        """Seconds of a step with 0, 1, ... draft rows, `num_nodes` of them at least: as they were
        when the plan was made, if the step is like that one but for its context. Only ratios
        decide, and a plan does not hold for long."""
        own = self._shape
        alike = (shape.num_rows, shape.num_sequences) == (own.num_rows, own.num_sequences)
        if alike and num_nodes < len(self._seconds):
            return self._seconds
        return self._estimates.cost.table(shape, num_nodes)

    def num_rows(self, name: str) -> int:
        """For how many sequences a source is asked."""
        return sum(name in depths for depths in self.depths.values())

    def choose(self) -> None:
        """Fill the plan in."""
        sources = self._estimates.sources.values()
        most_nodes = max(8, max(source.limit for source in sources) * len(self._rows))
        self._seconds = self._estimates.cost.table(self._shape, most_nodes)
        self.rate = self._num_sequences / self._seconds[0]
        for source in sources:
            if source.in_passes:
                self._add_passes(source)
        window = min(len(self._seconds) - 1, max(4, 2 * self._num_sequences))
        self.price = price_of_row(self.rate, self._seconds[: window + 1])
        for source in sources:
            if not source.in_passes:
                self._add_lookups(source)
        for source in sources:
            self._add_probe(source)
        self.reasons = self._find_reasons()

    def _closed_weights(self) -> dict[str, float]:
        """What a token of each sequence counts where the batch ends with its slowest: 1 on average.

        A token less to go saves the row of a later step, whoever's it is; what a step costs besides
        its rows is saved by the last sequence alone. Who that will be is not sure: the chance is in
        proportion to the power `_SLOWEST` of the way to go.
        """
        count, cost = self._shape.num_sequences, self._estimates.cost
        whole = cost.expected(self._shape, 0)
        single = cost.expected(StepShape(1, 1, self._shape.context // count), 0)
        one_row = max(0.0, whole - single) / max(1, count - 1)
        fixed = max(0.0, whole - count * one_row)
        chances = [row.room**_SLOWEST for row in self._rows]
        total = sum(chances)
        return {
            row.seq_id: (count * one_row + len(self._rows) * fixed * chance / total) / whole
            for row, chance in zip(self._rows, chances, strict=True)
        }

    def _prices(self, name: str) -> DraftPrices:
        return self._estimates.prices(name, is_first=not self.depths)

    def _add(self, row: PlannedSequence, source: Source, depth: int) -> None:
        self.depths.setdefault(row.seq_id, {})[source.name] = depth

    def _add_passes(self, source: Source) -> None:
        asked = [row for row in self._rows if source.name in row.uncomputed]
        prices, record = self._prices(source.name), self._estimates.records[source.name]
        choice = choose_depths(
            [
                DepthRow(
                    self._estimates.reach(row, source),
                    self._estimates.catching_up(row, source.name, prices.num_uncomputed),
                    self.weights[row.seq_id],
                )
                for row in asked
            ],
            self._num_sequences,
            self._seconds,
            prices,
            record.nodes_per_level,
        )
        promised = choice.rate / self.rate
        if promised < _MARGIN or not self._feedback.trusts(source.name, promised):
            return
        chosen = {row.seq_id: depth for row, depth in zip(asked, choice.depths, strict=True)}
        for row in _first_few(record, [row for row in asked if chosen[row.seq_id]]):
            self._add(row, source, chosen[row.seq_id])
            self._probing.forget(source.name, row.seq_id)
        self._promise(source, promised)
        self.rate = choice.rate

    def _promise(self, source: Source, gain: float) -> None:
        self.promised *= gain
        self.corrected *= gain * self._feedback.factor(source.name)

    def _add_lookups(self, source: Source) -> None:
        prices, record = self._prices(source.name), self._estimates.records[source.name]
        margin = _ASK_MARGIN if self._num_sequences == 1 else _ASK_MARGIN_OF_MANY
        found, gain, saved = [], 0.0, -prices.call
        if self._is_on_trial(source):
            for row in [row for row in self._rows if source.name in row.uncomputed][:_FIRST_ROWS]:
                self._add(row, source, self._estimates.depth_limit(row, source))
            return
        for row in self._rows:
            if source.name not in row.uncomputed:
                continue
            cost = prices.row + self._estimates.catching_up(row, source.name, prices.num_uncomputed)
            expected_gain = record.expected_gain(row.seq_id, self.price / self.weights[row.seq_id])
            net = expected_gain * self.weights[row.seq_id] / self.rate - margin * cost
            if net > 0:
                found.append(row)
                gain += net
                saved += net + (margin - 1.0) * cost
        promised = 1.0 + saved * self.rate / self._num_sequences
        if gain > prices.call and self._feedback.trusts(source.name, promised):
            for row in _first_few(record, found):
                self._add(row, source, self._estimates.depth_limit(row, source))
                self._probing.forget(source.name, row.seq_id)
            self._promise(source, promised)

    def _is_on_trial(self, source: Source) -> bool:
        """Whether to ask whatever is expected: a text has more to find in it the longer it is, so
        who gives up where outputs begin never learns what comes later."""
        prices, record = self._prices(source.name), self._estimates.records[source.name]
        rows = [row for row in self._rows if source.name in row.uncomputed]
        if record.num_asks >= _TRIAL_ASKS or not rows or not self._could_gain(source, rows):
            return False
        return record.num_asks * (prices.call + prices.row) < _TRIAL_STEPS * self._seconds[0]

    # Probes ---------------------------------------------------------------------------------------

    def _add_probe(self, source: Source) -> None:
        """Ask once more where it was given up, if the probe budget allows it and it could pay."""
        name, probing = source.name, self._probing
        if not probing.has_budget:
            return
        idle = [
            row
            for row in self._rows
            if name in row.uncomputed and name not in self.depths.get(row.seq_id, ())
        ]
        turn = probing.choose(name, [row.seq_id for row in idle], spread=not source.in_passes)
        if turn is None or not self._could_gain(source, idle):
            return
        row, prices = idle[turn], self._prices(name)
        depth = self._estimates.depth_limit(row, source)
        if source.in_passes:
            depth = min(depth, 2)
        num_unread = self._estimates.num_unread(name, row.seq_id, row.uncomputed[name])
        num_nodes = min(2, len(self._seconds) - 1)
        loss = (
            prices.call
            + prices.row
            + depth * (prices.one_pass + prices.level)
            + prices.num_uncomputed * num_unread
            + self._seconds[num_nodes]
            - self._seconds[0]
        )
        probing.begin(name, row.seq_id, loss)
        self.probe_loss = (self.probe_loss or 0.0) + loss
        self._add(row, source, depth)

    def _could_gain(self, source: Source, rows: Sequence[PlannedSequence]) -> bool:
        """Whether drafts would pay if nearly all were accepted."""
        prices = self._prices(source.name)
        limit = max(self._estimates.depth_limit(row, source) for row in rows)
        reach = [0.9**level for level in range(1, min(limit, 8) + 1)]
        if source.in_passes:
            optimistic = [DepthRow(reach)] * len(rows)
            return any(choose_depths(optimistic, self._num_sequences, self._seconds, prices).depths)
        expected_gain = sum(chance - self.price for chance in reach if chance > self.price)
        return expected_gain > self.rate * (prices.row + prices.call / len(rows))

    # Reasons --------------------------------------------------------------------------------------

    def _find_reasons(self) -> dict[str, str]:
        """Why rows have no draft: whether they would have one if they were alone."""
        rows = [row for row in self._rows if row.seq_id not in self.depths]
        if not rows or self._num_sequences == 1:
            return {row.seq_id: "rejected" for row in rows}
        alone = StepShape(1, 1, self._shape.context // self._num_sequences)
        seconds = self._estimates.cost.table(alone, 4)
        rate = 1.0 / seconds[0]
        price = price_of_row(rate, seconds)
        least = {}
        for name, source in self._estimates.sources.items():
            prices = self._estimates.prices(name, is_first=True)
            passes = prices.one_pass + prices.level if source.in_passes else 0.0
            least[name] = rate * (prices.call + prices.row + passes)
        return {row.seq_id: self._reason(row, price, least) for row in rows}

    def _reason(self, row: PlannedSequence, price: float, least: Mapping[str, float]) -> str:
        for name in row.uncomputed:
            record = self._estimates.records[name]
            if self._estimates.sources[name].in_passes:
                is_worthwhile = record.conditional(row.seq_id, 1) > price + least[name]
            else:
                is_worthwhile = record.expected_gain(row.seq_id, price) > least[name]
            if is_worthwhile:
                return "batch_full"
        return "rejected"


def _first_few(record: AcceptanceRecord, rows: list[PlannedSequence]) -> list[PlannedSequence]:
    """Of a source that little is known of, the sequences that it is tried with: those with the
    longest way to go."""
    if record.num_asks >= _FIRST_ASKS or len(rows) <= _FIRST_ROWS:
        return rows
    return sorted(rows, key=lambda row: -row.room)[:_FIRST_ROWS]
