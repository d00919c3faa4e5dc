"""Measures from how many rows on torch's products are faster, with `deterministic=False`.

It runs when an engine is made on a CPU, once per model and machine.

Native products are made for the few rows of a decoding step. For the hundreds of rows of a prompt
torch's may be faster: that depends on the processor. One layer is timed, since all have products of
the same sizes. Without the waiver nothing is timed here, and every pass runs natively. The figures
are kept as those of `step_timing` are.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from statistics import median

from folospec.config import EngineConfig
from folospec.models.decoder import Decoder
from folospec.models.forward import Rows
from folospec.models.self_draft import self_draft_of
from folospec.worker.loading import EngineComponents
from folospec.worker.model_runner import ModelRunner
from folospec.worker.step_timing import (
    Points,
    Subject,
    model_facts,
    path_of,
    read_points,
    write_points,
)

logger = logging.getLogger(__name__)

ROW_COUNTS = (64, 128, 256, 512)
_ROUNDS = 5
_SECONDS = 4.0
"""Begin no larger count when they are over."""
_WORTHWHILE = 0.97
"""Most time with torch's products, as a share of the native one, for which they are taken."""


def choose_products(config: EngineConfig, components: EngineComponents) -> None:
    """Set the target's `Decoder.torch_products_from`, from the cache or measured now, where the
    target runs natively and bits are waived."""
    model = components.target.model
    waived = config.deterministic is False
    if not (waived and isinstance(model, Decoder) and model.runs_natively):
        return
    subject = Subject(components.target, [model_facts(config.model)], ROW_COUNTS, _SECONDS)
    key = subject.key(config, components.num_blocks)
    keys = [{**key, "products": name} for name in ("native", "torch")]
    paths = [path_of(each) for each in keys]
    native, stock = (
        None if path is None else read_points(path, each)
        for path, each in zip(paths, keys, strict=True)
    )
    if native is None or stock is None:
        native, stock = measure(components.target, config.block_size, components.num_blocks)
        for path, each, points in zip(paths, keys, (native, stock), strict=True):
            if path is not None and points:
                write_points(path, each, points)
    model.torch_products_from = first_worthwhile(native, stock)
    logger.info("passes take torch's products from %s rows on", model.torch_products_from)


def first_worthwhile(native: Points, stock: Points) -> int | None:
    """The smallest number of rows at which torch's products are faster, there and at every larger
    number that was measured, by enough to count; None where there is none."""
    found = None
    for count in sorted(native.keys() & stock.keys(), reverse=True):
        if stock[count] > _WORTHWHILE * native[count]:
            break
        found = count
    return found


def measure(
    target: ModelRunner,
    block_size: int,
    num_blocks: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Points, Points]:
    """Time passes over prompts natively and with torch's products, in turns: number of rows ->
    median seconds, of both. Counts that do not fit are left out, and the larger ones when the time
    is over.

    Args:
        target: its first layer runs, over its KV, of which nothing is used yet.
        num_blocks: of the pool.
        clock: seconds.
    """
    layer = _first_layer(target)
    runner = ModelRunner(layer, max_num_batched_tokens=target.max_num_batched_tokens)
    runner.kv = target.kv
    longest = min(
        num_blocks * block_size, layer.config.max_model_len, runner.max_num_batched_tokens
    )
    table = list(range(min(num_blocks, -(-longest // block_size))))
    native: Points = {}
    stock: Points = {}
    deadline = clock() + _SECONDS
    for count in ROW_COUNTS:
        if count > longest or clock() > deadline:
            break
        batch = [Rows([0] * count, 0, table, num_logits=0)]
        taken: list[tuple[float, float]] = []
        for _ in range(_ROUNDS):
            begin = clock()
            layer.torch_products_from = None
            runner.forward(batch)
            middle = clock()
            layer.torch_products_from = count
            runner.forward(batch)
            taken.append((middle - begin, clock() - middle))
        native[count], stock[count] = map(median, zip(*taken, strict=True))
    return native, stock


def _first_layer(target: ModelRunner) -> Decoder:
    rest = frozenset(range(1, target.model.config.num_layers))
    view = self_draft_of(target.model, skip_attention=rest, skip_mlp=rest)
    assert isinstance(view, Decoder)
    return view
