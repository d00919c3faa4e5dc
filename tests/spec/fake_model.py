"""A drafter whose model is a function of the tokens that a row sees.

The runner keeps what a KV slot would hold, a token and its position, rebuilds for every row the
tokens that it sees, and makes the logits from them. A row that sees too much, too little, or a
stale slot has other logits, and what is drafted is not what `likeliest` says.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

import torch

from folospec import SamplingParams
from folospec.core.token_tree import ROOT
from folospec.models.forward import ForwardResult
from folospec.sampling import noise
from folospec.sampling.noise import Purpose
from folospec.spec.draft_runner import RowChains
from folospec.spec.drafters.base import DrafterContext, DraftRequest
from folospec.spec.drafters.model_drafter import DRAFTING_OPTIONS, ModelDrafter
from folospec.speculative_config import DrafterConfig

VOCAB_SIZE, BLOCK_SIZE = 9, 4


@lru_cache(maxsize=100_000)
def logits_after(token_ids):
    """The fake model: any function of the tokens that a row sees."""
    rng = random.Random(str(token_ids))
    return [rng.gauss(0.0, 1.5) for _ in range(VOCAB_SIZE)]


class FakeRunner:
    """A `DraftRunner` whose KV slots hold (token, position)."""

    vocab_size = VOCAB_SIZE

    def __init__(self):
        self.kv = {}
        self.written = set()
        self.num_rows = 0
        self.num_passes = 0

    def forward(self, batch, aux_layers=()):
        self.num_passes += 1
        logits = []
        for rows in batch:
            parents = rows.parents
            if parents is None:
                assert rows.num_computed == 0
                parents = range(-1, len(rows.token_ids) - 1)
            assert len(parents) == len(rows.token_ids)
            sees = []
            for row, parent in enumerate(parents):
                assert -1 <= parent < row
                sees.append([*(sees[parent] if parent >= 0 else []), row])
            self._write(rows, [len(path) - 1 for path in sees])
            for path in sees[len(rows.token_ids) - rows.num_logits :]:
                logits.append(logits_after(self._seen(rows, path)))
        return ForwardResult(torch.tensor(logits, dtype=torch.float64))

    def chains(self, starts, block_tables):
        return RowChains(self, starts, block_tables)

    def draw_chains(self, logits, starts, block_tables, distributions):
        return None

    def warm_up_chains(self, max_num_seqs, length, vocab_size):
        pass

    def _write(self, rows, depths):
        for row, (token_id, depth) in enumerate(zip(rows.token_ids, depths, strict=True)):
            slot = slot_of(rows.block_table, rows.start + row)
            entry = (token_id, rows.start + depth)
            if row < rows.num_computed:
                assert self.kv[slot] == entry, "a row that was said to be computed is another"
            else:
                self.kv[slot] = entry
                self.written.add(slot)
                self.num_rows += 1

    def _seen(self, rows, path):
        indices = [*range(rows.start), *(rows.start + row for row in path)]
        entries = [self.kv[slot_of(rows.block_table, index)] for index in indices]
        assert [position for _, position in entries] == list(range(len(entries)))
        return tuple(token_id for token_id, _ in entries)


def slot_of(block_table, index):
    return block_table[index // BLOCK_SIZE] * BLOCK_SIZE + index % BLOCK_SIZE


class FakeDrafter(ModelDrafter):
    kv_owner = "fake"


@dataclass
class Spec:
    vocab_size: int = VOCAB_SIZE


def make_drafter(acceptance="coupled", stream=0, num_speculative_tokens=None, **options):
    context = DrafterContext(
        config=DrafterConfig(method="fake", num_speculative_tokens=num_speculative_tokens),
        name="fake",
        stream=stream,
        acceptance=acceptance,
        target=Spec(),
        encode=None,
        default_draft_model=None,
        load_draft_model=None,
        self_draft_model=None,
    )
    return FakeDrafter(context, {**DRAFTING_OPTIONS, **options}, FakeRunner())


def make_row(number=0, *, temperature=0.0, length=6, nodes=16, depth=9, slots=40, **params):
    """A sequence with blocks of its own, in no order."""
    rng = random.Random(f"row {number}")
    blocks = rng.sample(range(100 * number, 100 * number + 80), 60)
    token_ids = [rng.randrange(VOCAB_SIZE) for _ in range(length)]
    return DraftRequest(
        seq_id=f"seq-{number}",
        token_ids=token_ids,
        num_prompt_tokens=length,
        max_draft_tokens=nodes,
        max_depth=depth,
        num_slots=max(slots, nodes),
        params=SamplingParams(temperature=temperature, max_tokens=200, **params),
        seed=number,
        sample_index=number % 3,
        block_table=blocks,
        prompt_token_ids=token_ids,
        output_token_ids=[],
    )


def nested(tree, node=ROOT):
    """The tree as (token, what is below it) in the order of the siblings."""
    return [(tree.token_ids[child], nested(tree, child)) for child in tree.children(node)]


def mixed_rows(**limits):
    temperatures = (0.0, 1.0, 0.6, 1.7, 0.0)
    return [
        make_row(
            number,
            temperature=temperature,
            length=3 + 4 * number,
            frequency_penalty=number % 2,
            **limits,
        )
        for number, temperature in enumerate(temperatures)
    ]


def make_copy(row):
    """The same sequence with no draft KV."""
    names = [name for name in DraftRequest.__slots__ if name != "num_draft_computed"]
    return DraftRequest(**{name: getattr(row, name) for name in names})


def penalised_logits(row, path):
    """After a path, with the request's penalty on what it has said: float64 [vocab_size]."""
    logits = torch.tensor(logits_after((*row.token_ids, *path)), dtype=torch.float64)
    for token in (*row.output_token_ids, *path):
        logits[token] -= row.params.frequency_penalty
    return logits


def likeliest(drafter, row, path, count):
    """The `count` best tokens after a path, with the confidence in each."""
    temperature = row.params.temperature
    logits = penalised_logits(row, path)
    log_probs = (logits / (temperature or 1.0)).log_softmax(-1)
    scores, scale = log_probs, drafter.sharpness.value * (temperature or 1.0)
    if drafter.plan.children == "coupled" and temperature > 0:
        position = len(row.token_ids) + len(path)
        key = noise.key(row.seed, row.sample_index, position, Purpose.TARGET)
        scores = scores + noise.gumbel(noise.key_tensor([key]), torch.arange(VOCAB_SIZE))[0]
    elif temperature > 0:
        scale = 1.0
    chances = (scores * scale).softmax(-1)
    best = sorted(range(VOCAB_SIZE), key=lambda token: -scores[token])[:count]
    return [(token, float(chances[token])) for token in best]
