"""Memory that an engine takes at most, beside what it was told that it may take; and weights in 8
bits: their bytes, and the time of a step, beside the model's own type."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from folospec import LLM, SamplingParams
from folospec.models.decoder import Decoder
from gpu_check.checkpoints import DEMO, DEMO_DRAFT, grown, grown_name, random_prompts
from gpu_check.device import measure_machine, synchronize
from gpu_check.jobs import Context, Row, guarded
from gpu_check.steps import Bench

PLAIN_SHARE, DRAFT_SHARE = 0.3, 0.6
HOST_BYTES = 8 << 20
BATCH, PROMPT_TOKENS, NEW_TOKENS = 32, 256, 16
QUICK_BATCH, QUICK_PROMPT_TOKENS = 2, 20
SLACK = 0.02
"""Share of the card that the allocator may round up to."""


def check(context: Context) -> Iterator[Row]:
    """A row without a drafter and one with, for two shares of the card's memory; then weights."""
    path, name = (DEMO, "demo") if context.quick else (grown(context), grown_name(context))
    draft = {"method": "draft_model", "model": DEMO_DRAFT, "num_speculative_tokens": 5}
    for share, speculative in ((PLAIN_SHARE, None), (DRAFT_SHARE, draft)):
        if not context.budget.allows():
            return
        row = _measure(context, path, share if context.on_gpu else None, speculative)
        drafter = speculative and speculative["method"]
        yield {"kind": "memory", "model": name, "drafter": drafter, **row}
    bench = Bench.of(context, name, path, measure_machine(context.device, context.quick))
    for quantization in (None, "int8"):
        if not context.budget.allows():
            return
        known = {"kind": "weights", "model": name, "quantization": quantization}
        for row in guarded(_weights(bench, quantization, 20 if context.quick else 512), **known):
            yield {**known, **row}


def _weights(bench: Bench, quantization: str | None, length: int) -> Iterator[Row]:
    """Bytes of the layers' matrices, and the time of a step; or why there is none."""
    try:
        engine = bench.engine(1, length, quantization=quantization)
    except ValueError as error:  # torchao is not there
        yield {"skipped": str(error)}
        return
    model = engine.engine.components.target.model
    assert isinstance(model, Decoder)
    matrices = [(layer.qkv, layer.output, layer.gate_up, layer.down) for layer in model.layers]
    num_bytes = sum(_num_bytes(matrix) for layer in matrices for matrix in layer)
    yield {"weight_bytes": num_bytes, "ms": bench.measure(engine, "batch", 1, length)["ms"]}


def _num_bytes(tensor: Tensor) -> int:
    """Those of the tensors that it consists of: torchao's has values and scales."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return sum(_num_bytes(getattr(tensor, name)) for name in names)
    return tensor.nbytes


def _measure(context: Context, path: str, share: float | None, speculative: Row | None) -> Row:
    """Make an engine, run a full batch, and see what it took. Where there is no GPU the bytes of
    the pool are asked for, and only they are looked at."""
    batch = QUICK_BATCH if context.quick else BATCH
    length = QUICK_PROMPT_TOKENS if context.quick else PROMPT_TOKENS
    options = (
        {"kv_cache_memory": HOST_BYTES} if share is None else {"gpu_memory_utilization": share}
    )
    others = _start(context.device) if context.on_gpu else 0
    engine = LLM(
        path,
        speculative,
        device=context.device,
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=batch,
        skip_tokenizer_init=True,
        **options,
    )
    prompts = [{"prompt_token_ids": ids} for ids in random_prompts(4096, batch, [length])]
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    engine.generate(prompts, params, use_tqdm=False)
    stats = engine.stats()
    kv_bytes = stats["kv_cache_bytes"]
    row = {"asked": share, "kv_bytes": kv_bytes, "num_blocks": stats["num_blocks"]}
    if share is None:
        return {**row, "asked_bytes": HOST_BYTES, "passed": kv_bytes <= HOST_BYTES}
    synchronize(context.device)
    free, total = torch.cuda.mem_get_info(context.device)
    taken = total - free
    return {
        **row,
        "total_bytes": total,
        "asked_bytes": int(share * total),
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(context.device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(context.device),
        "taken_bytes": taken,
        "taken_before_bytes": others,
        "passed": taken <= (share + SLACK) * total,
    }


def _start(device: str) -> int:
    """Give back what is unused, and forget the peaks; bytes of the card that others have."""
    import gc

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    free, total = torch.cuda.mem_get_info(device)
    return total - free
