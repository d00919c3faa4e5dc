"""Builds what `LLM.stats()` returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from folospec.attention.native_cpu import NativeAttention
from folospec.models.decoder import Decoder

if TYPE_CHECKING:
    from folospec.engine.llm_engine import LLMEngine


def stats_report(engine: LLMEngine) -> dict[str, Any]:
    """Return counts and times since the engine was made, its sizes, and the lossless level that
    holds."""
    parts, proposer = engine.parts, engine.proposer
    drafters = proposer.drafter_stats()
    return {
        **engine.engine_stats.as_dict(),
        "lossless": lossless_level(engine),
        "num_speculative_tokens": proposer.limit,
        "attention_backend": parts.attention_backend,
        "native_kernels": native_kernels(engine),
        "torch_products_from": torch_products_from(engine),
        "device": str(parts.device),
        "dtype": str(parts.target.model.config.dtype).removeprefix("torch."),
        "quantization": engine.config.quantization,
        "max_model_len": parts.max_model_len,
        "num_blocks": parts.num_blocks,
        "kv_cache_bytes": sum(r.kv.num_bytes for r in parts.runners.values() if r.kv),
        "num_free_blocks": engine.manager.num_free_blocks,
        "num_cuda_graphs": sum(r.graphs.num_graphs for r in parts.all_runners if r.graphs),
        "drafters": drafters,
        "planner": proposer.planner_stats(),
    }


def native_kernels(engine: LLMEngine) -> str | None:
    """Where the native CPU kernels that run the target come from, and what they were built for:
    "prebuilt, AVX2"; None where others run it."""
    attention = engine.parts.target.model.attention
    if not isinstance(attention, NativeAttention):
        return None
    return f"{attention.library.origin}, {attention.library.instructions}"


def torch_products_from(engine: LLMEngine) -> int | None:
    """Rows from which on passes of a natively run target take torch's products; None: none do, or
    the target does not run natively."""
    model = engine.parts.target.model
    return model.torch_products_from if isinstance(model, Decoder) else None


def lossless_level(engine: LLMEngine) -> str:
    """The strongest level of the lossless contract that holds: "bit", "path" (up to near ties) or
    "law"; "none" under a lossy rule. With `deterministic=False` bits are not promised, whatever was
    chosen on this machine."""
    rule = engine.proposer.rule
    if rule.promise != "tokens":
        return "law" if rule.promise == "distribution" else "none"
    if engine.config.deterministic is False or not engine.parts.target.is_deterministic:
        return "path"
    # A registered rule has the tokens drawn by torch, where plain steps may use kernels.
    return "bit" if rule.has_kernels else "path"
