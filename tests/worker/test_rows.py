"""Growing a tree level by level gives the logits of one pass over the whole tree, and of each path
run as a chain."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from sharp_models import save_sharp
from transformers import LlamaConfig, LlamaForCausalLM

from folospec.attention.metadata import SuffixMask
from folospec.core.token_tree import TokenTree
from folospec.models.forward import Rows
from folospec.models.loader import load_model
from folospec.worker import input_batch
from folospec.worker.model_runner import ModelRunner

VOCAB_SIZE, BLOCK_SIZE = 37, 4
CONTEXTS = [[5, 6, 7, 8, 9, 10, 11], [3], [20, 21, 22, 23]]
#   root -- 0 -- 3 -- 5          levels: 0 1 2 | 3 4 | 5 6
#     |---- 1 -- 4 -- 6
#     `---- 2
SHAPE = [-1, -1, -1, 0, 1, 3, 4]
LEVELS = [range(0, 3), range(3, 5), range(5, 7)]
TREES = [
    TokenTree([1, 2, 3, 4, 5, 6, 7], SHAPE),
    TokenTree([1, 2, 3, 4, 4, 6, 6], SHAPE),  # equal tokens that only their parents tell apart
    TokenTree([9, 9, 8, 7, 7, 5, 5], SHAPE),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return save_sharp(LlamaForCausalLM(config), path)


@pytest.fixture
def make_runner(folder: str) -> Any:
    def make(
        batch_invariant_reference: bool = False, max_num_batched_tokens: int = 64
    ) -> ModelRunner:
        model = load_model(folder, dtype=torch.float64, attention="torch")
        runner = ModelRunner(
            model,
            max_num_batched_tokens=max_num_batched_tokens,
            batch_invariant_reference=batch_invariant_reference,
        )
        runner.make_kv(60, BLOCK_SIZE, torch.device("cpu"))
        for layer in runner.kv.layers:  # what nobody wrote shows
            layer.key.fill_(1e6)
            layer.value.fill_(1e6)
        return runner

    return make


def table(number: int) -> list[int]:
    return random.Random(number).sample(range(20 * number, 20 * number + 20), 5)


def run_contexts(runner: ModelRunner) -> None:
    """The tokens before the root, whose own row runs with the tree."""
    rows = [Rows(c[:-1], 0, table(i)) for i, c in enumerate(CONTEXTS) if len(c) > 1]
    runner.forward(rows)


def tree_rows(number: int, num_nodes: int, num_computed: int) -> Rows:
    context, tree = CONTEXTS[number], TREES[number]
    return Rows(
        [context[-1], *tree.token_ids[:num_nodes]],
        len(context) - 1,
        table(number),
        num_logits=1 + num_nodes - num_computed,
        parents=[-1, *(parent + 1 for parent in tree.parents[:num_nodes])],
        num_computed=num_computed,
    )


def one_pass(runner: ModelRunner) -> list[torch.Tensor]:
    """[1 + num_nodes, vocab_size] of each sequence."""
    run_contexts(runner)
    batch = [tree_rows(number, 7, 0) for number in range(3)]
    return list(runner.forward(batch).logits.split(8))


def level_by_level(
    runner: ModelRunner, rows_of: Callable[[int, int, int], Rows] = tree_rows
) -> list[torch.Tensor]:
    """The root first, then each level with what is above it only seen."""
    run_contexts(runner)
    parts = [runner.forward([rows_of(number, 0, 0) for number in range(3)]).logits.split(1)]
    for level in LEVELS:
        batch = [rows_of(number, level.stop, 1 + level.start) for number in range(3)]
        parts.append(runner.forward(batch).logits.split(len(level)))
    return [torch.cat([part[number] for part in parts]) for number in range(3)]


def chain_logits(make_runner: Any, number: int) -> torch.Tensor:
    """Of the last row of each path, run from the start without any cache."""
    context, tree = CONTEXTS[number], TREES[number]
    rows = []
    for node in range(-1, len(tree)):
        tokens = [*context, *tree.path_token_ids(node)]
        rows.append(make_runner().forward([Rows(tokens, 0, table(number))]).logits)
    return torch.cat(rows)


def distance(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "options", [{}, {"batch_invariant_reference": True}], ids=["packed", "row at a time"]
)
def test_a_tree_grown_by_levels_has_the_logits_of_one_pass_and_of_chains(
    make_runner: Any, options: dict[str, Any]
) -> None:
    grown = level_by_level(make_runner(**options))
    whole = one_pass(make_runner(**options))
    chains = [chain_logits(make_runner, number) for number in range(3)]
    assert grown[0].dtype == torch.float64
    assert distance(grown, whole) < 1e-9
    assert distance(grown, chains) < 1e-9
    # The rows are not alike, so that one in the place of another would show.
    assert min(float((a - b).abs().max()) for a, b in pairwise(chains[0])) > 1


def test_a_level_computes_its_own_rows_only(make_runner: Any, monkeypatch: Any) -> None:
    runner, sizes = make_runner(), []
    real = runner.model.forward
    monkeypatch.setattr(
        runner.model, "forward", lambda ids, *rest: sizes.append(len(ids)) or real(ids, *rest)
    )
    level_by_level(runner)
    assert sizes == [6 + 0 + 3, 3, *(3 * len(level) for level in LEVELS)]


def test_levels_that_do_not_fit_one_pass_are_run_in_several(make_runner: Any) -> None:
    """Only what is run counts: the third level has two rows to run and six to see."""
    runner = make_runner(max_num_batched_tokens=8)
    assert distance(level_by_level(runner), level_by_level(make_runner())) < 1e-9


@pytest.mark.parametrize(
    "parents",
    [
        [-1, 0, 0, 0, 1, 1, 4, 5],  # node 4 hangs under node 0
        [-1, 0, 1, 2, 3, 4, 5, 6],  # one chain
    ],
    ids=["a wrong uncle", "a chain"],
)
def test_rows_under_wrong_parents_are_noticed(make_runner: Any, parents: list[int]) -> None:
    def misled(number: int, num_nodes: int, num_computed: int) -> Rows:
        rows = tree_rows(number, num_nodes, num_computed)
        rows.parents = parents[: len(rows.token_ids)]
        return rows

    chains = [chain_logits(make_runner, number) for number in range(3)]
    assert distance(level_by_level(make_runner(), misled), chains) > 1e-3


def test_rows_that_see_all_that_was_computed_are_noticed(
    make_runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: the mask of a level lets its rows see every row before them."""
    real = input_batch.tree_rows

    def seeing_all(parents: tuple[int, ...], num_computed: int) -> input_batch.TreeRows:
        everything = np.tri(len(parents), dtype=np.bool_)[num_computed:]
        return replace(real(parents, num_computed), mask=SuffixMask(everything))

    monkeypatch.setattr(input_batch, "tree_rows", seeing_all)
    grown = level_by_level(make_runner())
    monkeypatch.undo()
    assert distance(grown, one_pass(make_runner())) > 1e-3


def test_computed_rows_that_never_were_are_noticed(make_runner: Any) -> None:
    """Control: the root is said to have KV, and nobody wrote it."""
    runner = make_runner()
    run_contexts(runner)
    first = [tree_rows(number, 3, 1) for number in range(3)]
    ours = list(runner.forward(first).logits.split(3))
    theirs = [logits[1:4] for logits in one_pass(make_runner())]
    assert distance(ours, theirs) > 1e-3
