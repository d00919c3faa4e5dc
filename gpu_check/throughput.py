"""Tokens per second on the device: folospec plain and speculative, and transformers in its ways.

What speculation gains depends on what is accepted: to have that in hand, a drafter is told what the
target will say (`drafters`). Who is measured takes turns, so that all meet the same machine; a
ratio is the median of the turns' own ratios. Everyone generates the same number of tokens after the
same prompts, in the same type.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.engine.throughput import comparison, summary
from benchmarks.lib.contestants import (
    ASSISTANT_CONFIDENCE,
    PROMPT_LOOKUP_NGRAM,
    Contestant,
    Folospec,
    Run,
    TransformersGenerate,
    TransformersGenerateBatch,
)
from benchmarks.lib.limits import run_seconds
from folospec import LLM
from folospec.models.loader import load_tokenizer, resolve_model
from gpu_check.checkpoints import (
    DEMO,
    DEMO_DRAFT,
    grown,
    grown_name,
    name_8b,
    random_prompts,
    source_prompts,
    transformers_8b,
    vocab_size_8b,
    without_files,
    write_8b_config,
)
from gpu_check.device import ceilings, measure_machine
from gpu_check.drafters import ACCEPTANCE, ToldDrafter, chains
from gpu_check.jobs import Budget, Context, Row, failure, is_lost
from gpu_check.steps import Bench

DTYPE = "bfloat16"
BATCHES, QUICK_BATCHES = (1, 8, 64), (1, 2)
ROUNDS, QUICK_ROUNDS = 3, 1
PROMPT_TOKENS, NEW_TOKENS = 128, 64
QUICK_PROMPT_TOKENS, QUICK_NEW_TOKENS = 24, 10
MAX_MODEL_LEN = 1024
"""What the demo's draft model takes."""
WARM_UP_TOKENS = 12
OWN_PROMPTS = 6
DRAFT_TOKENS = 5
EXPECTED_LENGTH = sum(ACCEPTANCE**depth for depth in range(DRAFT_TOKENS + 1))
"""Tokens per step where every draft token is right with that probability."""
BLOCK_SIZE = 16
STEP_ROWS = (1, 16)
PLAIN, TOLD = "folospec plain", f"folospec told, right at {ACCEPTANCE}"


class Own(Folospec):
    """folospec with an engine that was made elsewhere."""

    def __init__(self, name: str, llm: LLM, settings: dict[str, Any]) -> None:
        self.name, self.llm, self.settings = name, llm, settings


@dataclass(slots=True)
class Loaded:
    """Models of transformers, in the place of `contestants.TransformersModels`."""

    target: Any
    draft: Any = None


@dataclass(slots=True)
class Field:
    """Who takes part, what they complete, and the model's path for what it has to read."""

    path: str
    contestants: list[Contestant]
    prompts: list[list[int]]
    notes: list[Row] = field(default_factory=list)


def check(context: Context, model: str) -> Iterator[Row]:
    """One model: rows of throughput, and for the 8b one steps of 1 and 16 rows."""
    machine = measure_machine(context.device, context.quick)
    yield ceilings(machine)
    field = _make_8b(context) if model == "8b" else _make_trained(context, model)
    name = {"demo": DEMO, "grown": grown_name(context), "8b": name_8b(context)}[model]
    bench = Bench.of(context, name, field.path, machine)
    yield from field.notes
    yield from _contest(context, field, bench)
    if model == "8b":
        del field  # four models of that size would hardly fit
        gc.collect()
        yield from _steps_8b(context, bench)


def _contest(context: Context, field: Field, bench: Bench) -> Iterator[Row]:
    """All cells of a model, while there is time."""
    tokens = QUICK_NEW_TOKENS if context.quick else NEW_TOKENS
    rounds = QUICK_ROUNDS if context.quick else ROUNDS
    for batch, count, entrants in _cells(context, field.contestants):
        if not context.budget.allows():
            return
        prompts = field.prompts[:count]
        lengths = [len(ids) for ids in prompts]
        least = run_seconds(bench.work, bench.machine, lengths, tokens, batch, DTYPE)
        known = {"model": bench.model, "dtype": DTYPE, "batch": batch, "prompts": count}
        known |= {"prompt_tokens": lengths[0], "new_tokens": tokens, "limit_seconds": least}
        for row in compete(entrants, prompts, batch, rounds, tokens, context.budget):
            if "seconds" in row:
                row["share_of_limit"] = least / statistics.median(row["seconds"])
            yield {"kind": "throughput", **known, **row}


def _cells(
    context: Context, contestants: list[Contestant]
) -> Iterator[tuple[int, int, list[Contestant]]]:
    """Batch, number of prompts, and who takes part. At batch 1 folospec's own runs are measured on
    several prompts first: how many drafts of one prompt are right is a matter of luck."""
    own = [c for c in contestants if isinstance(c, Own)]
    yield 1, QUICK_BATCHES[-1] if context.quick else OWN_PROMPTS, own
    for batch in QUICK_BATCHES if context.quick else BATCHES:
        yield batch, batch, [c for c in contestants if batch == 1 or not c.only_batch_1]


def compete(
    contestants: Sequence[Contestant],
    prompts: list[list[int]],
    batch: int,
    rounds: int,
    max_tokens: int,
    budget: Budget,
) -> list[Row]:
    """Let all complete the prompts in turns, `batch` at a time, while there is time. Plain decoding
    goes first, and what it says is what the told drafter is told."""
    runs: dict[str, list[Run]] = {c.name: [] for c in contestants}
    errors: dict[str, str] = {}
    for turn in range(-1, rounds):
        first = max(turn, 0) % len(contestants)
        for contestant in [*contestants[first:], *contestants[:first]]:
            if contestant.name in errors or (turn > 0 and not budget.allows()):
                continue
            tells = turn < 0 and contestant.name == PLAIN
            tokens, asked = max_tokens, prompts
            if turn < 0 and not tells:
                tokens, asked = min(WARM_UP_TOKENS, max_tokens), prompts[:batch]
            try:
                run = contestant.run(asked, batch, tokens)
            except Exception as error:  # one that cannot is out, and the others go on
                errors[contestant.name] = f"{type(error).__name__}: {error}"
                continue
            if tells:
                keys = map(tuple, prompts)
                ToldDrafter.futures.update(zip(keys, run.token_ids, strict=True))
            if turn >= 0:
                runs[contestant.name].append(run)
    rows = []
    for c in contestants:
        row: Row = {"contestant": c.name, "settings": c.settings}
        if c.name == TOLD:
            row["expected_acceptance_length"] = EXPECTED_LENGTH
        if c.name in errors:
            row["error"] = errors[c.name]
        elif runs[c.name]:
            row |= {**summary(runs[c.name]), **comparison(c.name, runs, errors)}
        rows.append(row)
    return rows


def _engine(context: Context, path: str, draft_rows: int, speculative: Any) -> LLM:
    """An engine for the largest batch."""
    batch = (QUICK_BATCHES if context.quick else BATCHES)[-1]
    length = PROMPT_TOKENS + NEW_TOKENS + draft_rows
    return LLM(
        path,
        speculative,
        device=context.device,
        dtype=DTYPE,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=batch,
        max_num_batched_tokens=2048,
        num_blocks=batch * (-(-length // BLOCK_SIZE) + 1),
        block_size=BLOCK_SIZE,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )


def _own(context: Context, path: str, draft: str | None, notes: list[Row]) -> list[Contestant]:
    """folospec's own runs; one that cannot be made leaves a note, and the others go on."""
    told = {"method": "told", "num_speculative_tokens": DRAFT_TOKENS}
    asked: dict[str, Any] = {PLAIN: None, TOLD: told}
    if draft is not None:
        asked["folospec draft_model"] = {**told, "method": "draft_model", "model": draft}
    made = []
    for name, speculative in asked.items():
        llm = _attempt(partial(_engine, context, path, DRAFT_TOKENS, speculative), name, notes)
        if llm is not None:
            made.append(Own(name, llm, {"speculative": speculative}))
    return made


def _attempt(make: Callable[[], Any], name: str, notes: list[Row]) -> Any:
    """What `make` makes; None if it fails, which leaves a note: the others go on."""
    try:
        return make()
    except Exception as error:
        if is_lost(error):
            raise
        notes.append({**failure(error), "contestant": name})
        return None


def _others(models: Any) -> list[Contestant]:
    """The ways of transformers; those that speculate take batch 1 only."""
    if models is None:
        return []
    lookup = {
        "prompt_lookup_num_tokens": DRAFT_TOKENS,
        "max_matching_ngram_size": PROMPT_LOOKUP_NGRAM,
    }
    found: list[Contestant] = [
        TransformersGenerate("generate", models, {}),
        TransformersGenerateBatch(models),
        TransformersGenerate("prompt_lookup", models, dict(lookup), **lookup),
    ]
    if models.draft is not None:
        config = models.draft.generation_config
        config.num_assistant_tokens = DRAFT_TOKENS
        config.num_assistant_tokens_schedule = "constant"
        config.assistant_confidence_threshold = ASSISTANT_CONFIDENCE
        settings = {"num_assistant_tokens": DRAFT_TOKENS}
        settings |= {"assistant_confidence_threshold": ASSISTANT_CONFIDENCE}
        options = {"assistant_model": models.draft}
        found.append(TransformersGenerate("assistant_model", models, settings, **options))
    return found


def _make_trained(context: Context, model: str) -> Field:
    """The demo, or the demo grown: both know code, and the demo's draft model drafts for either."""
    path = DEMO if model == "demo" else grown(context)
    notes: list[Row] = []
    own = _own(context, path, DEMO_DRAFT, notes)
    models = _attempt(partial(_load_pair, context, path), "transformers", notes)
    length = QUICK_PROMPT_TOKENS if context.quick else PROMPT_TOKENS
    prompts = source_prompts(load_tokenizer(DEMO), BATCHES[-1], length)
    return Field(path, [*own, *_others(models)], prompts, notes)


def _load_pair(context: Context, path: str) -> Loaded:
    from transformers import AutoModelForCausalLM

    loaded = []
    for name in (path, DEMO_DRAFT):
        folder = resolve_model(name)
        one: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        one.generation_config.eos_token_id = None
        loaded.append(one.to(context.device).eval())
    return Loaded(*loaded)


def _make_8b(context: Context) -> Field:
    path = write_8b_config(context.folder / "8b", context.quick)
    note = "random weights. There is no draft model of it: assistant_model of transformers is not "
    note += "among its ways, and the fastest is that of the others. After every token comes the "
    note += "next, so prompt lookup finds nothing."
    notes: list[Row] = [{"kind": "note", "model": name_8b(context), "note": note}]
    with without_files(path, context.device):
        own = _own(context, path, None, notes)
    make = partial(transformers_8b, path, context.device)
    target = _attempt(make, "transformers", notes)
    length = QUICK_PROMPT_TOKENS if context.quick else PROMPT_TOKENS
    # What comes after a prompt counts up from its last token, and must not come to the end.
    prompts = random_prompts(vocab_size_8b(context.quick) // 2, BATCHES[-1], [length])
    others = _others(Loaded(target) if target is not None else None)
    return Field(path, [*own, *others], prompts, notes)


def _steps_8b(context: Context, bench: Bench) -> Iterator[Row]:
    """Steps of 1 and of 16 rows, as of the grown model."""
    if not context.budget.allows():
        return
    length, rows = (20, (1, 4)) if context.quick else (512, STEP_ROWS)
    with without_files(bench.path, context.device):
        engine = bench.engine(rows[-1], length, chains(rows[-1]))
    yield from bench.series(context, engine, "chain", rows, length)
