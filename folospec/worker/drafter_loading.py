"""Makes the drafters of an engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from folospec.config import EngineConfig
from folospec.models.base import ModelSpec
from folospec.models.loader import BUNDLED_DRAFTS
from folospec.spec.drafter_handle import DrafterHandle, hold
from folospec.spec.drafters.base import DrafterContext, make_drafter
from folospec.spec.guarded_runner import GuardedRunner, RunnerAccess
from folospec.speculative_config import AUTO, DrafterConfig

_AUTO_DRAFT_TOKENS = 8
"""Most of a draft model under "auto"; how many of them pay is found while it runs."""


def resolve_drafters(config: EngineConfig) -> tuple[DrafterConfig, ...]:
    """The drafters that are asked for. "auto" is suffix, which any target can have, and a draft
    model if one is named or comes with the target."""
    if config.speculative is None:
        return ()
    drafters = config.speculative.drafters
    if drafters[0].method != AUTO:
        return drafters
    wanted = drafters[0].num_speculative_tokens
    model = drafters[0].model or BUNDLED_DRAFTS.get(config.model)
    chosen = [DrafterConfig(method="suffix", num_speculative_tokens=wanted)]
    if model is not None:
        most = wanted or _AUTO_DRAFT_TOKENS
        draft = DrafterConfig(method="draft_model", model=model, num_speculative_tokens=most)
        chosen.append(draft)
    return tuple(chosen)


def make_drafters(
    config: EngineConfig,
    target: ModelSpec,
    tokenizer: Any,
    load_draft_model: Callable[..., GuardedRunner],
    self_draft_model: Callable[..., GuardedRunner],
) -> list[DrafterHandle]:
    """Make the drafters in their order; of several with one method the later ones are numbered.

    Args:
        load_draft_model: loads a model for whoever has the access that it is given first.
        self_draft_model: makes a cheaper copy of the target for whoever has the access.

    Raises:
        ValueError: a drafter cannot be made with its options.
    """
    handles: list[DrafterHandle] = []
    counts: Counter[str] = Counter()
    speculative = config.speculative
    for stream, drafter in enumerate(resolve_drafters(config)):
        counts[drafter.method] += 1
        number, access = counts[drafter.method], RunnerAccess()
        context = DrafterContext(
            config=drafter,
            name=drafter.method if number == 1 else f"{drafter.method}-{number}",
            stream=stream,
            acceptance=speculative.acceptance if speculative else "coupled",
            target=target,
            encode=tokenizer and partial(tokenizer.encode, add_special_tokens=False, verbose=False),
            default_draft_model=BUNDLED_DRAFTS.get(config.model),
            load_draft_model=partial(load_draft_model, access),
            self_draft_model=partial(self_draft_model, access),
        )
        made = make_drafter(context)
        handles.append(hold(made, context.name, drafter, access, target.num_layers))
    return handles
