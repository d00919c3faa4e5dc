"""Every knob of the engine, with its default and its bounds. Frozen: what is found at run time
lives elsewhere."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from folospec.option_names import DRAFTER_NAMES, ENGINE_NAMES, constructor_takes_names

AUTO = "auto"
"""As a drafter's name: those that are there, chosen when the engine is made."""
ACCEPTANCE_RULES = ("coupled", "rejection", "block")
"""Those that come with folospec; others are registered (`spec.verify.register_acceptance_rule`)."""
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
DTYPE_NAMES = {
    **{"half": "float16", "fp16": "float16", "bf16": "bfloat16", "float": "float32"},
    **{"fp32": "float32", "double": "float64", "fp64": "float64"},
}
KV_CACHE_DTYPES = ("auto", "float32", "bfloat16")
QUANTIZATIONS = ("int8", "fp8")
MAX_RUN_AHEAD = 32
GENERATION_CONFIGS = ("auto", "folospec")
LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs")


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterConfig:
    """One drafter: its name, its model if it has one, and its own options.

    Raises:
        ValueError: a value is out of range; the message names it and what is allowed.
    """

    method: str
    """Name of a registered drafter: "ngram", "suffix", "draft_model", or one of your own. "auto" is
    suffix, and the draft model that `model` names or that comes with the target."""
    model: str | None = None
    """Path, hub id or bundled name of the draft model, for the drafters that have one."""
    num_speculative_tokens: int | None = None
    """Most draft tokens per sequence and step, the nodes of a tree; None is the drafter's own
    default."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The drafter's own options; it refuses those that it does not know."""

    def __post_init__(self) -> None:
        _require(_is_name(self.method), "method", self.method, "the name of a drafter")
        _require(
            self.model is None or _is_name(self.model),
            "model",
            self.model,
            "None, a path, a hub id or a bundled name",
        )
        if self.num_speculative_tokens is not None:
            _require_count("num_speculative_tokens", self.num_speculative_tokens)
        _require(isinstance(self.options, Mapping), "options", self.options, "a mapping")
        if self.method == AUTO:
            _require(not self.options, "options", dict(self.options), "empty with method='auto'")

    @classmethod
    def of(cls, value: str | Mapping[str, Any] | DrafterConfig) -> DrafterConfig:
        """Read a drafter's name, "NAME:MODEL", or a mapping with a "method"; keys that are no field
        of this class, nor another engine's name for one (`option_names`), go to the drafter as its
        `options`."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            method, colon, model = value.strip().partition(":")
            return cls(method=method, model=model if colon else None)
        if not isinstance(value, Mapping):
            raise ValueError(f"a drafter must be a name or a mapping, got {value!r}")
        own = [f.name for f in fields(cls)]
        rest = [key for key in value if key not in (*own, *DRAFTER_NAMES.same)]
        value = DRAFTER_NAMES.own(value, [*own, *rest])
        if "method" not in value:
            raise ValueError(
                "a drafter needs a 'method', such as 'ngram' or 'draft_model', got the keys "
                f"{sorted(value)}"
            )
        given = value.get("options", {})
        _require(isinstance(given, Mapping), "options", given, "a mapping")
        options = {**given, **{key: value[key] for key in rest}}
        return cls(
            **{k: v for k, v in value.items() if k in own and k != "options"}, options=options
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """Which drafters propose tokens, and by which rule they are accepted.

    Raises:
        ValueError: a value is out of range; the message names it and what is allowed.
    """

    drafters: tuple[DrafterConfig, ...]
    """In order of precedence: for each sequence the first that has something to say drafts."""
    merge: bool = False
    """Ask all of them, and merge their proposals into one tree."""
    acceptance: str = "coupled"
    """"coupled": the same tokens as without speculation. "rejection" and "block": the same
    distribution. Or the name of a registered rule; the engine looks it up."""
    allow_lossy: bool = False
    """Allow a rule that promises neither tokens nor distribution."""
    adaptive: bool | None = None
    """Let the planner decide, in every step, who is drafted for and how much, nobody and nothing
    included: whatever gives most tokens per second. False drafts as much as is allowed, always.
    None is True with "auto", and False with drafters of the user's choice."""

    def __post_init__(self) -> None:
        ok = isinstance(self.drafters, tuple) and len(self.drafters) > 0
        ok = ok and all(isinstance(drafter, DrafterConfig) for drafter in self.drafters)
        _require(ok, "drafters", self.drafters, "at least one drafter, each a DrafterConfig")
        _require_bool("merge", self.merge)
        ok = self.adaptive is None or isinstance(self.adaptive, bool)
        _require(ok, "adaptive", self.adaptive, "None, True or False")
        methods = [drafter.method for drafter in self.drafters]
        ok = AUTO not in methods or (len(methods) == 1 and self.adaptive is not False)
        _require(ok, "drafters", methods, "'auto' alone, with adaptive=None or True")
        _require(_is_name(self.acceptance), "acceptance", self.acceptance, "the name of a rule")
        _require_bool("allow_lossy", self.allow_lossy)

    @property
    def is_adaptive(self) -> bool:
        """Whether the planner decides."""
        if self.adaptive is None:
            return any(drafter.method == AUTO for drafter in self.drafters)
        return self.adaptive

    @property
    def label(self) -> str:
        """The drafters' names: "ngram,draft_model", or "ngram+draft_model" if they are merged."""
        return ("+" if self.merge else ",").join(drafter.method for drafter in self.drafters)

    @classmethod
    def of(
        cls, value: None | str | Mapping[str, Any] | Sequence[Any] | SpeculativeConfig
    ) -> SpeculativeConfig | None:
        """Read what users pass as `speculative=`, in Python or on the command line: None, a text, a
        list of drafters in order of precedence, a mapping, or a config.

        A mapping describes one drafter by its "method", or several by a list of "drafters"; each of
        them is a name or a mapping of its own. Keys that neither class has go to the drafter as its
        `options`. So these are the same::

            "ngram", ["ngram"], {"method": "ngram"}, {"drafters": ["ngram"]}

        A text is a name, NAME:MODEL, several of these with commas between them, or a list or
        mapping in JSON. So these are the same, too::

            "suffix,draft_model:small", ["suffix", {"method": "draft_model", "model": "small"}]

        "auto", or "auto:MODEL", takes the drafters that are there.

        Raises:
            ValueError: the value is none of these; the message names it and what is allowed.
        """
        if isinstance(value, str):
            value = _read_text(value)
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, (list, tuple)):
            return cls(drafters=tuple(DrafterConfig.of(item) for item in value))
        if not isinstance(value, Mapping):
            raise ValueError(
                "speculative must be None, a name, a list, a mapping or a SpeculativeConfig, "
                f"got {value!r}"
            )
        shared = {f.name for f in fields(cls)} - {"drafters"}
        own = {k: v for k, v in value.items() if k in shared}
        rest = {k: v for k, v in value.items() if k not in shared}
        if "drafters" not in rest:
            return cls(drafters=(DrafterConfig.of(rest),), **own)
        if set(rest) != {"drafters"}:
            raise ValueError(
                f"with 'drafters', {sorted(set(rest) - {'drafters'})} must be set for each of them"
            )
        drafters = rest["drafters"]
        _require(isinstance(drafters, (list, tuple)), "drafters", drafters, "a list")
        return cls(drafters=tuple(DrafterConfig.of(item) for item in drafters), **own)


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
    run_ahead: int | None = None
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
        _require(_is_name(self.model), "model", self.model, "a path, a hub id or a name")
        object.__setattr__(self, "speculative", SpeculativeConfig.of(self.speculative))
        # A torch.dtype, or the short name of one, stands for its name.
        for name in ("dtype", "kv_cache_dtype"):
            given = str(getattr(self, name)).removeprefix("torch.")
            object.__setattr__(self, name, DTYPE_NAMES.get(given, given))
        _require_choice("dtype", self.dtype, DTYPES)
        _require_choice("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        ok = self.quantization is None or self.quantization in QUANTIZATIONS
        _require(ok, "quantization", self.quantization, f"None, {' or '.join(QUANTIZATIONS)}")
        _require_choice("generation_config", self.generation_config, GENERATION_CONFIGS)
        _require_choice("logprobs_mode", self.logprobs_mode, LOGPROBS_MODES)
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens"):
            _require_count(name, getattr(self, name))
        for name in ("num_blocks", "kv_cache_memory", "max_model_len"):
            if getattr(self, name) is not None:
                _require_count(name, getattr(self, name))
        share = self.gpu_memory_utilization
        is_number = isinstance(share, (int, float)) and not isinstance(share, bool)
        ok = is_number and 0 < share <= 1
        _require(ok, "gpu_memory_utilization", share, "a share above 0 and at most 1")
        slowdown = self.max_prefill_slowdown
        is_number = isinstance(slowdown, (int, float)) and not isinstance(slowdown, bool)
        ok = slowdown is None or (is_number and 1 < slowdown < math.inf)
        _require(ok, "max_prefill_slowdown", slowdown, "None or a number above 1")
        is_count = isinstance(self.run_ahead, int) and not isinstance(self.run_ahead, bool)
        ok = self.run_ahead is None or (is_count and 1 <= self.run_ahead <= MAX_RUN_AHEAD)
        _require(ok, "run_ahead", self.run_ahead, f"None or an integer in 1..{MAX_RUN_AHEAD}")
        _require(
            self.num_blocks is None or self.kv_cache_memory is None,
            "kv_cache_memory",
            self.kv_cache_memory,
            f"None when num_blocks={self.num_blocks} is given",
        )
        _require(
            self.deterministic is None or isinstance(self.deterministic, bool),
            "deterministic",
            self.deterministic,
            "None, True or False",
        )
        for name in ("skip_tokenizer_init", "enable_prefix_caching", "enable_chunked_prefill"):
            _require_bool(name, getattr(self, name))
        for name in ("strict_drafters", "trust_remote_code", "enforce_eager"):
            _require_bool(name, getattr(self, name))
        is_int = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        _require(is_int, "seed", self.seed, "an integer")
        named = self.tokenizer is None or isinstance(self.tokenizer, str)
        _require(named, "tokenizer", self.tokenizer, "None, a path, a hub id or a bundled name")
        ok = self.trace is None or _is_name(self.trace) or isinstance(self.trace, os.PathLike)
        _require(ok, "trace", self.trace, "None or the path of a file")


def _read_text(text: str) -> Any:
    """Turn the text form of `speculative` into a list of drafters or what its JSON holds."""
    if not text.lstrip().startswith(("{", "[")):
        return text.split(",")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"speculative is not valid JSON: {error}; got {text!r}") from None


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _require_count(name: str, value: object) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    _require(ok, name, value, "an integer of at least 1")


def _require_bool(name: str, value: object) -> None:
    _require(isinstance(value, bool), name, value, "True or False")


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    _require(value in choices, name, value, f"one of {', '.join(choices)}")
