"""Drafts how the last tokens went on before, here or in another request (arXiv 2411.04975).

This is SuffixDecoding.

Two suffix trees count what has followed what: one of the request itself, prompt and output, and one
of finished requests. Every match of the last p tokens in either tree is a candidate (section 3.2):

    ... x y z | root = z    p = 1   z      -> a (5 of 8), b (3 of 8)      at most f * p + o tokens
                            p = 2   y z    -> a (2 of 2)                  follow a match of p
                            p = 3   x y z  -> a (1 of 1)

Below a match the tree of drafts grows greedily by the estimated probability of its nodes, the
product of the count ratios along the path, as long as it is at least `min_token_prob`. The score of
a draft is the sum of these probabilities, the tokens expected to be accepted; the best one counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from folospec.core.token_tree import TokenTree
from folospec.kernels.native_suffix import SuffixAsk, SuffixDraft, SuffixRules
from folospec.option_names import OptionNames
from folospec.spec.drafters.base import (
    Drafter,
    DrafterContext,
    DraftRequest,
    StepResult,
    check_count,
)
from folospec.spec.proposal import Proposal
from folospec.spec.stores.acceptance_table import AcceptanceTable, share_among_siblings, tried_nodes
from folospec.spec.stores.suffix_index import make_index
from folospec.spec.stores.suffix_store import check_token_ids, load_texts, save_texts
from folospec.spec.trees.best_first import read_tree_option

_OPTIONS: dict[str, Any] = {
    "max_tree_depth": 64,
    "max_cached_tokens": 100_000,
    "max_spec_factor": 2.0,
    "max_spec_offset": 2.0,
    "min_token_prob": 0.1,
    "min_score": 0.0,
    "tree": None,
    "preload": (),
    "load": None,
}
_NAMES = OptionNames(
    owner="the suffix drafter",
    same={
        f"suffix_decoding_{name}": name
        for name in ("max_tree_depth", "max_spec_factor", "min_token_prob")
    },
    instead={
        "suffix_decoding_max_cached_requests": "give max_cached_tokens, which counts their tokens"
    },
)


class SuffixDrafter(Drafter):
    """Drafts trees, or chains, from suffix trees.

    Options: `max_tree_depth`, tokens of a match and its draft together; `max_cached_tokens` of
    finished requests, 0 for none; `max_spec_factor` and `max_spec_offset`, draft tokens allowed per
    matched token and besides; `min_token_prob`, the joint probability below which nothing is
    drafted; `min_score`, the score below which the row is left to the next drafter of a list, as
    the paper's hybrid leaves it to a model; `tree`, by default wherever the acceptance rule takes
    trees; `preload`, texts or lists of token ids to begin with, and `load`, a file of them that
    `save` wrote::

        llm.drafter("suffix").save("corpus.npz")
        LLM(model, speculative={"method": "suffix", "load": "corpus.npz"})
    """

    default_num_speculative_tokens = 24

    def __init__(self, context: DrafterContext) -> None:
        super().__init__(context)
        context.refuse_model()
        options = context.read_options(_OPTIONS, _NAMES)
        _check(options)
        self.max_depth = options["max_tree_depth"]
        self.max_cached_tokens = options["max_cached_tokens"]
        self.vocab_size = context.vocab_size
        self.index = make_index(
            SuffixRules(
                max_depth=self.max_depth,
                max_tokens=self.max_cached_tokens,
                spec_factor=options["max_spec_factor"],
                spec_offset=options["max_spec_offset"],
                min_joint=options["min_token_prob"],
                min_score=options["min_score"],
                is_chain=not read_tree_option(options["tree"], context.acceptance),
            )
        )
        self._acceptance = AcceptanceTable()
        self._drafts: dict[str, SuffixDraft] = {}
        """By sequence, what was proposed last."""
        texts = _read_preload(options["preload"], context)
        if options["load"] is not None:
            texts += load_texts(options["load"], self.vocab_size)
        self._fill(texts)

    def _fill(self, texts: list[list[int]]) -> None:
        num_tokens = sum(len(text) for text in texts)
        if num_tokens > self.max_cached_tokens:
            raise ValueError(
                f"max_cached_tokens must be at least the {num_tokens} tokens of preload and load, "
                f"got {self.max_cached_tokens}"
            )
        for text in texts:
            self.index.add(text)

    def propose(self, requests: list[DraftRequest]) -> list[Proposal | None]:
        asks = [SuffixAsk(r.seq_id, r.token_ids, r.max_draft_tokens, r.max_depth) for r in requests]
        drafts = self.index.draft(asks)
        return [
            None if draft is None else self._proposal(row.seq_id, draft)
            for row, draft in zip(requests, drafts, strict=True)
        ]

    def _proposal(self, seq_id: str, draft: SuffixDraft) -> Proposal:
        self._drafts[seq_id] = draft
        likely = {  # many nodes, few ratios
            ratio: self._acceptance.estimate(_evidence(draft, ratio), prior=ratio)
            for ratio in set(draft.ratios)
        }
        chances = [likely[ratio] for ratio in draft.ratios]
        return Proposal(
            TokenTree(draft.token_ids, draft.parents),
            confidence=share_among_siblings(draft.parents, chances),
        )

    def observe(self, results: list[StepResult]) -> None:
        for result in results:
            draft = self._drafts.get(result.seq_id)
            if draft is not None:
                for node, accepted in tried_nodes(result):
                    self._acceptance.record(_evidence(draft, draft.ratios[node]), accepted)

    def finish(self, seq_id: str, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Keep the output, behind as much of the prompt as a match can reach back, so that the same
        prompt finds it from the first token on."""
        if len(token_ids) > num_prompt_tokens:
            self.index.add(token_ids[max(0, num_prompt_tokens - self.max_depth) :])

    def drop(self, seq_id: str) -> None:
        self.index.drop(seq_id)
        self._drafts.pop(seq_id, None)

    def save(self, path: str | Path) -> None:
        """Write the texts of finished requests to a file that the option `load` takes."""
        save_texts(path, self.index.texts, self.vocab_size)

    def stats(self) -> dict[str, Any]:
        return self.index.stats()._asdict()


def _evidence(draft: SuffixDraft, ratio: float) -> tuple[str, int, int]:
    """The kind of evidence that there is for a node with this ratio of counts."""
    return draft.source, draft.length.bit_length(), round(8 * ratio)


def _check(options: dict[str, Any]) -> None:
    for name, least in (("max_tree_depth", 2), ("max_cached_tokens", 0)):
        check_count(name, options[name], least)
    unbounded = ("max_spec_factor", "max_spec_offset", "min_score")
    for name, most in (*((name, None) for name in unbounded), ("min_token_prob", 1)):
        value = options[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name} must be a number, got {value!r}")
        if not (0 <= value < math.inf if most is None else 0 <= value <= most):
            wanted = "finite and at least 0" if most is None else f"in [0, {most}]"
            raise ValueError(f"{name} must be {wanted}, got {value!r}")
    longest = options["max_tree_depth"] - 1
    if options["max_spec_factor"] * longest + options["max_spec_offset"] < 1:
        raise ValueError(
            "max_spec_factor and max_spec_offset must allow a token after a match of "
            f"{longest}, got {options['max_spec_factor']} and {options['max_spec_offset']}"
        )


def _read_preload(preload: object, context: DrafterContext) -> list[list[int]]:
    """The token ids of each text of the option `preload`."""
    if isinstance(preload, str) or not isinstance(preload, Sequence):
        raise ValueError(f"preload must be a list of texts or token id lists, got {preload!r}")
    texts = []
    for text in preload:
        if isinstance(text, str):
            if context.encode is None:
                raise ValueError("texts in preload need a tokenizer; give token ids instead")
            text = context.encode(text)
        if not isinstance(text, Sequence):
            raise ValueError(f"preload must hold texts or token id lists, got {text!r}")
        check_token_ids(text, context.vocab_size, "preload")
        texts.append(list(text))
    return texts
