"""Speculative tokens against plain ones, on the device.

A job is a model in one mode of determinism. It runs every drafter, with CUDA graphs and without,
greedily and sampled, and compares each with plain decoding of the same kind:

    demo    bfloat16, a roomy pool: all prompts at once; the second pass meets the first's prefixes
    tiny    float32, a small pool and a small token budget: prompts in chunks, preemption

With `deterministic=True` tokens must be equal. Without, they are counted where they are not, and
every first difference must be a near tie (`ties`). A run proves something only if drafts were
made, accepted and rejected; and the comparison only if it notices an engine that is broken on
purpose.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch

from folospec import LLM, SamplingParams
from folospec.engine.commit import Committer
from folospec.models.loader import load_tokenizer
from folospec.worker.kv_cache import KVCache
from gpu_check.checkpoints import Pair, demo_pair, random_prompts, source_prompts, tiny_pair
from gpu_check.jobs import Context, Row, guarded
from gpu_check.ties import Parting, Referee

SEED = 11
NUM_PROMPTS = 8
SAMPLINGS = ("greedy", "sampled")
MAX_TOKENS, QUICK_TOKENS = 40, 12
TIGHT = {"num_blocks": 18, "max_num_batched_tokens": 64}
COUNTS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_moved_rows")
EVENTS = ("num_preemptions", "prefix_cache_hits")

Tokens = list[list[list[int]]]
"""Of every prompt's completions."""


@dataclass(frozen=True, slots=True)
class Work:
    """What every engine of a job is given."""

    pair: Pair
    prompts: list[list[int]]
    max_tokens: int
    options: dict[str, Any]

    def params(self, sampling: str) -> list[SamplingParams]:
        """One for each prompt; the third prompt is completed three times where tokens are drawn."""
        common: dict[str, Any] = {"max_tokens": self.max_tokens, "ignore_eos": True, "seed": SEED}
        if sampling == "greedy":
            return [SamplingParams(temperature=0.0, **common)] * len(self.prompts)
        drawn: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, **common}
        return [
            SamplingParams(n=3 if index == 2 else 1, **drawn) for index in range(len(self.prompts))
        ]


def drafters(draft: str | None, quick: bool) -> dict[str, dict[str, Any]]:
    """By name, what `LLM(speculative=)` takes."""
    model = {"method": "draft_model", "model": draft}
    found: dict[str, dict[str, Any]] = {
        "ngram": {"method": "ngram", "prompt_lookup_min": 1, "num_speculative_tokens": 4},
        "draft_model tree": {**model, "tree": "dynamic"},
        "draft_model chain": {**model, "num_speculative_tokens": 5},
        "suffix": {"method": "suffix"},
        "lookahead": {"method": "lookahead"},
    }
    return dict(list(found.items())[:2]) if quick else found


def modes(context: Context) -> dict[str, dict[str, Any]]:
    """With graphs and without; where there is no GPU there is one mode."""
    if not context.on_gpu:
        return {"eager": {}}
    return {"graphs": {"enforce_eager": False}, "eager": {"enforce_eager": True}}


def make_work(context: Context, model: str) -> Work:
    """The prompts are ragged, and two of them begin with another's first forty tokens."""
    tokens = QUICK_TOKENS if context.quick else MAX_TOKENS
    lengths = [7, 60, 23, 44, 3, 90, 31, 75]
    if model == "demo":
        pair = demo_pair()
        whole = source_prompts(load_tokenizer(pair.target), NUM_PROMPTS, max(lengths))
        prompts = [ids[:length] for ids, length in zip(whole, lengths, strict=True)]
        options: dict[str, Any] = {"num_blocks": 512}
    else:
        folder = context.folder / f"tiny-{os.getpid()}"
        folder.mkdir(parents=True, exist_ok=True)
        pair = tiny_pair(folder)
        prompts = random_prompts(pair.vocab_size, NUM_PROMPTS, lengths)
        prompts[3] = prompts[3][:20] * 2  # something to look up
        options = dict(TIGHT)
    prompts[6] = [*prompts[5][:40], *prompts[6][40:], 9]
    prompts[7] = [*prompts[5][:40], *prompts[7][40:]]
    return Work(pair, prompts, tokens, options)


def check(context: Context, model: str, deterministic: bool | None) -> Iterator[Row]:
    """All drafters and modes of one model; a row for each pass."""
    work = make_work(context, model)
    referee = None if deterministic else Referee(work.pair.target, work.pair.dtype, context.device)
    known = {"model": model, "dtype": work.pair.dtype, "deterministic": deterministic}
    plain: dict[tuple[str, str], Tokens] = {}
    for mode, options in modes(context).items():
        engine = make_engine(context, work, None, deterministic, options)
        for sampling in SAMPLINGS:
            plain[mode, sampling], counts = generate(engine, work, sampling)
            row = {**known, "drafter": None, "mode": mode, "sampling": sampling, **counts}
            first = next(iter(modes(context)))
            found = compare(work, sampling, plain[first, sampling], plain[mode, sampling], referee)
            yield {"kind": "plain", **row, "compared_with": first, **found}
    for mode, options in modes(context).items():
        for name, speculative in drafters(work.pair.draft, context.quick).items():
            if not context.budget.allows():
                return
            told = {**known, "drafter": name, "mode": mode}
            engine_of = partial(make_engine, context, work, speculative, deterministic, options)
            expected = {sampling: plain[mode, sampling] for sampling in SAMPLINGS}
            yield from guarded(_drafter(engine_of, work, told, expected, referee), **told)
    if deterministic and context.budget.allows():
        for row in guarded(controls(context, work, plain), kind="control"):
            yield {**known, **row}


def _drafter(
    engine_of: Callable[[], LLM],
    work: Work,
    known: Row,
    expected: dict[str, Tokens],
    referee: Referee | None,
) -> Iterator[Row]:
    """The passes of one drafter in one mode, and whether they prove anything."""
    engine, rows = engine_of(), []
    for sampling in SAMPLINGS:
        tokens, counts = generate(engine, work, sampling)
        found = compare(work, sampling, expected[sampling], tokens, referee)
        rows.append({"kind": "tokens", **known, "sampling": sampling, **counts, **found})
        yield rows[-1]
    yield {"kind": "proof", **known, **proof(rows, known["model"])}


def make_engine(
    context: Context,
    work: Work,
    speculative: dict[str, Any] | None,
    deterministic: bool | None,
    options: dict[str, Any],
) -> LLM:
    return LLM(
        work.pair.target,
        speculative,
        device=context.device,
        dtype=work.pair.dtype,
        deterministic=deterministic,
        skip_tokenizer_init=True,
        strict_drafters=True,
        max_num_seqs=NUM_PROMPTS,
        **work.options,
        **options,
    )


def generate(engine: LLM, work: Work, sampling: str) -> tuple[Tokens, Row]:
    """The tokens of one pass over the prompts, and what the engine counted meanwhile."""
    before = engine.stats()
    outputs = engine.generate(
        [{"prompt_token_ids": ids} for ids in work.prompts], work.params(sampling), use_tqdm=False
    )
    after = engine.stats()
    counts: Row = {name: after[name] - before[name] for name in (*COUNTS, *EVENTS)}
    counts |= {"promise": after["lossless"], "num_cuda_graphs": after["num_cuda_graphs"]}
    return [[c.token_ids for c in output.outputs] for output in outputs], counts


def compare(
    work: Work, sampling: str, expected: Tokens, found: Tokens, referee: Referee | None
) -> Row:
    """How many tokens and sequences differ, where each began to, and whether all is well: without a
    referee nothing may differ."""
    partings = [
        Parting(prompt, a, b, params, sample)
        for prompt, params, ones, others in zip(
            work.prompts, work.params(sampling), expected, found, strict=True
        )
        for sample, (a, b) in enumerate(zip(ones, others, strict=True))
        if a != b
    ]
    places = [
        referee.verify(parting) if referee else {"position": parting.place} for parting in partings
    ]
    return {
        "num_tokens": sum(len(tokens) for completions in expected for tokens in completions),
        "differing_sequences": len(partings),
        "differing_tokens": sum(len(p.expected) - p.place for p in partings),
        "first_differences": places,
        "passed": all(place.get("near_tie", False) for place in places),
    }


def proof(rows: list[Row], model: str) -> Row:
    """Whether the passes of an engine prove anything."""
    total = {name: sum(row[name] for row in rows) for name in (*COUNTS, *EVENTS)}
    rejected = total["num_draft_tokens"] - total["num_accepted_tokens"]
    lacking = [name for name in ("num_drafts", "num_accepted_tokens") if not total[name]]
    lacking += [] if rejected else ["rejected drafts"]
    if "tree" in str(rows[0]["drafter"]) and not total["num_moved_rows"]:
        lacking.append("num_moved_rows")
    if not total["num_preemptions" if model == "tiny" else "prefix_cache_hits"]:
        lacking.append("num_preemptions" if model == "tiny" else "prefix_cache_hits")
    if rows[0]["deterministic"] and rows[0]["promise"] != "bitwise":
        lacking.append("the promise of bits")
    if rows[0]["mode"] == "graphs" and not rows[0]["num_cuda_graphs"]:
        lacking.append("CUDA graphs")
    return {**total, "lacking": lacking, "passed": not lacking}


def controls(context: Context, work: Work, plain: dict[tuple[str, str], Tokens]) -> Iterator[Row]:
    """Engines that are broken on purpose: their tokens must differ."""
    mode, options = next(iter(modes(context).items()))
    tree = drafters(work.pair.draft, context.quick)["draft_model tree"]
    for name, owner, method, broken in (
        ("accepted rows stay where they are", KVCache, "move_rows", _unmoved),
        ("a committed row is lost", Committer, "_advance", _forgetful(Committer._advance)),
    ):
        with mock.patch.object(owner, method, autospec=True, side_effect=broken) as called:
            engine = make_engine(context, work, tree, True, options)
            differing = 0
            for sampling in SAMPLINGS:
                tokens, _ = generate(engine, work, sampling)
                differing += compare(work, sampling, plain[mode, sampling], tokens, None)[
                    "differing_tokens"
                ]
        caught = differing > 0 and called.call_count > 0
        yield {
            "kind": "control",
            "control": name,
            "mode": mode,
            "calls": called.call_count,
            "differing_tokens": differing,
            "passed": caught,
        }


def _unmoved(*_: Any) -> None:
    """In the place of `KVCache.move_rows`."""


def _forgetful(advance: Callable[..., None]) -> Callable[..., None]:
    """In the place of `Committer._advance`: loses the last committed row of the first layer."""

    def advanced(self: Any, seq: Any, num_computed_tokens: int) -> None:
        advance(self, seq, num_computed_tokens)
        last = self.manager.slot(seq, seq.num_computed_tokens - 1)
        with torch.inference_mode():
            self._worker.target.kv.layers[0].key[last] = 0.0

    return advanced
