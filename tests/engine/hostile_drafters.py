"""Drafters that hand over what they must not, and change what they are given.

`HostileDrafter` knows what the target will say, so most of its drafts are accepted; now and then it
commits the fault that it is told to, or one of its own choice.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from harness import VOCAB_SIZE
from hostile_passes import BEFORE_THE_ROOT, FAIR_PASSES, WRONG_PASSES

from folospec import Drafter, Proposal, register_drafter
from folospec.core.token_tree import TokenTree
from folospec.models.forward import Rows
from folospec.spec.drafters.base import DrafterNeeds


class LyingTree(TokenTree):
    """Says that it is longer than it is."""

    def __len__(self) -> int:
        return 1000


class LyingList(list):
    """Says that it has an answer to everything."""

    def __len__(self) -> int:
        return 3


def forged(proposal: Proposal, **values: Any) -> Proposal:
    """The proposal with values that its constructor would not take."""
    tree = TokenTree(proposal.tree.token_ids, proposal.tree.parents)
    proposal = Proposal(tree, confidence=proposal.confidence)
    for name, value in values.items():
        owner: Any = tree if name in ("token_ids", "parents") else proposal
        object.__setattr__(owner, name, value)
    return proposal


def with_token(token_id: Any) -> Callable[[Any, Proposal], Any]:
    return lambda _, p: forged(p, token_ids=(token_id, *p.tree.token_ids[1:]))


def per_node(name: str, value: Any) -> Callable[[Any, Proposal], Any]:
    return lambda _, p: forged(p, **{name: (value,) * len(p)})


def setting(**values: Any) -> Callable[[Any, Proposal], Any]:
    """Change the request, and answer honestly."""

    def fault(request: Any, proposal: Proposal) -> Proposal:
        for name, value in values.items():
            setattr(request, name, value)
        return proposal

    return fault


def doing(act: Callable[[Any], Any]) -> Callable[[Any, Proposal], Any]:
    """Do something to the request, and answer honestly."""

    def fault(request: Any, proposal: Proposal) -> Proposal:
        act(request)
        return proposal

    return fault


def with_wrong_depths(_: Any, proposal: Proposal) -> Proposal:
    proposal.tree.__dict__.update(depths=(1,) * 99, is_chain=True, _children=((0, 0),) * 99)
    return proposal


WRONG_ANSWERS: dict[str, Callable[[Any, Proposal], Any]] = {
    "a float token": with_token(3.0),
    "a numpy float token": with_token(np.float32(3)),
    "a NaN token": with_token(math.nan),
    "an infinite token": with_token(np.float64(math.inf)),
    "a bool token": with_token(True),
    "a string token": with_token("3"),
    "no token": with_token(None),
    "a tensor token": with_token(torch.tensor(3)),
    "a negative token": with_token(-1),
    "a token outside the vocabulary": with_token(VOCAB_SIZE),
    "a huge token": with_token(2**70),
    "a numpy token outside the vocabulary": with_token(np.uint64(2**63 + 5)),
    "tokens in a generator": lambda _, p: forged(p, token_ids=(t for t in p.tree.token_ids)),
    "tokens in an array": lambda _, p: forged(p, token_ids=np.array(p.tree.token_ids)),
    "fewer tokens": lambda _, p: forged(p, token_ids=p.tree.token_ids[1:]),
    "a parent behind its child": per_node("parents", 5),
    "a parent above the root": per_node("parents", -2),
    "a float parent": per_node("parents", -1.0),
    "a tree that is none": lambda _, p: forged(p, tree=[1, 2]),
    "too many nodes": lambda *_: Proposal(TokenTree.chain([1] * 500)),
    "confidence 7": per_node("confidence", 7),
    "confidence NaN": per_node("confidence", math.nan),
    "confidence in words": per_node("confidence", "0.5"),
    "confidence True": per_node("confidence", True),
    "confidence for fewer": lambda _, p: forged(p, confidence=(0.5,) * (len(p) - 1)),
    "candidates in numbers": per_node("candidate", 1),
    "candidates for more": lambda _, p: forged(p, candidate=(True,) * (len(p) + 1)),
    "slots of the target": lambda _, p: forged(p, draft_slots={"target": (1,) * len(p)}),
    "slots of nobody": lambda _, p: forged(p, draft_slots={"nobody": (1,) * len(p)}),
    "slots that are none": lambda _, p: forged(p, draft_slots=[1]),
    "a tree alone": lambda _, p: p.tree,
    "a number": lambda *_: 5,
    "progress in a float": setting(num_draft_computed=0.5),
    "negative progress": setting(num_draft_computed=-1),
    "progress past the end": setting(num_draft_computed=10**9),
    "no progress": lambda r, p: delattr(r, "num_draft_computed") or p,
    "a token appended": doing(lambda r: r.token_ids.append(1)),
    "a token replaced": doing(lambda r: r.token_ids.__setitem__(0, 1)),
    "an output token appended": doing(lambda r: r.output_token_ids.append(1)),
    "a prompt token removed": doing(lambda r: r.prompt_token_ids.pop()),
    "a block replaced": doing(lambda r: r.block_table.__setitem__(0, 0)),
    "a block appended": doing(lambda r: r.block_table.append(0)),
    "another temperature": doing(lambda r: setattr(r.params, "temperature", 2.0)),
    "another stop token": doing(lambda r: r.params.stop_token_ids.append(5)),
    "an error": doing(lambda r: 1 / 0),
}
"""Each of them is the drafter's failure."""

HARMLESS: dict[str, Callable[[Any, Proposal], Any]] = {
    "numpy tokens": with_token(np.int32(3)),
    "a lie about the tree's length": lambda _, p: forged(p, tree=_lying(p)),
    "wrong depths": with_wrong_depths,
    "another name": setting(seq_id="request-0-0"),
    "larger limits": setting(max_draft_tokens=10**6, num_slots=10**6, max_depth=10**6),
    "a bias of its own": doing(lambda r: r.params.logit_bias.update({4: 50.0})),
    "a slice that is changed": doing(lambda r: r.token_ids[:].clear()),
    "nothing": lambda *_: None,
    "an empty tree": lambda *_: Proposal(TokenTree.chain([])),
}
"""Nothing comes of them."""


def _lying(proposal: Proposal) -> LyingTree:
    return LyingTree(proposal.tree.token_ids, proposal.tree.parents)


WRONG_LISTS: dict[str, Callable[[list[Any]], Any]] = {
    "no list": lambda _: None,
    "a generator": lambda answers: (answer for answer in answers),
    "an answer too few": lambda answers: answers[1:],
    "an answer too many": lambda answers: [*answers, None],
    "a mapping": lambda answers: dict(enumerate(answers)),
    "a list that lies": LyingList,
}


def spoil(results: list[Any]) -> None:
    """Change whatever there is of a step's results."""
    for result in results:
        for rows in result.aux_hidden_states.values():
            rows.fill_(math.nan)
        if result.top_token_ids is not None:
            result.top_token_ids.fill_(-5)
        if result.verdict is not None:
            result.verdict.path.append(99)
        if result.proposal is not None:
            with_wrong_depths(None, result.proposal)
            result.proposal.draft_slots.clear()
            if result.proposal.draft_probs is not None:
                result.proposal.draft_probs.fill_(math.nan)
        result.own_nodes.update({7: 99})
    results.clear()


class HostileDrafter(Drafter):
    """Proposes random trees around the truth, which is by prompt in `futures`; `fault` is the name
    of what it does at every second request, or None for any of its `deeds`."""

    futures: dict[tuple[int, ...], list[int]] = {}
    fault: str | None = None
    deeds = (*WRONG_ANSWERS, *HARMLESS, *WRONG_LISTS, *["honest"] * len(WRONG_ANSWERS))
    random = random.Random(0)
    num_asked = 0

    @property
    def needs(self) -> DrafterNeeds:
        return DrafterNeeds(aux_hidden_state_layers=(0, 1), num_top_tokens=2)

    def propose(self, requests: list[Any]) -> Any:
        answers = [self._answer(request) for request in requests]
        wrong = WRONG_LISTS.get(self._choose())
        if wrong is None:
            return answers
        requests.clear()
        return wrong(answers)

    def _choose(self) -> str:
        if self.fault is not None:
            return self.fault
        return self.random.choice(self.deeds)

    def _answer(self, request: Any) -> Any:
        self.num_asked += 1
        proposal, chosen = self._honest(request), self._choose()
        if self.fault is not None and self.num_asked % 2:
            return proposal
        self._misuse(chosen, request)
        fault = WRONG_ANSWERS.get(chosen) or HARMLESS.get(chosen)
        return proposal if fault is None else fault(request, proposal)

    def _misuse(self, chosen: str, request: Any) -> None:
        """What it does to a runner."""

    def _honest(self, request: Any) -> Proposal:
        future = self.futures[tuple(request.prompt_token_ids)][len(request.output_token_ids) :]
        token_ids: list[int] = []
        parents: list[int] = []
        parent = -1
        for token_id in future[: max(1, request.max_draft_tokens // 2)]:
            if self.random.random() < 0.2:
                token_id = (token_id + 1) % VOCAB_SIZE
            if self.random.random() < 0.5 and len(token_ids) < request.max_draft_tokens - 2:
                token_ids.append((token_id + 7) % VOCAB_SIZE)
                parents.append(parent)
            token_ids.append(token_id)
            parents.append(parent)
            parent = len(token_ids) - 1
        if not token_ids:
            return Proposal(TokenTree.chain([1]))
        return Proposal(TokenTree(token_ids, parents), confidence=[0.3] * len(token_ids))

    def observe(self, results: list[Any]) -> None:
        spoil(results)
        if self.fault == "observe" or (self.fault is None and self.random.random() < 0.2):
            raise RuntimeError("cannot learn")

    def finish(self, seq_id: str, token_ids: Any, num_prompt_tokens: int) -> None:
        if self.fault in ("finish", None):
            token_ids.append(3)

    def drop(self, seq_id: str) -> None:
        if self.fault in ("drop", None):
            raise RuntimeError("cannot forget")

    def stats(self) -> Any:
        if self.fault == "stats":
            raise RuntimeError("cannot count")
        return 5 if self.fault == "stats in a number" else {"num_asked": self.num_asked}


PASSES_IN_HOOKS = ("a pass in observe", "a pass in finish", "a pass in drop", "a pass in stats")
KEPT_THINGS = ("blocks of an earlier step", "a self-draft model too late", "a draft model too late")


class HostileModelDrafter(HostileDrafter):
    """Runs fair passes of its model, and now and then a wrong one; with `model` a draft model's,
    without one those of a cheaper copy of the target."""

    deeds = (*HostileDrafter.deeds, *WRONG_PASSES, *BEFORE_THE_ROOT, *PASSES_IN_HOOKS, *KEPT_THINGS)
    kv_owner: Any = None

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self.context = context
        self._tables: list[Any] = []
        if context.config.model is None:
            self.runner = context.self_draft_model(quantized=True)
        else:
            self.kv_owner = context.name
            self.runner = context.load_draft_model(context.config.model, self.kv_owner)

    def _answer(self, request: Any) -> Any:
        FAIR_PASSES[self.random.choice(list(FAIR_PASSES))](self.runner, request)
        answer = super()._answer(request)
        self._tables = [*self._tables[-9:], request.block_table]
        return answer

    def _misuse(self, chosen: str, request: Any) -> None:
        wrong = WRONG_PASSES.get(chosen) or BEFORE_THE_ROOT.get(chosen)
        if wrong is not None:
            wrong(self.runner, request)
        elif chosen == "blocks of an earlier step" and self._tables:
            self._run_kept()
        elif chosen == "a self-draft model too late":
            self.context.self_draft_model()
        elif chosen == "a draft model too late":
            self.context.load_draft_model(self.context.config.model or "none", "late")

    def _run_kept(self) -> None:
        for table in self._tables:
            self.runner.forward([Rows([1], 0, table)])

    def _hook(self, name: str) -> None:
        if self.fault == name or (self.fault is None and self._choose() == name):
            self._run_kept()

    def observe(self, results: list[Any]) -> None:
        self._hook("a pass in observe")
        super().observe(results)

    def finish(self, seq_id: str, token_ids: Any, num_prompt_tokens: int) -> None:
        self._hook("a pass in finish")
        super().finish(seq_id, token_ids, num_prompt_tokens)

    def drop(self, seq_id: str) -> None:
        self._hook("a pass in drop")
        super().drop(seq_id)

    def stats(self) -> Any:
        self._hook("a pass in stats")
        return super().stats()


register_drafter("hostile", HostileDrafter)
register_drafter("hostile_model", HostileModelDrafter)
