"""Drafters without a model, made and asked by hand: contexts, rows and outcomes as the engine hands
them over."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from folospec import SamplingParams
from folospec.spec.drafters.base import (
    Drafter,
    DrafterContext,
    DraftRequest,
    StepResult,
    make_drafter,
)
from folospec.spec.proposal import Proposal
from folospec.spec.verify import Verdict
from folospec.speculative_config import DrafterConfig


def make(method: str, *, acceptance: str = "coupled", vocab_size: int = 61, **settings: Any) -> Any:
    """The drafter as an engine would make it; `settings` as in `speculative=`."""
    context = DrafterContext(
        config=DrafterConfig.of({"method": method, **settings}),
        name=method,
        stream=0,
        acceptance=acceptance,
        target=SimpleNamespace(vocab_size=vocab_size),
        encode=None,
        default_draft_model=None,
        load_draft_model=None,
        self_draft_model=None,
    )
    return make_drafter(context)


def row_of(token_ids: Sequence[int], seq_id: str = "a", **facts: Any) -> DraftRequest:
    nodes = facts.pop("max_draft_tokens", 5)
    given: dict[str, Any] = {
        "num_prompt_tokens": len(token_ids),
        "max_depth": 100,
        "num_slots": nodes,
        "params": SamplingParams(),
        "seed": 0,
        "sample_index": 0,
        "block_table": (),
    }
    return DraftRequest(seq_id, token_ids, max_draft_tokens=nodes, **{**given, **facts})


def ask(drafter: Drafter, token_ids: Sequence[int], seq_id: str = "a", **facts: Any) -> Any:
    return drafter.propose([row_of(token_ids, seq_id, **facts)])[0]


def chain_of(drafter: Drafter, token_ids: Sequence[int], **facts: Any) -> list[int]:
    """The tokens of the chain that the drafter proposes; empty if it has nothing to say."""
    proposal = ask(drafter, token_ids, **facts)
    if proposal is None:
        return []
    assert proposal.tree.is_chain
    assert len(proposal.confidence) == len(proposal)
    return list(proposal.tree.token_ids)


def tell(
    drafter: Drafter,
    proposal: Proposal | None,
    path: Sequence[int] = (),
    next_token_id: int = 0,
    top_token_ids: list[list[int]] | None = None,
    seq_id: str = "a",
    is_own: bool = True,
) -> list[int]:
    """Tell the drafter of a step and return the tokens that it committed."""
    verdict = Verdict(list(path), next_token_id)
    new = [next_token_id] if proposal is None else verdict.token_ids(proposal.tree)
    own = {} if proposal is None or not is_own else {node: node for node in range(len(proposal))}
    tops = None if top_token_ids is None else torch.tensor(top_token_ids)
    told = None if proposal is None else verdict
    drafter.observe([StepResult(seq_id, proposal, told, new, own, top_token_ids=tops)])
    return new


class CountingList(list):
    """A list that counts the items that are read from it."""

    num_read = 0

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        self.num_read += len(found) if isinstance(index, slice) else 1
        return found

    def __iter__(self) -> Any:
        self.num_read += len(self)
        return super().__iter__()


def num_read_per_step(drafter: Drafter, num_tokens: int) -> int:
    """Items of the context that a drafter reads in its second step, 4 tokens after the first."""
    token_ids = CountingList([i % 7 for i in range(num_tokens)])
    assert ask(drafter, token_ids) is not None or drafter.needs.num_top_tokens
    token_ids.extend((num_tokens + i) % 7 for i in range(4))
    token_ids.num_read = 0
    ask(drafter, token_ids)
    return token_ids.num_read
