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
    components, proposer = engine.components, engine.proposer
    drafters = proposer.drafter_stats()
    return {
        **engine.engine_stats.as_dict(),
        "lossless": lossless_level(engine),
        "num_speculative_tokens": proposer.limit,
        "attention_backend": components.attention_backend,
        "native_kernels": native_kernels(engine),
        "torch_products_from": torch_products_from(engine),
        "device": str(components.device),
        "dtype": str(components.target.model.config.dtype).removeprefix("torch."),
        "quantization": engine.config.quantization,
        "max_model_len": components.max_model_len,
        "num_blocks": components.num_blocks,
        "kv_cache_bytes": sum(r.kv.num_bytes for r in components.runners.values() if r.kv),
        "num_free_blocks": engine.manager.num_free_blocks,
        "num_cuda_graphs": sum(r.graphs.num_graphs for r in components.all_runners if r.graphs),
        "drafters": drafters,
        "planner": proposer.planner_stats(),
    }


def native_kernels(engine: LLMEngine) -> str | None:
    """Where the native CPU kernels that run the target come from, and what they were built for:
    "prebuilt, AVX2"; None where others run it."""
    attention = engine.components.target.model.attention
    if not isinstance(attention, NativeAttention):
        return None
    return f"{attention.library.origin}, {attention.library.instructions}"


def torch_products_from(engine: LLMEngine) -> int | None:
    """Rows from which on passes of a natively run target take torch's products; None: none do, or
    the target does not run natively."""
    model = engine.components.target.model
    return model.torch_products_from if isinstance(model, Decoder) else None


def lossless_level(engine: LLMEngine) -> str:
    """The strongest level of the lossless contract that holds: "bitwise", "tokens" (up to near
    ties) or "distribution"; "none" under a lossy rule. With `deterministic=False` bits are not
    promised, whatever was chosen on this machine."""
    rule = engine.proposer.rule
    if rule.promise != "tokens":
        return "distribution" if rule.promise == "distribution" else "none"
    if engine.config.deterministic is False or not engine.components.target.is_deterministic:
        return "tokens"
    # A registered rule has the tokens drawn by torch, where plain steps may use kernels.
    return "bitwise" if rule.has_kernels else "tokens"
