"""With `deterministic=True` a token's logits are the same bits, however its row came to be
computed."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from folospec.models.forward import Rows
from folospec.models.loader import load_model
from folospec.worker.model_runner import ModelRunner

TOKENS = [5, 6, 7, 8, 5, 6, 7, 9, 30, 31, 2, 44]
CONTEXT = 7
BLOCK_SIZE = 4
BLOCK_TABLE = [6, 1, 9, 3, 0, 8, 5, 2]


def make_runner(folder: str, *, batch_invariant_reference: bool) -> ModelRunner:
    model = load_model(folder, dtype=torch.float32, attention="torch")
    runner = ModelRunner(
        model, max_num_batched_tokens=64, batch_invariant_reference=batch_invariant_reference
    )
    runner.make_kv(16, BLOCK_SIZE, torch.device("cpu"))
    return runner


def plain_decode(runner: ModelRunner) -> torch.Tensor:
    """Logits after each token, one token a pass."""
    rows = [
        runner.forward([Rows([token], i, BLOCK_TABLE)]).logits for i, token in enumerate(TOKENS)
    ]
    return torch.cat(rows)


def prefill(runner: ModelRunner, chunk: int) -> torch.Tensor:
    """The same in chunks, beside a second sequence with other tokens."""
    parts = []
    for start in range(0, len(TOKENS), chunk):
        tokens = TOKENS[start : start + chunk]
        other = Rows([1, 2, 3][: 1 + start % 3], 0, [12, 13], num_logits=1)
        logits = runner.forward([other, Rows(tokens, start, BLOCK_TABLE, len(tokens))]).logits
        parts.append(logits[1:])
    return torch.cat(parts)


def tree_rows(runner: ModelRunner, seed: int) -> torch.Tensor:
    """The tokens after the context as one branch of a shuffled tree; logits in their order."""
    runner.forward([Rows(TOKENS[:CONTEXT], 0, BLOCK_TABLE)])
    draw = random.Random(seed)
    tokens, parents, spine = [TOKENS[CONTEXT]], [-1], [0]
    for token in TOKENS[CONTEXT + 1 :]:
        for _ in range(draw.randint(0, 2)):
            tokens.append(draw.randrange(50))
            parents.append(draw.choice([*spine, len(tokens) - 2]))
        tokens.append(token)
        parents.append(spine[-1])
        spine.append(len(tokens) - 1)
    logits = runner.forward([Rows(tokens, CONTEXT, BLOCK_TABLE, len(tokens), parents)]).logits
    return logits[spine]


def test_decode_chunk_chain_and_tree_give_the_same_bits(models: Any) -> None:
    expected = plain_decode(make_runner(models.target, batch_invariant_reference=True))
    for chunk in (1, 3, 5, len(TOKENS)):
        assert torch.equal(
            prefill(make_runner(models.target, batch_invariant_reference=True), chunk), expected
        )
    for seed in range(5):
        logits = tree_rows(make_runner(models.target, batch_invariant_reference=True), seed)
        assert torch.equal(logits, expected[CONTEXT:])


def test_keys_in_another_order_give_other_bits(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: the equality above is of bits, and keys gathered by slot instead would break it."""
    from folospec.worker import input_batch

    expected = plain_decode(make_runner(models.target, batch_invariant_reference=True))
    real = input_batch._path
    monkeypatch.setattr(
        input_batch, "_path", lambda p, r: [*reversed(real(p, r)[:-1]), real(p, r)[-1]]
    )
    logits = tree_rows(make_runner(models.target, batch_invariant_reference=True), 0)
    assert torch.allclose(logits, expected[CONTEXT:], atol=1e-4)
    assert not torch.equal(logits, expected[CONTEXT:])


def test_batched_rows_agree_up_to_rounding(models: Any) -> None:
    expected = plain_decode(make_runner(models.target, batch_invariant_reference=True))
    logits = tree_rows(make_runner(models.target, batch_invariant_reference=False), 1)
    assert torch.allclose(logits, expected[CONTEXT:], atol=1e-4)
