"""What a drafter may not ask of its runner: each function does it for one request."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from folospec.kernels.sampling_records import pack_filters, pack_sampling
from folospec.models.forward import Rows
from folospec.spec.draft_runner import ChainSampling

Pass = Callable[[Any, Any], Any]
"""A function of the runner and a `DraftRequest`."""


def root_of(request: Any) -> int:
    return len(request.token_ids) - 1


def rows(token_ids: Any = (1,), start: Any = None, table: Any = None, **values: Any) -> Pass:
    """A pass of rows, at the root unless `start` says where from there."""

    def run(runner: Any, request: Any) -> Any:
        at = root_of(request) + start if type(start) is int else start
        own = request.block_table if table is None else table(request.block_table)
        begin = root_of(request) if at is None else at
        return runner.forward([Rows(token_ids, begin, own, **values)])

    return run


def tree(parents: Any, **values: Any) -> Pass:
    return rows([1, 1, 1], parents=parents, **values)


def chains(
    token_ids: Any = (1,), ahead: Any = 1, table: Any = None, keep: Any = None, times: int = 1
) -> Pass:
    """Chains that begin `ahead` slots behind the root."""

    def run(runner: Any, request: Any) -> Any:
        own = request.block_table if table is None else table(request.block_table)
        begun = runner.chains([root_of(request) + ahead], [own])
        if keep is not None:
            begun.keep(keep)
        return [begun.forward(token_ids) for _ in range(times)]

    return run


DISTRIBUTION = ChainSampling(pack_sampling(0, 0, pack_filters(1.0, 0, 1.0, 0.0)), 0, 1.0, 2)


def drawn(ahead: int = 1, table: Any = None, logits: Any = None, **params: Any) -> Pass:
    def run(runner: Any, request: Any) -> Any:
        own = request.block_table if table is None else table(request.block_table)
        own_logits = torch.zeros(1, runner.vocab_size) if logits is None else logits
        start = root_of(request) + ahead
        return runner.draw_chains(own_logits, [start], [own], [DISTRIBUTION._replace(**params)])

    return run


def at_slot(slot: Any) -> Pass:
    return lambda runner, r: runner.forward([Rows([1], slot, r.block_table)])


def of_a_request(make: Callable[[Any], Any]) -> Pass:
    return lambda runner, request: runner.forward(make(request))


BEFORE_THE_ROOT: dict[str, Pass] = {
    "a row at the first slot": lambda runner, r: runner.forward([Rows([1], 0, r.block_table)]),
    "rows of all slots before the root": lambda runner, r: runner.forward(
        [Rows([1] * root_of(r), 0, r.block_table)]
    ),
    "a row just before the root": rows(start=-1),
    "a tree that begins before the root": rows([1, 1], -1, parents=[-1, 0]),
    "a chain before the root": chains(ahead=-1),
    "drawn chains before the root": drawn(ahead=-1),
}
"""Wrong on a self-draft model alone: a draft model has KV of its own there."""

WRONG_PASSES: dict[str, Pass] = {
    "a token outside the vocabulary": lambda runner, r: rows([runner.vocab_size])(runner, r),
    "a negative token": rows([-1]),
    "a float token": rows([3.0]),
    "a NaN token": rows([math.nan]),
    "a numpy float token": rows([np.float32(3)]),
    "a token in words": rows(["3"]),
    "a bool token": rows([True]),
    "a huge token": rows([2**70]),
    "tokens in a tensor": rows(torch.tensor([3])),
    "tokens in a generator": lambda runner, r: rows(t for t in [1])(runner, r),
    "no token": rows([]),
    "too many tokens": rows([1] * 500),
    "a slot behind the last": lambda runner, r: rows(start=r.num_slots + 1)(runner, r),
    "a slot far behind": at_slot(10**9),
    "a huge slot": at_slot(2**70),
    "a negative slot": at_slot(-1),
    "a float slot": at_slot(1.5),
    "a NaN slot": at_slot(math.nan),
    "no slot": at_slot("root"),
    "blocks out of range": rows(table=lambda table: tuple(10**6 for _ in table)),
    "negative blocks": rows(table=lambda table: tuple(-1 for _ in table)),
    "float blocks": rows(table=lambda table: tuple(map(float, table))),
    "blocks of others": rows(table=lambda table: tuple((block + 1) % 16 for block in table)),
    "blocks in another order": rows(table=lambda table: (*table[1:], table[0])),
    "fewer blocks": rows(table=lambda table: table[:-1]),
    "no blocks": rows(table=lambda table: ()),
    "blocks that are none": rows(table=lambda table: 5),
    "a parent behind its child": tree([-1, 2, 0]),
    "a row that is its own parent": tree([-1, 1, 0]),
    "a parent above the root": tree([-2, 0, 0]),
    "a float parent": tree([-1, 0.0, 0]),
    "fewer parents": tree([-1, 0]),
    "more computed rows than there are": tree([-1, 0, 0], num_computed=3),
    "computed rows below 0": tree([-1, 0, 0], num_computed=-1),
    "computed rows of a chain": rows([1, 1], num_computed=1),
    "more logits than rows": rows([1, 1], num_logits=3),
    "logits below 0": rows(num_logits=-1),
    "a float number of logits": rows(num_logits=1.0),
    "an empty pass": of_a_request(lambda r: []),
    "a pass that is none": of_a_request(lambda r: None),
    "rows that are none": of_a_request(lambda r: [([1], root_of(r), r.block_table)]),
    "a sequence twice": of_a_request(lambda r: [Rows([1], root_of(r), r.block_table)] * 2),
    "a layer that is none": lambda runner, r: runner.forward(
        [Rows([1], root_of(r), r.block_table)], (99,)
    ),
    "a float layer": lambda runner, r: runner.forward(
        [Rows([1], root_of(r), r.block_table)], (0.5,)
    ),
    "a chain of floats": chains([1.5]),
    "a chain outside the vocabulary": chains([10**6]),
    "a chain of two tokens": chains([1, 1]),
    "a chain with other blocks": chains(table=lambda table: tuple(block + 1 for block in table)),
    "a chain that goes on and on": chains(times=500),
    "a chain that is not there": chains(keep=[1]),
    "a chain twice": chains(keep=[0, 0]),
    "no chain": chains(keep=[]),
    "a float chain": chains(keep=[0.0]),
    "chains without a start": lambda runner, r: runner.chains([], [r.block_table]),
    "drawn chains with other blocks": drawn(table=lambda table: table[:-1]),
    "drawn chains that are too long": drawn(length=500),
    "drawn chains without a token": drawn(length=0),
    "drawn chains of a float length": drawn(length=2.0),
    "drawn chains of a huge position": drawn(position=2**70),
    "drawn chains of a NaN scale": drawn(scale=math.nan),
    "drawn chains without a distribution": drawn(packed=b""),
    "drawn chains of a NaN distribution": drawn(packed=b"\xff" * 48),
    "drawn chains of no logits": drawn(logits=[[0.0]]),
    "drawn chains of other logits": drawn(logits=torch.zeros(2, 5)),
    "a warm-up in words": lambda runner, r: runner.warm_up_chains("1", 1, 1),
    "a warm-up of no chains": lambda runner, r: runner.warm_up_chains(0, 1, 1),
}
"""Wrong on every model."""

FAIR_PASSES: dict[str, Pass] = {
    "the root": rows(),
    "the root and a draft": rows([1, 2], num_logits=2),
    "a whole range": lambda runner, r: rows([1] * (1 + r.num_slots))(runner, r),
    "numpy tokens": rows([np.int64(1)]),
    "tokens of the request": lambda runner, r: runner.forward(
        [Rows(r.token_ids[-1:], np.int64(root_of(r)), r.block_table)]
    ),
    "a tree": tree([-1, 0, 0], num_computed=1, num_logits=2),
    "a chain": lambda runner, r: chains(times=r.num_slots)(runner, r),
    "a kept chain": chains(keep=(0,)),
    "drawn chains": drawn(),
}
