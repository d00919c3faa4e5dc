"""Memory that an engine takes at most, beside what it was told that it may take."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gpu_checkpoints import DEMO, DEMO_DRAFT, grown, grown_name, random_prompts
from gpu_device import synchronize
from gpu_jobs import Context, Row

from folospec import LLM, SamplingParams

SHARES = (0.3, 0.6)
HOST_BYTES = 8 << 20
BATCH, PROMPT_TOKENS, NEW_TOKENS = 64, 256, 16
QUICK_BATCH, QUICK_PROMPT_TOKENS = 2, 20
SLACK = 0.02
"""Share of the card that the allocator may round up to."""


def check(context: Context) -> Iterator[Row]:
    """A row for every share of the card's memory that is asked for, with and without a drafter."""
    path, name = (DEMO, "demo") if context.quick else (grown(context), grown_name(context))
    draft = {"method": "draft_model", "model": DEMO_DRAFT, "num_speculative_tokens": 5}
    for share in SHARES if context.on_gpu else (None,):
        for speculative in (None, draft):
            if not context.budget.allows():
                return
            row = _measure(context, path, share, speculative)
            drafter = speculative and speculative["method"]
            yield {"kind": "memory", "model": name, "drafter": drafter, **row}


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
