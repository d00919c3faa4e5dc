"""Measures how much of a GPU is left for KV, by running the largest step.

    |<----------------------- total memory of the card ----------------------->|
    |<-------------- gpu_memory_utilization of it ---------------->|           |
    | other programs | weights | largest step | graphs |    KV     |           |

The step runs on a pool of its own, just large enough, which is given back.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable

import torch

from folospec.models.forward import Rows
from folospec.sampling.constraints import SamplingRow
from folospec.sampling.pipeline import process
from folospec.sampling_params import SamplingParams
from folospec.worker.cuda.buckets import MAX_ROWS
from folospec.worker.model_runner import ModelRunner

logger = logging.getLogger(__name__)

GRAPH_BYTES = 256 << 20
"""Kept free for the CUDA graphs of a model, besides what they do with logits."""


def kv_budget(
    runners: Iterable[ModelRunner],
    device: torch.device,
    *,
    utilization: float,
    block_size: int,
    num_logits: int,
    reserve: int,
) -> int:
    """Bytes that the KV of all runners may take together.

    Args:
        runners: loaded, without KV.
        utilization: share of the card's memory for everything.
        block_size: tokens per block.
        num_logits: most rows of a step that want logits.
        reserve: bytes to keep free, see `graph_bytes`.

    Raises:
        ValueError: nothing is left.
    """
    used = 0
    for runner in runners:  # steps of several models do not run at the same time
        torch.cuda.reset_peak_memory_stats(device)
        kv_bytes = run_largest_step(runner, device, block_size, num_logits)
        used = max(used, torch.cuda.max_memory_allocated(device) - kv_bytes)
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    left = int(utilization * total) - others - used - reserve
    logger.info(
        "of %.1f GiB, others use %.1f, weights and the largest step %.1f; %.1f are left for KV",
        *(size / 2**30 for size in (total, others, used, left)),
    )
    if left <= 0:
        raise ValueError(
            f"gpu_memory_utilization={utilization} must leave memory for KV: it allows "
            f"{utilization * total / 2**30:.2f} GiB, other programs use {others / 2**30:.2f}, "
            f"weights and the largest step {used / 2**30:.2f}, and {reserve / 2**30:.2f} are kept "
            "for CUDA graphs"
        )
    return left


def graph_bytes(vocab_size: int) -> int:
    """What is kept free for the graphs of a model: what they hold is known only when they are
    recorded, and that is after the pool is made. Of logits there are those of the largest bucket,
    twice in float32 and once in the model's type, and what filters keep of `FILTERED_ROWS` rows."""
    return GRAPH_BYTES + vocab_size * (10 * MAX_ROWS + 8 * FILTERED_ROWS)


FILTERED_ROWS = 128
"""See `kernels.gpu.sampling.DeviceSampling`."""
_SAMPLED = SamplingParams(temperature=1.0, top_p=0.9)
"""Filters take more memory than anything else that is done with logits."""


def run_largest_step(
    runner: ModelRunner, device: torch.device, block_size: int, num_logits: int
) -> int:
    """Run a step with as many rows and logits as there can be; return the bytes of the KV that it
    had for it, which is gone."""
    longest, rows_left = runner.model.config.max_model_len, runner.max_num_batched_tokens
    lengths = []
    while rows_left:
        lengths.append(min(longest, rows_left))
        rows_left -= lengths[-1]
    blocks_each = [-(-length // block_size) for length in lengths]
    runner.make_kv(sum(blocks_each), block_size, device)
    assert runner.kv is not None
    batch, first = [], 0
    for length, blocks in zip(lengths, blocks_each, strict=True):
        wanted = min(length, num_logits)
        num_logits -= wanted
        table = list(range(first, first + blocks))
        batch.append(Rows([0] * length, 0, table, num_logits=wanted))
        first += blocks
    logits = runner.forward(batch).logits
    process(logits, [SamplingRow(_SAMPLED, is_draft=True)] * len(logits))
    num_bytes = runner.kv.num_bytes
    runner.kv = None
    return num_bytes
