"""Drafts phrase by phrase with a draft model, and lengthens drafts by phrases (arXiv 2402.13720).

This is Ouroboros (Zhao et al.).

What was said and what was nearly said is kept as phrases, keyed by their first token. They serve
twice. First, the draft model drafts faster: a pass feeds it the last token `a` and the longest
phrase that begins with it, and what it draws after each place is compared with the phrase:

    pass       fed      a   b   c   x          slots  root | a's | b | c | x | ...
               drawn    b   c   d   .          b and c agree, d is new: three draft tokens at once
    next       fed      d   e                  d overwrites x, which was not to be
               drawn    e   f

Each draft token is the one that the model draws there, with its own noise; a phrase only says which
places are worth asking about at once. The chain, and its distribution, are those of drafting a
token at a time.

Second, the draft goes on behind its last token with the phrases that begin there, as a tree:

    root -- b -- c -- d -- e -+- f -- g        one pass of the target verifies all of it
                              `- h -- i        the draft model never runs f, g, h, i

Where phrases come from (section 3.3, and what the sequence itself says):

- rejected drafts: each begins a phrase, which goes on with what the target finds likeliest after
  it, from node to node for as long as the draft has that token too, and one token more;
- rejected phrase tokens of a draft pass, in the same way, with what the draft model draws;
- the n-grams of prompts and outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from folospec.core.token_tree import TokenTree
from folospec.models.forward import Rows
from folospec.spec.acceptance import ACCEPTANCE
from folospec.spec.drafters.base import (
    DrafterContext,
    DrafterNeeds,
    DraftRequest,
    StepResult,
    check_count,
)
from folospec.spec.drafters.draft_model import find_draft_model
from folospec.spec.drafters.model_drafter import DRAFTING_OPTIONS, ModelDrafter
from folospec.spec.proposal import Proposal
from folospec.spec.stores.acceptance_table import AcceptanceTable, tried_nodes
from folospec.spec.stores.phrase_pool import (
    NOTHING,
    PhrasePool,
    phrase_confidence,
    phrase_tree,
    phrases_said,
)
from folospec.spec.trees.children import Children

_OPTIONS: dict[str, Any] = {
    "draft_length": 6,
    "phrase_length": 5,
    "phrases": None,
    "phrases_per_token": 20,
    "max_first_tokens": 10_000,
    "children": None,
}


@dataclass(slots=True)
class _Draft:
    """The chain of one sequence while it grows."""

    row: DraftRequest
    length: int
    """Draft tokens that are wanted."""
    token_ids: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    draft_probs: list[Tensor] = field(default_factory=list)
    """What each token was drawn from, [vocab_size], where it is not one-hot."""
    phrase: list[int] = field(default_factory=list)
    """What the next pass feeds behind the last token."""
    num_fed: int = 0
    """Draft tokens that have KV."""
    is_done: bool = False

    @property
    def last_token_id(self) -> int:
        return self.token_ids[-1] if self.token_ids else self.row.token_ids[-1]


@dataclass(slots=True)
class _Drafted:
    """The last proposal of a sequence: the first `length` nodes are the chain, the others have the
    rank and depth of `kinds`."""

    tree: TokenTree
    length: int
    kinds: list[tuple[int, int]]
    scores: list[float]
    """The chain's confidence where it comes from all that decides, noise included; or nothing."""


class OuroborosDrafter(ModelDrafter):
    """Drafts with a causal language model and a pool of phrases, one for all sequences.

    Options:
        draft_length: most tokens of the chain that the model drafts; what is left of the budget is
            for phrases.
        phrase_length: most tokens of a phrase.
        phrases: most phrases behind the chain. 3, or 1 where the rule verifies chains.
        phrases_per_token, max_first_tokens: bounds of the pool.
        children: how a draft token is drawn, as for every drafter with a model.

    Raises:
        ValueError: an option is out of range, or the acceptance rule verifies chains and `phrases`
            is above 1.
    """

    def __init__(self, context: DrafterContext) -> None:
        model = find_draft_model(context)
        self.name = context.name
        options = context.read_options(_OPTIONS)
        takes_trees = ACCEPTANCE[context.acceptance].takes_trees
        if options["phrases"] is None:
            options["phrases"] = 3 if takes_trees else 1
        _check(options)
        if options["phrases"] > 1 and not takes_trees:
            raise ValueError(
                f"acceptance={context.acceptance!r} verifies chains: phrases must be at most 1, "
                f"got {options['phrases']}"
            )
        runner = context.load_draft_model(model, self.kv_owner)
        drafting = {**DRAFTING_OPTIONS, "children": options["children"]}
        super().__init__(context, drafting, runner)
        self.draft_length, self.phrase_length = options["draft_length"], options["phrase_length"]
        self.num_phrases = options["phrases"]
        self.default_num_speculative_tokens = self.draft_length + self.num_phrases * (
            self.phrase_length - 1
        )
        self._pool = PhrasePool(options["phrases_per_token"], options["max_first_tokens"])
        self._num_seen: dict[str, int] = {}
        self._drafted: dict[str, _Drafted] = {}
        self._acceptance = AcceptanceTable()
        self._num_drafted = self._num_turns = 0

    @property
    def kv_owner(self) -> str:
        return self.name

    @property
    def needs(self) -> DrafterNeeds:
        return DrafterNeeds(num_top_tokens=1)

    @property
    def has_static_tree(self) -> bool:
        return False  # the phrases hang behind the last drawn token

    def propose(self, requests: list[DraftRequest]) -> list[Proposal | None]:
        for row in requests:
            self._pool.insert_ngrams(
                row.token_ids, self._num_seen.get(row.seq_id, 0), self.phrase_length
            )
            self._num_seen[row.seq_id] = len(row.token_ids)
        drafts = [
            _Draft(row, min(self.draft_length, row.max_draft_tokens, row.max_depth))
            for row in requests
        ]
        while active := [d for d in drafts if len(d.token_ids) < d.length and not d.is_done]:
            self._extend(active)
        return [self._proposal_of(draft) for draft in drafts]

    def _extend(self, drafts: list[_Draft]) -> None:
        """One pass of the draft model: every chain grows by what its phrase got right, and one."""
        batch = [self._next_rows(draft) for draft in drafts]
        places = [
            (draft.row, [*draft.token_ids, *draft.phrase[:count]])
            for draft in drafts
            for count in range(len(draft.phrase) + 1)
        ]
        logits = self.run(batch)
        for draft in drafts:  # not before: a pass that fails has computed nothing
            draft.row.num_draft_computed = len(draft.row.token_ids)
        drawn = self.draw(logits, places)
        begin = 0
        for draft in drafts:
            end = begin + len(draft.phrase) + 1
            self._keep_agreeing(draft, drawn[begin:end])
            begin = end

    def _next_rows(self, draft: _Draft) -> Rows:
        """The last token, and the phrase behind it as far as its draws are wanted; in the first
        pass, what the model has not seen comes before them."""
        row, last = draft.row, draft.last_token_id
        room = draft.length - len(draft.token_ids) - 1
        # A row more costs a small model little; of equally long phrases the latest comes first.
        draft.phrase = list(max(self._pool.lookup(last), key=len, default=())[:room])
        if draft.token_ids:
            rows = Rows(
                self._fit([last]), row.root_position + len(draft.token_ids), row.block_table
            )
        else:
            rows = self._catch_up_rows(row)
        rows.token_ids = [*rows.token_ids, *self._fit(draft.phrase)]
        rows.num_logits = 1 + len(draft.phrase)
        return rows

    def _keep_agreeing(self, draft: _Draft, drawn: list[Children]) -> None:
        """Add the drawn tokens up to the first that the phrase did not foresee, that one included.

        Args:
            drawn: what comes after the last token, and after each phrase token.
        """
        phrase, before = draft.phrase, len(draft.token_ids)
        said = [c.token_ids[0] if c.token_ids else NOTHING for c in drawn]
        agreed = 0
        while agreed < len(phrase) and phrase[agreed] == said[agreed]:
            agreed += 1
        draft.num_fed = before + agreed
        draft.is_done = not drawn[agreed].token_ids
        for children in drawn[: agreed + 1]:
            draft.token_ids += children.token_ids
            draft.confidence += children.confidence
            if children.draft_probs is not None:
                draft.draft_probs += children.draft_probs
        self._num_drafted += len(draft.token_ids) - before
        self._num_turns += 1
        self._learn(TokenTree.chain(phrase), said[1:], range(agreed, len(phrase)))

    def _learn(self, tree: TokenTree, said: list[int], rejected: Iterable[int]) -> None:
        for phrase in phrases_said(tree, said, rejected, self.phrase_length):
            self._pool.insert(phrase)

    def _proposal_of(self, draft: _Draft) -> Proposal | None:
        """The chain, and behind its end the phrases that begin there."""
        row, length = draft.row, len(draft.token_ids)
        if length == 0:
            return None
        phrases = [] if draft.is_done else self._pool.lookup(draft.last_token_id)
        tail, kinds = phrase_tree(
            phrases[: self.num_phrases], row.max_draft_tokens - length, row.max_depth - length
        )
        chain = TokenTree.chain(draft.token_ids)
        tree = TokenTree(
            [*chain.token_ids, *tail.token_ids],
            [*chain.parents, *(length + parent for parent in tail.parents)],
        )
        knows_scores = self.plan.uses_target_noise or row.params.greedy
        self._drafted[row.seq_id] = _Drafted(
            tree, length, kinds, draft.confidence if knows_scores else []
        )
        is_sampled = self.plan.is_sampled and not row.params.greedy and not self.shares_noise
        confidence = draft.confidence
        if is_sampled:  # what is said of a node may not look at its token
            confidence = [self.ranks.estimates()[0]] * length
        slots = [node + 1 if node < draft.num_fed else None for node in range(len(tree))]
        return Proposal(
            tree,
            draft_probs=_draft_probs(draft.draft_probs, tail) if is_sampled else None,
            confidence=confidence + phrase_confidence(tail, kinds, self._acceptance),
            draft_slots={self.kv_owner: slots},
        )

    def observe(self, results: list[StepResult]) -> None:
        for result in results:
            drafted = self._drafted.pop(result.seq_id, None)
            if drafted is None or not result.own_nodes:
                continue
            for node, accepted in tried_nodes(result):
                if node >= drafted.length:
                    self._acceptance.record(drafted.kinds[node - drafted.length], accepted)
                    continue
                self.ranks.record([(0, accepted)])
                if drafted.scores:
                    self.sharpness.record([(drafted.scores[node], accepted)])
            self._learn_from_target(drafted.tree, result)

    def _learn_from_target(self, tree: TokenTree, result: StepResult) -> None:
        if result.top_token_ids is None or result.verdict is None:
            return
        top_token_ids = result.top_token_ids[:, 0].tolist()
        said = [NOTHING] * len(tree)
        for own, node in result.own_nodes.items():
            said[own] = top_token_ids[node + 1]
        accepted = set(result.verdict.path)
        self._learn(tree, said, [o for o, n in result.own_nodes.items() if n not in accepted])

    def drop(self, seq_id: str) -> None:
        super().drop(seq_id)
        self._num_seen.pop(seq_id, None)
        self._drafted.pop(seq_id, None)

    def stats(self) -> dict[str, Any]:
        return {
            **super().stats(),
            "num_phrases": len(self._pool),
            "num_first_tokens": self._pool.num_tokens,
            "draft_tokens_per_pass": self._num_drafted / max(1, self._num_turns),
        }


def _draft_probs(drawn: list[Tensor], tail: TokenTree) -> Tensor:
    """[num_nodes, vocab_size]: the draft model's distributions, then a one-hot distribution for
    each phrase node."""
    draft_probs = torch.stack(drawn)
    tails = draft_probs.new_zeros(len(tail), draft_probs.shape[1])
    for node, token_id in enumerate(tail.token_ids):
        tails[node, token_id] = 1.0
    return torch.cat([draft_probs, tails])


def _check(options: Mapping[str, Any]) -> None:
    least_of = {
        "draft_length": 1,
        "phrase_length": 2,
        "phrases": 0,
        "phrases_per_token": 1,
        "max_first_tokens": 1,
    }
    for name, least in least_of.items():
        check_count(name, options[name], least)
