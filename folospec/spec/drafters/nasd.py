"""Drafts what followed these tokens most often, by counts of n-grams (arXiv 2404.08698).

Counted is what this sequence has and what the target itself would have gone on with: ANPD, with a
filler of top tokens.

    context  ... a b      store   (a, b) -> c: 3, d: 1
    draft          c               (b, c) -> e: 2          longest known context first, one token
                     e             (c, e) -> unknown       at a time, until none is known
                                   (e,)   -> f: 1
                       f

The store (`spec.stores.ngram_store`) counts the prompt, then every committed token once. Beside
that, and for less, it notes the `filler_top_k` likeliest tokens after every row that the target
verified, accepted or not. With `filler_top_k` = 1 that is the target's own guess, as in ANPD.

With `egag` the draft is as long as the counts are sure of it, see `EntropyGate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from folospec.core.token_tree import TokenTree
from folospec.sampling import noise
from folospec.spec.drafters.base import (
    Drafter,
    DrafterContext,
    DrafterNeeds,
    DraftRequest,
    StepResult,
    check_count,
)
from folospec.spec.proposal import Proposal
from folospec.spec.stores.acceptance_table import AcceptanceTable, tried_nodes
from folospec.spec.stores.ngram_store import Match, NgramStore

_OPTIONS: dict[str, Any] = {
    "n": 4,
    "store": "basic",
    "filler_top_k": 1,
    "stop_if_unknown": True,
    "shared": False,
    "max_entries": 100_000,
    "egag": False,
}
_GATE_OPTIONS: dict[str, Any] = {"gamma_min": 1, "gamma_max": None, "ema": 0.0}


@dataclass(frozen=True, slots=True)
class EntropyGate:
    """Draft length from entropy: round((1 - doubt) * gamma_max), within [gamma_min, gamma_max].

    The doubt of a context is the entropy of the scores there over the logarithm of the number of
    *different tokens* that have one. Over the logarithm of the vocabulary size, the usual choice,
    it is nearly nothing for any context (an entropy of 1 nat is 0.09 of the logarithm of 128,000),
    so the length would not move; and it is rounded, not floored, or the smallest doubt would cost a
    token. The doubt of a draft is the largest of the contexts it runs through, not the first one's,
    so a draft that sets out surely and comes to a fork is cut there. `ema` is the share of the
    sequence's earlier doubt in that of the next draft.
    """

    gamma_min: int
    gamma_max: int
    ema: float

    def smooth(self, doubt: float, earlier: float | None) -> float:
        return doubt if earlier is None else self.ema * earlier + (1.0 - self.ema) * doubt

    def length(self, doubt: float) -> int:
        return min(self.gamma_max, max(self.gamma_min, round((1.0 - doubt) * self.gamma_max)))


@dataclass(slots=True)
class _State:
    """Of one sequence."""

    store: NgramStore
    num_counted: int
    """Committed tokens that are in the store."""
    tail: Sequence[int] = ()
    """The last n - 1 committed tokens."""
    doubt: float | None = None
    evidence: list[tuple | None] = field(default_factory=list)
    """Per node of the last draft, what it was made from."""


class NasdDrafter(Drafter):
    """Drafts chains from counted n-grams.

    Options:
        n: longest n-gram; contexts have 1 to n - 1 tokens.
        store: "basic", all context lengths with back-off, or "one_level", n - 1 alone.
        filler_top_k: likeliest tokens of the target noted after each verified row; 0 for none.
        stop_if_unknown: end a draft at an unknown context. Otherwise a pseudo-random token fills
            the gap, as the original method does: its verification is nearly always wasted.
        shared: one store for all sequences, instead of one for each.
        max_entries: most (context, token) pairs of a store.
        egag, gamma_min, gamma_max, ema: entropy-gated draft length; gamma_max is the number of
            speculative tokens if it is not given.

    Raises:
        ValueError: an option is out of range, or has no effect beside the others.
    """

    def __init__(self, context: DrafterContext) -> None:
        super().__init__(context)
        context.refuse_model()
        options = context.read_options({**_OPTIONS, **_GATE_OPTIONS})
        _check(options)
        self.n, self.filler_top_k = options["n"], options["filler_top_k"]
        self._store_settings = (self.n, options["store"], options["max_entries"])
        store = self._new_store()
        self._shared = store if options["shared"] else None
        self._stop_if_unknown = options["stop_if_unknown"]
        self._vocab_size, self._stream = context.vocab_size, context.stream
        self._gate = _gate(options, set(context.config.options), self.num_speculative_tokens)
        self._states: dict[str, _State] = {}
        self._num_counted: dict[str, int] = {}
        """With a shared store, of sequences that were preempted: they are not counted again."""
        self._acceptance = AcceptanceTable(prior=0.4)

    @property
    def needs(self) -> DrafterNeeds:
        return DrafterNeeds(num_top_tokens=self.filler_top_k)

    def propose(self, requests: list[DraftRequest]) -> list[Proposal | None]:
        return [self._propose(row) for row in requests]

    def _propose(self, row: DraftRequest) -> Proposal | None:
        state = self._states.get(row.seq_id) or self._begin(row)
        state.store.update(row.token_ids, state.num_counted)
        state.num_counted = len(row.token_ids)
        state.tail = row.token_ids[1 - self.n :]
        state.evidence = []
        largest, earlier = 0.0, state.doubt
        draft_token_ids: list[int] = []
        while len(draft_token_ids) < min(row.max_draft_tokens, row.max_depth):
            match = state.store.lookup([*state.tail, *draft_token_ids][1 - self.n :])
            if match is None and self._stop_if_unknown:
                break
            if self._gate is not None:
                largest = max(largest, 1.0 if match is None else match.continuations.doubt)
                state.doubt = self._gate.smooth(largest, earlier)
                if len(draft_token_ids) >= self._gate.length(state.doubt):
                    break
            depth = len(draft_token_ids) + 1
            draft_token_ids.append(self._guess(row, depth) if match is None else match.token_id)
            state.evidence.append(_evidence(match))
        if not draft_token_ids:
            return None
        confidence = [self._chance(evidence) for evidence in state.evidence]
        return Proposal(TokenTree.chain(draft_token_ids), confidence=confidence)

    def _begin(self, row: DraftRequest) -> _State:
        if self._shared is None:
            state = _State(self._new_store(), 0)
        else:
            # The prompt of n > 1 is one prompt.
            start = row.num_prompt_tokens if row.sample_index > 0 else 0
            state = _State(self._shared, self._num_counted.pop(row.seq_id, start))
        self._states[row.seq_id] = state
        return state

    def _new_store(self) -> NgramStore:
        return NgramStore(*self._store_settings)

    def _guess(self, row: DraftRequest, depth: int) -> int:
        """A uniform token; keyed, so that a run can be repeated."""
        purpose = noise.purpose_code(noise.Purpose.DRAFT, row=depth, stream=self._stream)
        key = noise.key(row.seed, row.sample_index, row.root_position, purpose)
        return key % self._vocab_size

    def _chance(self, evidence: tuple | None) -> float:
        guessed = 1.0 / max(2, self._vocab_size) if evidence is None else None
        return self._acceptance.estimate(evidence, prior=guessed)

    def observe(self, results: list[StepResult]) -> None:
        for result in results:
            state = self._states.get(result.seq_id)
            if state is None:
                continue
            for node, accepted in tried_nodes(result):
                self._acceptance.record(state.evidence[node], accepted)
            self._fill(state, result)
            state.tail = [*state.tail, *result.new_token_ids][1 - self.n :]

    def _fill(self, state: _State, result: StepResult) -> None:
        """Note the target's likeliest tokens after the root and every verified node, but for those
        that it said: they are counted."""
        if result.top_token_ids is None:
            return
        proposal = result.proposal
        tree = TokenTree() if proposal is None else proposal.tree
        path = [-1] if result.verdict is None else [-1, *result.verdict.path]
        said = dict(zip(path, result.new_token_ids, strict=False))
        for node, token_ids in enumerate(result.top_token_ids.tolist(), start=-1):
            if node < 0 or (proposal is not None and proposal.is_candidate(node)):
                context = [*state.tail, *tree.path_token_ids(node)][1 - self.n :]
                state.store.fill(context, token_ids, said.get(node))

    def finish(self, seq_id: str, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        state = self._states.pop(seq_id, None)
        num_counted = self._num_counted.pop(seq_id, None)
        if self._shared is not None:
            num_counted = state.num_counted if state is not None else num_counted
            if num_counted is not None:
                self._shared.update(token_ids, num_counted)

    def drop(self, seq_id: str) -> None:
        state = self._states.pop(seq_id, None)
        if state is not None and self._shared is not None:
            self._num_counted[seq_id] = state.num_counted

    def stats(self) -> dict[str, Any]:
        stores = [state.store for state in self._states.values()]
        stores = [self._shared] if self._shared is not None else stores
        return {"num_stores": len(stores), "num_entries": sum(len(store) for store in stores)}


def _evidence(match: Match | None) -> tuple | None:
    """What is like evidence: the length of the context, which table, and how often."""
    return (
        None if match is None else (match.context_length, match.is_filler, min(int(match.score), 4))
    )


def _check(options: dict[str, Any]) -> None:
    for name, least in (("n", 2), ("filler_top_k", 0), ("max_entries", 1)):
        check_count(name, options[name], least)
    for name in ("stop_if_unknown", "shared", "egag"):
        if not isinstance(options[name], bool):
            raise ValueError(f"{name} must be True or False, got {options[name]!r}")


def _gate(options: dict[str, Any], given: set[str], limit: int) -> EntropyGate | None:
    """Read the options of the gate; they are refused where there is none."""
    unused = sorted(given & set(_GATE_OPTIONS))
    if not options["egag"]:
        if unused:
            raise ValueError(f"{', '.join(unused)} must not be given without egag=True")
        return None
    gamma_min, ema = options["gamma_min"], options["ema"]
    gamma_max = limit if options["gamma_max"] is None else options["gamma_max"]
    for name, value, least, most in (
        ("gamma_max", gamma_max, 1, limit),
        ("gamma_min", gamma_min, 0, gamma_max),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(f"{name} must be an integer in [{least}, {most}], got {value!r}")
    if isinstance(ema, bool) or not isinstance(ema, int | float) or not 0.0 <= ema < 1.0:
        raise ValueError(f"ema must be in [0, 1), got {ema!r}")
    return EntropyGate(gamma_min, gamma_max, float(ema))
