"""Holds every option of the engine, with its default and its bounds.

A config is frozen: what is found at run time lives elsewhere.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from folospec.option_checks import is_name, require, require_bool, require_choice, require_count
from folospec.option_names import ENGINE_NAMES, constructor_takes_names
from folospec.speculative_config import SpeculativeConfig

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
DTYPE_NAMES = {
    **{"half": "float16", "fp16": "float16", "bf16": "bfloat16", "float": "float32"},
    **{"fp32": "float32", "double": "float64", "fp64": "float64"},
}
KV_CACHE_DTYPES = ("auto", "float32", "bfloat16")
QUANTIZATIONS = ("int8", "fp8")
MAX_MULTI_STEP = 32
GENERATION_CONFIGS = ("auto", "folospec")
LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs")


@constructor_takes_names(ENGINE_NAMES)
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the engine runs and within which limits.

    Names of other engines are taken where they mean the same (`torch_dtype`); see `option_names`.

    Raises:
        ValueError: a value is out of range, or a name is unknown; the message names it and what is
            allowed.
    """

    model: str
    """Folder, hub id, or bundled name ("folospec-demo") of the target model; a path is taken
    too."""
    tokenizer: str | None = None
    """Where the tokenizer comes from, if not from `model`."""
    skip_tokenizer_init: bool = False
    """Run on token ids alone: no text in, no text out."""
    speculative: SpeculativeConfig | None = None
    """What `SpeculativeConfig.of` reads is taken too: a name, a list, a mapping."""
    dtype: str = "auto"
    """Type of weights; "auto" is the checkpoint's on a GPU and float32 on a CPU. A `torch.dtype` is
    taken too, and "half", "float", "fp16", "bf16", "fp32"."""
    kv_cache_dtype: str = "auto"
    """Type of the KV of target and drafters: "auto" is each model's own. "bfloat16" halves what
    float32 takes, in memory and in reading; the logits change a little, and with them the
    tokens."""
    quantization: str | None = None
    """Round the weights of the target and of draft models when they are loaded, with torchao: the
    matrices of the decoder layers become "int8" or "fp8", with one scale per output channel;
    embedding, output matrix and activations stay in `dtype`. The logits change, and with them the
    tokens; what speculation promises holds for the rounded target. "fp8" needs a GPU that has the
    type."""
    device: str = "auto"
    """A torch device; "auto" is "cuda" if there is one, else "cpu"."""
    block_size: int = 16
    """Tokens per KV block."""
    num_blocks: int | None = None
    """KV blocks in the pool. Default: what `kv_cache_memory` holds."""
    kv_cache_memory: int | None = None
    """Bytes for the KV of target and drafters together, if `num_blocks` is None. Default on a CPU:
    what `max_num_seqs` sequences of `max_model_len` need, at most 1 GiB. Default on a GPU: what
    `gpu_memory_utilization` leaves, at most twice that need."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory that weights, KV and the largest step may take together, where
    neither `num_blocks` nor `kv_cache_memory` is given. The largest step is run to see what it
    takes."""
    enforce_eager: bool = False
    """On a GPU, launch every kernel of a step by itself instead of replaying CUDA graphs: the same
    tokens, slower, and easier to look into."""
    multi_step: int | None = None
    """Tokens of plain decoding that are drawn on a GPU before the host looks at them; what follows
    the end of an output is thrown away. None is 8 where CUDA graphs run and nothing is drafted,
    else 1; only there it may be more than 1."""
    max_num_seqs: int = 64
    """Most sequences that run at once."""
    max_num_batched_tokens: int = 2048
    """Token budget of a step, draft tokens included."""
    max_model_len: int | None = None
    """Most tokens of prompt and output together. Default: the model's own limit."""
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    """Split prompts over steps to fill the token budget; off, a prompt runs in one step."""
    max_prefill_slowdown: float | None = 1.75
    """While other sequences decode, a step computes so much of prompts of more than 256 tokens that
    it takes about so many times as long as one without them. None: as much as the token budget
    allows."""
    attention_backend: str = "auto"
    deterministic: bool | None = None
    """Demand (True), waive (False), or take where it is free (None) logits that do not depend on
    the batch, bit for bit. Only where they are waived, measurements choose what computes them."""
    generation_config: str = "auto"
    """"auto": a request without sampling parameters has the defaults of the model's
    generation_config.json. "folospec": it has those of `SamplingParams`."""
    seed: int = 0
    """The seed from which requests without one derive theirs."""
    logprobs_mode: str = "raw_logprobs"
    """"raw_logprobs": log-softmax of the model's logits. "processed_logprobs": of the distribution
    sampled from."""
    strict_drafters: bool = False
    """Raise a drafter's exception; otherwise it loses its turn, and the event is logged and
    counted."""
    trust_remote_code: bool = False
    trace: str | os.PathLike[str] | None = None
    """File that every step is written to, as a line of JSON; one that exists is replaced."""

    def __post_init__(self) -> None:
        if isinstance(self.model, os.PathLike):
            object.__setattr__(self, "model", os.fspath(self.model))
        require(is_name(self.model), "model", self.model, "a path, a hub id or a name")
        object.__setattr__(self, "speculative", SpeculativeConfig.of(self.speculative))
        # A torch.dtype, or the short name of one, stands for its name.
        for name in ("dtype", "kv_cache_dtype"):
            given = str(getattr(self, name)).removeprefix("torch.")
            object.__setattr__(self, name, DTYPE_NAMES.get(given, given))
        require_choice("dtype", self.dtype, DTYPES)
        require_choice("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        ok = self.quantization is None or self.quantization in QUANTIZATIONS
        require(ok, "quantization", self.quantization, f"None, {' or '.join(QUANTIZATIONS)}")
        require_choice("generation_config", self.generation_config, GENERATION_CONFIGS)
        require_choice("logprobs_mode", self.logprobs_mode, LOGPROBS_MODES)
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens"):
            require_count(name, getattr(self, name))
        for name in ("num_blocks", "kv_cache_memory", "max_model_len"):
            if getattr(self, name) is not None:
                require_count(name, getattr(self, name))
        share = self.gpu_memory_utilization
        is_number = isinstance(share, (int, float)) and not isinstance(share, bool)
        ok = is_number and 0 < share <= 1
        require(ok, "gpu_memory_utilization", share, "a share above 0 and at most 1")
        slowdown = self.max_prefill_slowdown
        is_number = isinstance(slowdown, (int, float)) and not isinstance(slowdown, bool)
        ok = slowdown is None or (is_number and 1 < slowdown < math.inf)
        require(ok, "max_prefill_slowdown", slowdown, "None or a number above 1")
        is_count = isinstance(self.multi_step, int) and not isinstance(self.multi_step, bool)
        ok = self.multi_step is None or (is_count and 1 <= self.multi_step <= MAX_MULTI_STEP)
        require(ok, "multi_step", self.multi_step, f"None or an integer in 1..{MAX_MULTI_STEP}")
        require(
            self.num_blocks is None or self.kv_cache_memory is None,
            "kv_cache_memory",
            self.kv_cache_memory,
            f"None when num_blocks={self.num_blocks} is given",
        )
        require(
            self.deterministic is None or isinstance(self.deterministic, bool),
            "deterministic",
            self.deterministic,
            "None, True or False",
        )
        for name in ("skip_tokenizer_init", "enable_prefix_caching", "enable_chunked_prefill"):
            require_bool(name, getattr(self, name))
        for name in ("strict_drafters", "trust_remote_code", "enforce_eager"):
            require_bool(name, getattr(self, name))
        is_int = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        require(is_int, "seed", self.seed, "an integer")
        named = self.tokenizer is None or isinstance(self.tokenizer, str)
        require(named, "tokenizer", self.tokenizer, "None, a path, a hub id or a bundled name")
        ok = self.trace is None or is_name(self.trace) or isinstance(self.trace, os.PathLike)
        require(ok, "trace", self.trace, "None or the path of a file")
