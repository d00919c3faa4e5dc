"""What a step costs on the device: by its rows, by the batch, by the attention backend, and with
every sum in one order.

    plain   one sequence, as who asks for nothing gets it: a step may have several tokens
    chain   one sequence, its last token and drafts behind it: 1 to 64 rows
    batch   as many sequences, each with its last token: 1 to 128 rows

A time is the whole step as its caller sees it, tokens in hand; of plain decoding it is that of a
token. Chains and batches are single steps, `multi_step=1`. The limit beside it is that of the
bytes the step must read, over the copy bandwidth measured in the same process just before.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.engine.step_cost import limit_of, timed_steps
from benchmarks.lib.limits import Machine, Work
from folospec import LLM, SamplingParams
from folospec.models.loader import resolve_model
from folospec.worker.multi_step import DEFAULT
from gpu_check.checkpoints import DEMO, grown, grown_name, name_8b, random_prompts, vocab_size_8b
from gpu_check.device import ceilings, measure_machine, synchronize
from gpu_check.drafters import chains
from gpu_check.jobs import Context, Row, guarded
from gpu_check.linears import linears
from gpu_check.profile import profiled

DTYPE = "bfloat16"
CHAIN_ROWS = (1, 2, 4, 8, 16, 32, 64)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
LONG_BATCHES = (1, 8, 32)
ORDERED_ROWS, ORDERED_BATCHES = (1, 16), (1, 8)
"""With `deterministic=True`."""
SHORT, LONG = 512, 4096
STEPS = 24
BLOCK_SIZE = 16
BLOCK_SIZES = {"triton": 16, "flash_attn": 256, "xformers": 256, "torch": 16}
"""Of the attention backends; the libraries take large blocks only."""
HOST_BLOCK_SIZES = {"native": 16, "torch": 16, "flash_attn": 256}
"""The same where there is no GPU. Interpreted, triton would take minutes."""


class StepTimer:
    """Steps an engine as `StepClock` does, and times the whole step."""

    def __init__(self, llm: LLM, device: str) -> None:
        self.engine, self.device = llm.engine, device
        self.steps: list[dict[str, float]] = []

    def step(self) -> None:
        begin = time.perf_counter()
        self.engine.step(finished_only=True)
        self.steps.append({"total": time.perf_counter() - begin})


@dataclass(frozen=True, slots=True)
class Bench:
    """A model, what its steps have to read, and what the device can do."""

    model: str
    path: str
    vocab_size: int
    machine: Machine
    work: Work
    device: str
    num_steps: int = STEPS

    @classmethod
    def of(cls, context: Context, model: str, path: str, machine: Machine) -> Bench:
        work = Work.of_checkpoint(resolve_model(path))
        steps = 3 if context.quick else STEPS
        vocab = vocab_size_8b(context.quick) if model == name_8b(context) else 4096
        return cls(model, path, vocab, machine, work, context.device, steps)

    def engine(self, most_rows: int, tokens: int, speculative: Any = None, **options: Any) -> LLM:
        """An engine for so many sequences, or for one with so many rows, and so many tokens. It
        comes back for every token unless `multi_step` is given."""
        options.setdefault("multi_step", 1)
        block_size = options.setdefault("block_size", BLOCK_SIZE)
        return LLM(
            self.path,
            speculative,
            device=self.device,
            dtype=DTYPE,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_num_seqs=1 if speculative else most_rows,
            max_num_batched_tokens=max(8192 if self.num_steps == STEPS else 64, most_rows),
            num_blocks=tokens // block_size + most_rows * (1 + 2 * STEPS // block_size) + 8,
            strict_drafters=True,
            **options,
        )

    def measure(self, engine: LLM, shape: str, rows: int, context: int) -> Row:
        """The median of a kind of steps, and its limit."""
        params = SamplingParams(
            temperature=0.0,
            max_tokens=2 * self.num_steps + rows,
            ignore_eos=True,
            num_speculative_tokens=rows - 1 if shape == "chain" else None,
        )
        sequences = rows if shape == "batch" else 1
        prompts = random_prompts(self.vocab_size, sequences, [context])
        timer: Any = StepTimer(engine, self.device)
        synchronize(self.device)
        steps, outputs = timed_steps(timer, engine, prompts, params, self.num_steps)
        if any(len(output) >= params.max_tokens for output in outputs):
            raise RuntimeError("a request ended before its steps did: drafts were accepted")
        milliseconds = 1e3 * statistics.median(step["total"] for step in steps)
        lengths = [context + self.num_steps // 2] * sequences
        times = {"total_ms": milliseconds}
        return {
            "kind": "step",
            "model": self.model,
            "dtype": DTYPE,
            "shape": shape,
            "rows": rows,
            "context": context,
            "multi_step": engine.engine.multi_step.length,
            "steps": len(steps),
            "ms": milliseconds,
            **limit_of(self.machine, self.work, lengths, rows // sequences, DTYPE, times),
        }

    def measure_plain(self, engine: LLM, context: int) -> Row:
        """The time of a token of one sequence, of however many a step has, and its limit."""
        core, known = engine.engine, {"kind": "step", "model": self.model, "dtype": DTYPE}
        ahead = core.multi_step.length
        params = SamplingParams(
            temperature=0.0, max_tokens=plain_tokens(self.num_steps, ahead), ignore_eos=True
        )
        [prompt] = random_prompts(self.vocab_size, 1, [context])
        request = core.add_request({"prompt_token_ids": prompt}, params)
        [seq] = core.requests[request].sequences
        while seq.num_output_tokens <= 1:  # the prompt, and a step to warm up
            core.step(finished_only=True)
        synchronize(self.device)
        before, begin = core.stats()["num_output_tokens"], time.perf_counter()
        for _ in range(self.num_steps):
            core.step(finished_only=True)
        seconds = time.perf_counter() - begin
        tokens = core.stats()["num_output_tokens"] - before
        if request not in core.requests:
            raise RuntimeError("the request ended before its steps did")
        core.abort(request)
        times = {"total_ms": 1e3 * seconds / tokens}
        shape = {"shape": "plain", "rows": 1, "context": context, "multi_step": ahead}
        return {
            **known,
            **shape,
            "steps": self.num_steps,
            "tokens": tokens,
            "ms": times["total_ms"],
            **limit_of(self.machine, self.work, [context + tokens // 2], 1, DTYPE, times),
        }

    def series(
        self, context: Context, engine: LLM, shape: str, all_rows: Sequence[int], length: int
    ) -> Iterator[Row]:
        """A row for every number of rows, each with its ratio to the first."""
        first = None
        for rows in all_rows:
            if not context.budget.allows():
                return
            row = self.measure(engine, shape, rows, length)
            first = first or row["ms"]
            yield {**row, "ratio_to_first": row["ms"] / first}


def check_rows(context: Context) -> Iterator[Row]:
    """The grown model: plain, rows, batches, contexts; then some of them, one order of sums."""
    machine = measure_machine(context.device, context.quick)
    yield ceilings(machine)
    bench = Bench.of(context, grown_name(context), grown(context), machine)
    for row in guarded(_plain(context, bench), shape="plain"):
        yield {**row, "deterministic": None}
    fast: dict[tuple[str, int, int], float] = {}
    for deterministic in (None, True):
        known = {"deterministic": deterministic}
        for shape in ("chain", "batch"):
            for row in guarded(_shape(context, bench, shape, deterministic), shape=shape):
                if row["kind"] == "step":
                    key = row["shape"], row["rows"], row["context"]
                    row["over_fast"] = row["ms"] / fast.setdefault(key, row["ms"])
                yield {**row, **known}


def _plain(context: Context, bench: Bench) -> Iterator[Row]:
    """Plain decoding as it is without any option, and where its time goes."""
    length = 20 if context.quick else SHORT
    engine = bench.engine(1, length + plain_tokens(bench.num_steps, DEFAULT), multi_step=None)
    yield bench.measure_plain(engine, length)
    if context.budget.allows():
        [prompt] = random_prompts(bench.vocab_size, 1, [length])
        found = profiled(engine, prompt, None, context.device)
        yield {**found, "model": bench.model, "shape": "plain", "rows": 1, "context": length}


def plain_tokens(num_steps: int, ahead: int) -> int:
    """Tokens of so many steps, and of those before them, with room for one more."""
    return (num_steps + 3) * ahead


def _shape(context: Context, bench: Bench, shape: str, deterministic: bool | None) -> Iterator[Row]:
    """All steps of one shape, in one engine."""
    short, long = (20, 40) if context.quick else (SHORT, LONG)
    all_rows = {"chain": CHAIN_ROWS, "batch": BATCHES}[shape]
    if context.quick:
        all_rows = {"chain": (1, 4), "batch": (1, 2)}[shape]
    if deterministic:
        ordered = {"chain": ORDERED_ROWS, "batch": ORDERED_BATCHES}[shape]
        all_rows = tuple(rows for rows in ordered if rows in all_rows)
    most = all_rows[-1]
    drafts, tokens = chains(most), long
    if shape == "batch":
        drafts, tokens = None, max(most * short, min(most, LONG_BATCHES[-1]) * long)
    engine = bench.engine(most, tokens, drafts, deterministic=deterministic)
    yield from bench.series(context, engine, shape, all_rows, short)
    if deterministic:
        return
    at_long = all_rows if shape == "chain" else [n for n in LONG_BATCHES if n <= most]
    yield from bench.series(context, engine, shape, at_long, long)
    if shape == "chain" and context.budget.allows(1.0 if context.quick else 5.0):
        rows = min(16, most)
        [prompt] = random_prompts(bench.vocab_size, 1, [short])
        found = profiled(engine, prompt, rows - 1, context.device)
        yield {**found, "model": bench.model, "shape": shape, "rows": rows, "context": short}


def check_parts(context: Context) -> Iterator[Row]:
    """Attention backends side by side, and the own linear beside the library's."""
    machine = measure_machine(context.device, context.quick)
    yield ceilings(machine)
    yield from guarded(linears(context, machine), of="linears")
    name, path = ("demo", DEMO) if context.quick else (grown_name(context), grown(context))
    bench = Bench.of(context, name, path, machine)
    length, size, most = (30, 2, 4) if context.quick else (2048, 16, 16)
    backends = BLOCK_SIZES if context.on_gpu else HOST_BLOCK_SIZES
    for backend, block_size in backends.items():
        if not context.budget.allows():
            return
        known = {"attention": backend, "block_size": block_size}
        options = {"attention_backend": backend, "block_size": block_size}
        rows = _backend(context, bench, options, length, size, most)
        for row in guarded(rows, **known):
            yield {**row, **known}


def _backend(
    context: Context, bench: Bench, options: Row, length: int, size: int, most: int
) -> Iterator[Row]:
    """Steps of one backend, or why there are none."""
    try:
        engine = bench.engine(size, size * length, **options)
        chain = bench.engine(most, length, chains(most), **options)
    except ValueError as error:  # it cannot run here, and says why
        yield {"kind": "backend", "skipped": str(error)}
        return
    for shape, llm, all_rows in (("batch", engine, (1, size)), ("chain", chain, (most,))):
        for row in bench.series(context, llm, shape, all_rows, length):
            yield {**row, "kind": "backend"}
