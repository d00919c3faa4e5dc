"""folospec is a paged-KV mini serving engine with lossless speculative decoding.

    from folospec import LLM, SamplingParams

Names are imported when they are first used, so that `folospec.core` runs without torch and `import
folospec` without transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from folospec.config import EngineConfig
    from folospec.core.sequence import Sequence, SequenceGroup
    from folospec.core.token_tree import TokenTree, Verdict
    from folospec.engine.llm import LLM
    from folospec.engine.llm_engine import LLMEngine
    from folospec.errors import EngineBrokenError, EngineClosedError, RequestError
    from folospec.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from folospec.sampling_params import SamplingParams
    from folospec.spec.acceptance import AcceptanceRule, register_acceptance_rule
    from folospec.spec.drafters.base import (
        Drafter,
        DrafterContext,
        DrafterNeeds,
        DraftRequest,
        StepResult,
        register_drafter,
    )
    from folospec.spec.proposal import Proposal
    from folospec.speculative_config import SpeculativeConfig

__version__ = "0.2.0"

_HOMES = {
    "LLM": "folospec.engine.llm",
    "LLMEngine": "folospec.engine.llm_engine",
    "EngineConfig": "folospec.config",
    "SpeculativeConfig": "folospec.speculative_config",
    "SamplingParams": "folospec.sampling_params",
    "EngineBrokenError": "folospec.errors",
    "EngineClosedError": "folospec.errors",
    "RequestError": "folospec.errors",
    "CompletionOutput": "folospec.outputs",
    "Logprob": "folospec.outputs",
    "RequestMetrics": "folospec.outputs",
    "RequestOutput": "folospec.outputs",
    "Sequence": "folospec.core.sequence",
    "SequenceGroup": "folospec.core.sequence",
    "TokenTree": "folospec.core.token_tree",
    "Drafter": "folospec.spec.drafters.base",
    "DrafterContext": "folospec.spec.drafters.base",
    "DraftRequest": "folospec.spec.drafters.base",
    "DrafterNeeds": "folospec.spec.drafters.base",
    "StepResult": "folospec.spec.drafters.base",
    "register_drafter": "folospec.spec.drafters.base",
    "Proposal": "folospec.spec.proposal",
    "AcceptanceRule": "folospec.spec.acceptance",
    "Verdict": "folospec.core.token_tree",
    "register_acceptance_rule": "folospec.spec.acceptance",
}

__all__ = [
    "AcceptanceRule",
    "CompletionOutput",
    "DraftRequest",
    "Drafter",
    "DrafterContext",
    "EngineBrokenError",
    "EngineClosedError",
    "EngineConfig",
    "LLM",
    "LLMEngine",
    "Logprob",
    "DrafterNeeds",
    "StepResult",
    "Proposal",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "Sequence",
    "SequenceGroup",
    "SpeculativeConfig",
    "TokenTree",
    "Verdict",
    "register_acceptance_rule",
    "register_drafter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
