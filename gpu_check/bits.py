"""The bit contract on the device: with `deterministic=True` a token's logits are the same bits,
however its row came to be computed.

    context  | t0 t1 t2 ...          ways: one token a pass, chunks of several sizes,
                                           the nodes of a chain, the nodes of a shuffled tree,
                                           each alone and among 31 other sequences

Every way gives the logits after t0, t1, ...; those of the first way are what the others' bits are
counted against. Without determinism the same counts are taken, and nothing is demanded.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from folospec import LLM
from folospec.models.forward import ForwardResult, Rows
from folospec.worker.cuda.graphs import StepGraphs
from gpu_check.checkpoints import DEMO, random_prompts
from gpu_check.drafters import chains
from gpu_check.jobs import Context, Row, guarded

VOCAB_SIZE = 4096
BLOCK_SIZE = 16
COMPANY = 31
NUM_TOKENS = 12
MOST_ROWS = 3 * NUM_TOKENS - 2
"""Of a tree around them."""
CONTEXTS, QUICK_CONTEXTS = (7, 130, 700), (7, 40)
CHUNKS = (3, 5, NUM_TOKENS)


class Bench:
    """A target with KV, whose sequences get the blocks of a shuffled pool."""

    def __init__(self, context: Context, dtype: str, deterministic: bool | None, **options: Any):
        longest = max(CONTEXTS) + 64
        self._blocks_each = -(-longest // BLOCK_SIZE)
        num_blocks = (1 + COMPANY) * self._blocks_each
        engine = LLM(
            DEMO,
            chains(MOST_ROWS),  # nothing is drafted; graphs are recorded for that many rows
            device=context.device,
            dtype=dtype,
            deterministic=deterministic,
            skip_tokenizer_init=True,
            max_num_seqs=1 + COMPANY,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            **options,
        ).engine
        self.promise = engine.stats()["lossless"]
        self.runner = engine.components.target
        self.num_replays = 0
        if self.runner.graphs is not None:
            self._count_replays(self.runner.graphs)
        blocks = random.Random(3).sample(range(num_blocks), num_blocks)
        self._tables = [
            blocks[i * self._blocks_each : (i + 1) * self._blocks_each] for i in range(1 + COMPANY)
        ]
        self._others = random_prompts(VOCAB_SIZE, COMPANY, [1, 2, 9, 3], seed=8)

    def _count_replays(self, graphs: StepGraphs) -> None:
        run = graphs.run

        def counted(*args: Any) -> ForwardResult | None:
            result = run(*args)
            self.num_replays += result is not None
            return result

        graphs.run = counted  # type: ignore[method-assign]

    def prefill(self, token_ids: list[int]) -> None:
        """The KV of a context."""
        self.runner.forward([Rows(token_ids, 0, self._tables[0])])

    def rows(
        self, token_ids: list[int], start: int, parents: list[int] | None = None, *, crowded: bool
    ) -> Tensor:
        """Logits of all rows, [rows, vocab_size], on the host; crowded, among other sequences."""
        own = Rows(token_ids, start, self._tables[0], len(token_ids), parents)
        before: list[Rows] = []
        after: list[Rows] = []
        if crowded:
            others = zip(self._others, self._tables[1:], strict=True)
            rows = [Rows(ids, 0, table, num_logits=len(ids)) for ids, table in others]
            before, after = rows[:11], rows[11:]
        logits = self.runner.forward([*before, own, *after]).logits
        first = sum(rows.num_logits for rows in before)
        return logits[first : first + len(token_ids)].cpu()


def check(context: Context, dtype: str) -> Iterator[Row]:
    """Differing bits of every way, with and without determinism, and a control."""
    sizes = QUICK_CONTEXTS if context.quick else CONTEXTS
    modes: list[dict[str, Any]] = [{}]
    if context.on_gpu:
        modes = [{"enforce_eager": False}, {"enforce_eager": True}]
    for deterministic in (True, None):
        for options in modes:
            mode = "eager" if options.get("enforce_eager", True) else "graphs"
            known = {"dtype": dtype, "deterministic": deterministic, "mode": mode}
            rows = _mode(context, dtype, deterministic, options, sizes)
            for row in guarded(rows):
                yield {**known, **row}


def _mode(
    context: Context,
    dtype: str,
    deterministic: bool | None,
    options: dict[str, Any],
    sizes: tuple[int, ...],
) -> Iterator[Row]:
    """All ways behind contexts of these sizes, in one engine."""
    bench = Bench(context, dtype, deterministic, **options)
    for size in sizes:
        if not context.budget.allows():
            return
        [prompt] = random_prompts(VOCAB_SIZE, 1, [size + NUM_TOKENS], seed=size)
        for row in _ways(bench, prompt[:size], prompt[size:]):
            ok = deterministic is None or (
                row["differing_bits"] == 0 and bench.promise == "bitwise"
            )
            ok &= row["num_replays"] > 0 or options.get("enforce_eager", not context.on_gpu)
            yield {"kind": "bits", "context": size, **row, "passed": ok}
    if deterministic:
        yield {"kind": "control", **_control(bench)}


def _ways(bench: Bench, context_ids: list[int], token_ids: list[int]) -> Iterator[Row]:
    bench.prefill(context_ids)
    start = len(context_ids)
    expected = one_by_one(bench, start, token_ids, crowded=False)
    ways: dict[str, Callable[..., Tensor]] = {"one by one": one_by_one, "chain": chain}
    ways |= {f"chunks of {size}": partial(chunks, size=size) for size in CHUNKS}
    ways |= {f"tree {seed}": partial(tree, seed=seed) for seed in range(3)}
    for name, way in ways.items():
        for crowded in (False, True):
            before = bench.num_replays
            found = way(bench, start, token_ids, crowded=crowded)
            counts = {"differing_bits": differing_bits(expected, found)}
            counts["num_replays"] = bench.num_replays - before
            yield {"way": name, "crowded": crowded, **counts}


def one_by_one(bench: Bench, start: int, token_ids: list[int], *, crowded: bool) -> Tensor:
    """As plain decoding would."""
    places = enumerate(token_ids, start=start)
    return torch.cat([bench.rows([token], place, crowded=crowded) for place, token in places])


def chunks(bench: Bench, start: int, token_ids: list[int], *, crowded: bool, size: int) -> Tensor:
    """As the chunks of a prompt."""
    parts = range(0, len(token_ids), size)
    return torch.cat(
        [bench.rows(token_ids[i : i + size], start + i, crowded=crowded) for i in parts]
    )


def chain(bench: Bench, start: int, token_ids: list[int], *, crowded: bool) -> Tensor:
    """As a chain that is verified: a tree without branches, told with its parents."""
    parents = [row - 1 for row in range(len(token_ids))]
    return bench.rows(token_ids, start, parents, crowded=crowded)


def tree(bench: Bench, start: int, token_ids: list[int], *, crowded: bool, seed: int) -> Tensor:
    """As one branch of a tree whose rows are shuffled as far as parents allow."""
    draw = random.Random(seed)
    tokens, parents, spine = [token_ids[0]], [-1], [0]
    for token in token_ids[1:]:
        for _ in range(draw.randint(0, 2)):
            tokens.append(draw.randrange(VOCAB_SIZE))
            parents.append(draw.choice([*spine, len(tokens) - 2]))
        tokens.append(token)
        parents.append(spine[-1])
        spine.append(len(tokens) - 1)
    return bench.rows(tokens, start, parents, crowded=crowded)[spine]


def _control(bench: Bench) -> Row:
    """The count must see a key that is off by the least that its type can say."""
    [token_ids] = random_prompts(VOCAB_SIZE, 1, [7 + NUM_TOKENS], seed=1)
    context_ids, rest = token_ids[:7], token_ids[7:]
    bench.prefill(context_ids)
    expected = chain(bench, 7, rest, crowded=False)
    assert bench.runner.kv is not None
    table = bench._tables[0]
    key = bench.runner.kv.layers[0].key[table[0] * BLOCK_SIZE + 3]
    with torch.inference_mode():
        key.mul_(1 + 2 * torch.finfo(key.dtype).eps)
    differing = differing_bits(expected, chain(bench, 7, rest, crowded=False))
    return {
        "control": "a key is off by its last bits",
        "differing_bits": differing,
        "passed": differing > 0,
    }


def differing_bits(expected: Tensor, found: Tensor) -> int:
    """How many bits differ between two tensors of one shape and type."""
    a, b = (t.contiguous().view(torch.uint8).numpy() for t in (expected, found))
    assert a.shape == b.shape, (a.shape, b.shape)
    return int(np.unpackbits(a ^ b).sum())
