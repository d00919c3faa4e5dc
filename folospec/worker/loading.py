"""Loads the models and drafters of an engine, and makes one pool of blocks for all their KV."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from folospec.config import EngineConfig
from folospec.models.generation_config import read_sampling_defaults
from folospec.models.loader import load_model, load_tokenizer, resolve_model
from folospec.models.self_draft import self_draft_of
from folospec.sampling_params import SamplingParams
from folospec.spec.acceptance import check_acceptance
from folospec.spec.drafter_handle import DrafterHandle
from folospec.spec.drafters.base import Drafter, check_drafter
from folospec.spec.guarded_runner import GuardedRunner, RunnerAccess
from folospec.speculative_config import AUTO
from folospec.worker.cuda import capture
from folospec.worker.drafter_loading import make_drafters, resolve_drafters
from folospec.worker.kv_cache import kv_bytes_per_block
from folospec.worker.memory import graph_bytes, kv_budget
from folospec.worker.model_runner import ModelRunner

logger = logging.getLogger(__name__)

_DEFAULT_KV_MEMORY = 1 << 30


@dataclass(slots=True)
class EngineComponents:
    """What an engine runs on. `runners` maps KV owners to runners; the target's owner is
    "target"."""

    device: torch.device
    tokenizer: Any
    target: ModelRunner
    handles: list[DrafterHandle]
    """The drafters, in their order."""
    runners: dict[str, ModelRunner]
    self_drafts: list[ModelRunner]
    """Runners of cheaper copies of the target, which read and write its KV."""
    max_model_len: int
    num_blocks: int
    attention_backend: str
    eos_token_ids: frozenset[int]
    """Every token that ends an output: the model's, and the tokenizer's own."""
    sampling_defaults: dict[str, Any]
    """Fields of `SamplingParams` that the model's generation config sets."""

    @property
    def default_sampling_params(self) -> SamplingParams:
        """Of a request that has none of its own."""
        return SamplingParams(**self.sampling_defaults)

    @property
    def drafters(self) -> list[Drafter]:
        return [handle.drafter for handle in self.handles]

    @property
    def all_runners(self) -> list[ModelRunner]:
        return [*self.runners.values(), *self.self_drafts]


def load_components(config: EngineConfig) -> EngineComponents:
    """Load everything the engine needs.

    Raises:
        ValueError: a model, tokenizer, drafter or size cannot be used; the message says why.
    """
    if config.speculative is not None:
        import folospec.spec.drafters  # noqa: F401 - registers the drafters that come with folospec

        for drafter in resolve_drafters(config):
            check_drafter(drafter.method)
        spec = config.speculative
        check_acceptance(spec.acceptance, allow_lossy=spec.allow_lossy, merge=spec.merge)
    loader = _Loader(config)
    handles = make_drafters(
        config,
        loader.target.model.config,
        loader.tokenizer,
        loader.load_draft_model,
        loader.self_draft_model,
    )
    loader.is_complete = True
    num_blocks = _num_blocks(config, loader, _num_logits(config, handles))
    for runner in loader.runners.values():
        runner.make_kv(num_blocks, config.block_size, loader.device)
    for self_draft in loader.self_drafts:
        self_draft.kv = loader.target.kv
    if not config.enforce_eager:
        _use_graphs(loader)
    return EngineComponents(
        loader.device,
        loader.tokenizer,
        loader.target,
        handles,
        loader.runners,
        loader.self_drafts,
        loader.max_model_len,
        num_blocks,
        loader.target.model.attention.name,
        _eos_token_ids(loader.target, loader.tokenizer),
        _sampling_defaults(config),
    )


def _sampling_defaults(config: EngineConfig) -> dict[str, Any]:
    if config.generation_config != AUTO:
        return {}
    return read_sampling_defaults(resolve_model(config.model))


def _eos_token_ids(target: ModelRunner, tokenizer: Any) -> frozenset[int]:
    """The model's end tokens and the tokenizer's: of some chat models only the tokenizer knows the
    token that ends a turn."""
    found = frozenset(target.model.config.eos_token_ids)
    own = getattr(tokenizer, "eos_token_id", None)
    if isinstance(own, int) and 0 <= own < target.vocab_size:
        return found | {own}
    return found


class _Loader:
    """Loads the tokenizer and the target, then whatever models the drafters ask for."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.device = _device(config.device)
        self.tokenizer = None
        if not config.skip_tokenizer_init:
            self.tokenizer = load_tokenizer(
                config.tokenizer or config.model, trust_remote_code=config.trust_remote_code
            )
        self.target = self._load(config.model, deterministic=config.deterministic is True)
        self.max_model_len = _max_model_len(config, self.target.model.config.max_model_len)
        self.runners = {"target": self.target}
        self.self_drafts: list[ModelRunner] = []
        self.is_complete = False
        """All drafters are made: no further model is loaded."""

    @property
    def graph_bytes(self) -> int:
        """What the CUDA graphs of all models may take."""
        runners = (*self.runners.values(), *self.self_drafts)
        return sum(graph_bytes(r.vocab_size) for r in runners if r.model.supports_cuda_graphs)

    def load_draft_model(self, access: RunnerAccess, path: str, owner: str) -> GuardedRunner:
        self._refuse_late()
        if not isinstance(owner, str) or owner in self.runners:
            raise ValueError(
                f"owner must be a name that none of {sorted(self.runners)} has, got {owner!r}"
            )
        runner = self._load(path)
        _check_draft_model(
            path, runner, self.config, self.target, self.max_model_len, self.tokenizer
        )
        self.runners[owner] = runner
        access.kv_owners.add(owner)
        return GuardedRunner(runner, runner.model.config, access, is_self_draft=False)

    def self_draft_model(self, access: RunnerAccess, **changes: Any) -> GuardedRunner:
        self._refuse_late()
        model = self_draft_of(self.target.model, **changes)
        budget = self.target.max_num_batched_tokens
        self_draft = ModelRunner(model, max_num_batched_tokens=budget)
        self.self_drafts.append(self_draft)
        return GuardedRunner(self_draft, model.config, access, is_self_draft=True)

    def _refuse_late(self) -> None:
        if self.is_complete:
            raise ValueError("a drafter must load its models while it is made")

    def _load(self, path: str, deterministic: bool = False) -> ModelRunner:
        config = self.config
        model = load_model(
            path,
            dtype=_dtype(config.dtype, self.device),
            device=self.device,
            attention=config.attention_backend,
            block_size=config.block_size,
            max_model_len=config.max_model_len,
            deterministic=deterministic,
            quantization=config.quantization,
            trust_remote_code=config.trust_remote_code,
        )
        kv_dtype = _kv_dtype(config.kv_cache_dtype)
        if kv_dtype not in (None, model.config.dtype) and not model.attention.converts_kv:
            raise ValueError(
                f"kv_cache_dtype must be 'auto' with attention_backend={model.attention.name!r}, "
                f"which reads KV of the model's type alone, got {config.kv_cache_dtype!r}"
            )
        return ModelRunner(
            model,
            max_num_batched_tokens=max(config.max_num_batched_tokens, config.max_num_seqs),
            batch_invariant_reference=deterministic and not model.deterministic,
            kv_dtype=kv_dtype,
        )


def _use_graphs(loader: _Loader) -> None:
    """Let every model that can be recorded run as CUDA graphs."""
    recorder = capture.recorder(loader.device)
    if recorder is None:
        return
    from folospec.kernels.gpu.sampling import DeviceSampling

    sampling = DeviceSampling()
    for runner in (*loader.runners.values(), *loader.self_drafts):
        if runner.model.supports_cuda_graphs and not runner.batch_invariant_reference:
            runner.use_graphs(recorder, sampling, verifies=runner is loader.target)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]  # torch may add all that it has kernels for
        raise ValueError(
            f"device must be 'auto' or a torch device of this machine, got {name!r}: {reason}"
        ) from None
    if device.type == "cuda":  # where kernels are launched, whatever tensors they are given
        device = torch.device(
            "cuda", torch.cuda.current_device() if device.index is None else device.index
        )
        torch.cuda.set_device(device)
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    return getattr(torch, name)


def _kv_dtype(name: str) -> torch.dtype | None:
    return None if name == "auto" else getattr(torch, name)


def _max_model_len(config: EngineConfig, limit: int) -> int:
    if config.max_model_len is None:
        return limit
    if config.max_model_len > limit:
        raise ValueError(
            f"max_model_len must be at most the model's {limit}, got {config.max_model_len}"
        )
    return config.max_model_len


def _check_draft_model(
    path: str,
    draft: ModelRunner,
    config: EngineConfig,
    target: ModelRunner,
    max_model_len: int,
    tokenizer: Any,
) -> None:
    """The draft model must read the target's tokens; sizes may differ by padding where the
    tokenizers are the same."""
    if draft.model.config.max_model_len < max_model_len:
        raise ValueError(
            f"draft model {path!r} takes {draft.model.config.max_model_len} tokens, fewer than "
            "max_model_len="
            f"{max_model_len}; lower max_model_len or choose another draft model"
        )
    if tokenizer is None:
        same = draft.vocab_size == target.vocab_size
    else:
        same = load_tokenizer(path).get_vocab() == tokenizer.get_vocab()
    if not same:
        raise ValueError(
            f"draft model {path!r} has another vocabulary ({draft.vocab_size} tokens) than the "
            "target "
            f"{config.model!r} ({target.vocab_size} tokens)"
        )


def _num_logits(config: EngineConfig, handles: list[DrafterHandle]) -> int:
    """Most rows of a step that want logits."""
    drafts = sum(handle.num_speculative_tokens for handle in handles)
    return min(config.max_num_batched_tokens, config.max_num_seqs * (1 + drafts))


def _num_blocks(config: EngineConfig, loader: _Loader, num_logits: int) -> int:
    if config.num_blocks is not None:
        return config.num_blocks
    runners = loader.runners.values()
    per_block = sum(
        kv_bytes_per_block(r.model.config.kv_shapes, config.block_size, r.kv_dtype) for r in runners
    )
    most = config.max_num_seqs * -(-loader.max_model_len // config.block_size)
    memory = config.kv_cache_memory
    if memory is None and loader.device.type == "cuda":
        budget = kv_budget(
            runners,
            loader.device,
            utilization=config.gpu_memory_utilization,
            block_size=config.block_size,
            num_logits=num_logits,
            reserve=0 if config.enforce_eager else loader.graph_bytes,
        )
        # What no sequence that runs can need keeps prefixes, and there is an end to their use.
        return max(1, min(2 * most, budget // per_block))
    if memory is None:
        return max(1, min(most, _DEFAULT_KV_MEMORY // per_block))
    if memory < per_block:
        raise ValueError(f"kv_cache_memory must hold one block of {per_block} bytes, got {memory}")
    return memory // per_block
