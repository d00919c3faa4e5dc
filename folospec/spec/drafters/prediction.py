"""Drafts from the output that the caller predicts.

An edited file is the usual case: `SamplingParams(prediction=original_file)`.

An `Alignment` follows the output through the expected text, over replacements, insertions,
omissions and moves. Where it sees several ways to go on they become branches, weighed by how often
drafts from such evidence were accepted (the search is the one of SpecInfer's token trees, arXiv
2305.09781, with evidence in the place of a model):

    expected  ... ( count ) ; x = count ...            root = "("
    output    ... ( index ) ; x = index ... (            |-- index -- ) -- ;     learned
                                                         `-- count -- ) -- ;     as it was

A step costs the output's new tokens and the nodes of the draft, whatever the length of either text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from folospec.core.token_tree import TokenTree
from folospec.spec.drafters.base import (
    Drafter,
    DrafterContext,
    DrafterNeeds,
    DraftRequest,
    StepResult,
    check_count,
)
from folospec.spec.proposal import Proposal
from folospec.spec.stores.acceptance_table import AcceptanceTable, share_among_siblings, tried_nodes
from folospec.spec.stores.alignment import Alignment, Reading
from folospec.spec.trees.best_first import grow_best_first, read_tree_option

_OPTIONS: dict[str, Any] = {
    "min_match": 3,
    "max_match": 8,
    "min_token_prob": 0.05,
    "tree": None,
}
FOLLOWED = 0.9
"""How often a reading is expected to be right about a token, before any was tried."""


@dataclass(slots=True)
class _State:
    """A node of the draft: the readings that agree with the path to it, with their shares."""

    readings: list[tuple[float, Reading]]
    key: tuple = ()
    """The kind of evidence it rests on."""
    chance: float = 1.0


class PredictionDrafter(Drafter):
    """Drafts from `SamplingParams.prediction`; a request without one is left to others.

    Options: `min_match` and `max_match`, tokens that must agree, and that are compared at most, to
    take the text up again after a departure; `min_token_prob`, the joint probability below which
    nothing is drafted; `tree`, by default wherever the acceptance rule takes trees.
    """

    default_num_speculative_tokens = 24

    def __init__(self, context: DrafterContext) -> None:
        super().__init__(context)
        context.refuse_model()
        options = context.read_options(_OPTIONS)
        self.min_match, self.max_match = options["min_match"], options["max_match"]
        self.min_token_prob = options["min_token_prob"]
        _check(options)
        self.is_chain = not read_tree_option(options["tree"], context.acceptance)
        self._acceptance = AcceptanceTable()
        self._alignments: dict[str, Alignment] = {}
        self._keys: dict[str, list[tuple]] = {}

    @property
    def needs(self) -> DrafterNeeds:
        return DrafterNeeds(prediction=True)

    def propose(self, requests: list[DraftRequest]) -> list[Proposal | None]:
        return [self._propose(row) if row.prediction_token_ids else None for row in requests]

    def _propose(self, row: DraftRequest) -> Proposal | None:
        alignment = self._alignments.get(row.seq_id)
        if alignment is None:
            alignment = Alignment(row.prediction_token_ids, self.min_match, self.max_match)
            self._alignments[row.seq_id] = alignment
        for place in range(row.num_prompt_tokens + len(alignment.output), len(row.token_ids)):
            alignment.append(row.token_ids[place])

        def children(state: _State) -> Iterator[tuple[int, float, _State]]:
            return self._children(alignment, state)

        grown = grow_best_first(
            _State(alignment.readings()),
            children,
            max_nodes=row.max_draft_tokens,
            max_depth=row.max_depth,
            min_joint=self.min_token_prob,
            is_chain=self.is_chain,
        )
        self._keys[row.seq_id] = [state.key for state in grown.states]
        if len(grown) == 0:
            return None
        chances = [state.chance for state in grown.states]
        return Proposal(
            TokenTree(grown.token_ids, grown.parents),
            confidence=share_among_siblings(grown.parents, chances),
        )

    def _children(self, alignment: Alignment, state: _State) -> Iterator[tuple[int, float, _State]]:
        """One child for each token that a reading expects; those that expect the same go on
        together."""
        by_token: dict[int, list[tuple[float, Reading, Reading]]] = {}
        for weight, reading in state.readings:
            for token_id, share, after in alignment.continuations(reading):
                by_token.setdefault(token_id, []).append((weight * share, reading, after))
        for token_id, ways in by_token.items():
            mass = sum(weight for weight, _, _ in ways)
            _, reading, after = max(ways, key=lambda way: way[0])
            kind = "replaced" if after.rest else reading.kind
            key = (kind, min(reading.run, 63).bit_length(), round(8 * mass))
            chance = self._acceptance.estimate(key, prior=FOLLOWED * mass)
            followed = [(weight / mass, after) for weight, _, after in ways]
            yield token_id, chance, _State(followed, key, chance)

    def observe(self, results: list[StepResult]) -> None:
        for result in results:
            keys = self._keys.get(result.seq_id, [])
            for node, accepted in tried_nodes(result):
                self._acceptance.record(keys[node], accepted)

    def drop(self, seq_id: str) -> None:
        self._alignments.pop(seq_id, None)
        self._keys.pop(seq_id, None)

    def stats(self) -> dict[str, Any]:
        alignments = self._alignments.values()
        return {
            "num_sequences": len(alignments),
            "num_expected_tokens": sum(len(a.expected) for a in alignments),
            "num_replacements": sum(len(a.replacements) for a in alignments),
        }


def _check(options: dict[str, Any]) -> None:
    for name in ("min_match", "max_match"):
        check_count(name, options[name])
    if options["min_match"] > options["max_match"]:
        raise ValueError(
            f"min_match must be at most max_match={options['max_match']}, got "
            f"{options['min_match']}"
        )
    least = options["min_token_prob"]
    if isinstance(least, bool) or not isinstance(least, (int, float)) or not 0 <= least <= 1:
        raise ValueError(f"min_token_prob must be in [0, 1], got {least!r}")
