"""Guesses many places ahead, and drafts from the n-grams of the guesses (arXiv 2402.02057).

This is lookahead decoding (Fu et al., section 3).

One pass of the target runs two branches behind the last committed token `a`. The lookahead branch
is a window of guesses, `ngram_size` - 1 rows of `window` columns, each row one Jacobi iteration
older than the one below it. `a` itself stands in its first place, and a place i rows down and j
columns to the right is i + j tokens after `a`:

    row 0    a -- b -- c -- d        a row-0 place sees `a` and what is left of it in row 0;
    row 1    e    f    g    h        a place below sees that too, and its own column above itself
    row 2    i    j    k    l
             :    :    :    :
    new      m    n    o    p        the target's most likely token after each last place

Each column and its new token is an n-gram, (a e i m), (b f j n), ..., and goes into the pool. Then
the rows move up, and the new tokens are the last row. Window rows are never verified and never
kept. The verification branch has the pool's latest n-grams that begin with `a`, as a tree:

    a -+- e -- i -- m
       `- x -+- y -- z
             `- u -- v

Facts taken from the authors' implementation: `a` takes the place of row 0, column 0; columns stay
where they are however many tokens a step commits; new tokens are arg-maxes at any temperature. The
window starts otherwise: all rows hold the same guess of what follows, the sequence's own first
tokens in order (there: random tokens of the prompt in row 0, and a row more at each step). After
`ngram_size` - 2 steps nothing of the start is left. A sequence that has no room for the whole
window runs its left columns, and the others wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from folospec.core.token_tree import ROOT, TokenTree
from folospec.option_names import OptionNames
from folospec.spec.acceptance import ACCEPTANCE
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
from folospec.spec.stores.phrase_pool import PhrasePool, phrase_confidence, phrase_tree

_NAMES = OptionNames(
    owner="the lookahead drafter",
    same={
        "max_window_size": "window",
        "max_ngram_size": "ngram_size",
        "max_verification_set_size": "guesses",
    },
)


class Window:
    """The guesses of one sequence: `rows[i][j]`, row 0 the oldest.

    Args:
        token_ids: what it starts from, at least one token.
        num_rows, num_columns: at least 1.
    """

    def __init__(self, token_ids: Sequence[int], num_rows: int, num_columns: int) -> None:
        count = num_rows + num_columns - 1
        start = [token_ids[place % len(token_ids)] for place in range(count)]
        self.rows = [start[row : row + num_columns] for row in range(num_rows)]

    def begin(self, root: int) -> None:
        """Put the last committed token into its place."""
        self.rows[0][0] = root

    def num_columns(self, num_slots: int, max_depth: int) -> int:
        """How many of the columns, from the left, fit into the slots and the depth."""
        num_rows = len(self.rows)
        by_slots = (num_slots + 1) // num_rows  # the first place is the root and takes none
        by_depth = max_depth - num_rows + 2
        return max(0, min(len(self.rows[0]), by_slots, by_depth))

    def node(self, row: int, column: int) -> int:
        """The node of a place, column by column; that of the first place is `ROOT`."""
        return column * len(self.rows) + row - 1

    def tree(self, num_columns: int) -> TokenTree:
        """The places of the first columns under the root."""
        token_ids, parents = [], []
        for column in range(num_columns):
            for row in range(len(self.rows)):
                if self.node(row, column) != ROOT:
                    above = self.node(row - 1, column) if row else self.node(0, column - 1)
                    token_ids.append(self.rows[row][column])
                    parents.append(above)
        return TokenTree(token_ids, parents)

    def advance(self, new_token_ids: Sequence[int]) -> list[tuple[int, ...]]:
        """Move the columns that have a new token up by one row; return their n-grams."""
        ngrams = []
        for column, token_id in enumerate(new_token_ids):
            ngrams.append((*(row[column] for row in self.rows), token_id))
            for row, moved in enumerate(ngrams[-1][1:]):
                self.rows[row][column] = moved
        return ngrams


@dataclass(slots=True)
class _State:
    """Of one sequence."""

    window: Window
    num_seen: int = 0
    """Committed tokens whose n-grams are in the pool."""
    num_columns: int = 0
    """Columns of the window in the last proposal, behind its verified nodes."""
    kinds: list[tuple[int, int]] = field(default_factory=list)
    """Of the verified nodes of the last proposal: rank of the n-gram, depth."""


class LookaheadDrafter(Drafter):
    """Drafts trees of n-grams, which it has from the target's own guesses. The pool is one for all
    sequences.

    Options:
        window: columns of the window (W).
        ngram_size: tokens of an n-gram (N); the window has one row less.
        guesses: most n-grams per first token, and in a draft (G).
        prompt_ngrams: insert the n-grams of prompts and outputs too.
        max_first_tokens: most first tokens in the pool.

    Raises:
        ValueError: an option is out of range, or the acceptance rule verifies chains only.
    """

    def __init__(self, context: DrafterContext) -> None:
        super().__init__(context)
        context.refuse_model()
        if not ACCEPTANCE[context.acceptance].takes_trees:
            raise ValueError(
                f"the {context.config.method} drafter drafts trees, which "
                f"acceptance={context.acceptance!r} does not verify; use 'coupled' or 'rejection'"
            )
        options = context.read_options(
            {
                "window": 7,
                "ngram_size": 5,
                "guesses": 7,
                "prompt_ngrams": True,
                "max_first_tokens": 10_000,
            },
            _NAMES,
        )
        _check(options)
        self.window, self.ngram_size, self.guesses = (
            options[name] for name in ("window", "ngram_size", "guesses")
        )
        self.default_num_speculative_tokens = self.guesses * (self.ngram_size - 1)
        self.max_scratch_slots = self.window * (self.ngram_size - 1) - 1
        self._prompt_ngrams = options["prompt_ngrams"]
        self._pool = PhrasePool(self.guesses, options["max_first_tokens"])
        self._states: dict[str, _State] = {}
        self._acceptance = AcceptanceTable()

    @property
    def needs(self) -> DrafterNeeds:
        return DrafterNeeds(num_top_tokens=1)

    def propose(self, requests: list[DraftRequest]) -> list[Proposal | None]:
        return [self._propose(row) for row in requests]

    def _propose(self, row: DraftRequest) -> Proposal | None:
        state = self._states.get(row.seq_id)
        if state is None:
            window = Window(row.token_ids, self.ngram_size - 1, self.window)
            state = self._states[row.seq_id] = _State(window)
        if self._prompt_ngrams:
            self._pool.insert_ngrams(row.token_ids, state.num_seen, self.ngram_size)
            state.num_seen = len(row.token_ids)
        root = row.token_ids[-1]
        guesses, state.kinds = phrase_tree(
            self._pool.lookup(root), row.max_draft_tokens, row.max_depth
        )
        state.window.begin(root)
        num_candidates = len(guesses)
        state.num_columns = state.window.num_columns(row.num_slots - num_candidates, row.max_depth)
        scratch = state.window.tree(state.num_columns)
        if num_candidates + len(scratch) == 0:
            return None
        confidence = phrase_confidence(guesses, state.kinds, self._acceptance)
        below = [ROOT if parent == ROOT else num_candidates + parent for parent in scratch.parents]
        return Proposal(
            TokenTree([*guesses.token_ids, *scratch.token_ids], [*guesses.parents, *below]),
            confidence=confidence + [0.0] * len(scratch),
            candidate=[True] * num_candidates + [False] * len(scratch),
        )

    def observe(self, results: list[StepResult]) -> None:
        for result in results:
            state = self._states.get(result.seq_id)
            if state is None or result.proposal is None or not result.own_nodes:
                continue
            for node, accepted in tried_nodes(result):
                # Where drafts were merged, a window place may have become a verified node.
                if node < len(state.kinds):
                    self._acceptance.record(state.kinds[node], accepted)
            for ngram in state.window.advance(self._new_token_ids(state, result)):
                self._pool.insert(ngram)

    def _new_token_ids(self, state: _State, result: StepResult) -> list[int]:
        """The target's guess after the last place of each column that was run."""
        if result.top_token_ids is None:
            return []
        guesses = result.top_token_ids[:, 0].tolist()
        new_token_ids = []
        for column in range(state.num_columns):
            node = state.window.node(self.ngram_size - 2, column)
            if node != ROOT:
                own = len(state.kinds) + node
                if own not in result.own_nodes:  # left out, and so are the columns behind it
                    break
                node = result.own_nodes[own]
            new_token_ids.append(guesses[node + 1])
        return new_token_ids

    def drop(self, seq_id: str) -> None:
        self._states.pop(seq_id, None)

    def stats(self) -> dict[str, Any]:
        return {
            "num_sequences": len(self._states),
            "num_ngrams": len(self._pool),
            "num_first_tokens": self._pool.num_tokens,
        }


def _check(options: dict[str, Any]) -> None:
    for name, least in (("window", 1), ("ngram_size", 2), ("guesses", 1), ("max_first_tokens", 1)):
        check_count(name, options[name], least)
    if not isinstance(options["prompt_ngrams"], bool):
        raise ValueError(f"prompt_ngrams must be True or False, got {options['prompt_ngrams']!r}")
