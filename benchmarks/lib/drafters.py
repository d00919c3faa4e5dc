"""Who takes part in the benchmarks of acceptance, with their settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import folospec.spec.drafters  # noqa: F401 - registers those that come with folospec
from benchmarks.lib.tasks import Task
from folospec.models.loader import BUNDLED_DRAFTS
from folospec.spec.drafters.base import check_drafter
from folospec.speculative_config import SpeculativeConfig

COPY_BUDGET = 16
"""Draft tokens of `ngram`, whose own default is short: a copied run may be long, and a draft costs
next to nothing."""

MODEL_FREE: dict[str, Any] = {
    "ngram": {"method": "ngram", "num_speculative_tokens": COPY_BUDGET},
    "ngram tree": {"method": "ngram", "num_speculative_tokens": COPY_BUDGET, "num_matches": 4},
    "suffix": {"method": "suffix"},
    "nasd": {"method": "nasd"},
    "prediction": {"method": "prediction"},
    "token_recycling": {"method": "token_recycling"},
    "lookahead": {"method": "lookahead"},
    "prediction+suffix": {"drafters": ["prediction", "suffix"], "merge": True},
    "suffix+token_recycling": {"drafters": ["suffix", "token_recycling"], "merge": True},
}
WITH_MODEL: dict[str, Any] = {
    "draft_model": {"method": "draft_model", "num_speculative_tokens": 5},
    "draft_model, 3 deep": {"method": "draft_model", "num_speculative_tokens": 3},
    "draft_model [3, 2, 1]": {"method": "draft_model", "tree": [3, 2, 1]},
    "draft_model sequoia": {"method": "draft_model", "tree": "sequoia"},
    "draft_model dynamic": {"method": "draft_model", "tree": "dynamic"},
    "ouroboros": {"method": "ouroboros"},
    "quantized": {"method": "quantized"},
    "layer_skip": {"method": "layer_skip"},
    "suffix, draft_model": [{"method": "suffix", "min_score": 2.0}, "draft_model"],
    "suffix+draft_model": {"drafters": ["suffix", "draft_model"], "merge": True},
}
CONTESTANTS: Mapping[str, Any] = {**MODEL_FREE, **WITH_MODEL}
"""Name -> what `LLM(speculative=)` takes."""
COPIERS = {
    "ngram": {"context"},
    "ngram tree": {"context"},
    "suffix": {"context"},
    "prediction": {"prediction"},
    "prediction+suffix": {"context", "prediction"},
}
"""Those whose drafts are copies, and so bounded by an ideal copier, with what they copy from: the
context (prompt and output so far), or the prediction that came with the request."""
NEED_PREDICTION = frozenset({"prediction", "prediction+suffix"})


def takes_part(name: str, task: Task) -> bool:
    """Whether a contestant can be measured on a task. One that runs a model through the request's
    own options would be steered as the target is; one that reads predictions needs some."""
    if task.steered and name in WITH_MODEL:
        return False
    return name not in NEED_PREDICTION or any(item.prediction_token_ids for item in task.items)


def choose(names: str | None, model: str) -> dict[str, Any]:
    """Read a list of contestants, "; " between them, since a name may have a comma. None is all
    that `model` has: a draft model comes with the bundled target alone.

    Raises:
        ValueError: a name is none of a contestant, or a contestant's drafter is not registered.
    """
    if names is None:
        wanted = list(CONTESTANTS if model in BUNDLED_DRAFTS else MODEL_FREE)
    else:
        wanted = [name.strip() for name in names.split(";")]
    for name in wanted:
        if name not in CONTESTANTS:
            raise ValueError(f"drafters must be of {'; '.join(CONTESTANTS)}, got {name!r}")
        config = SpeculativeConfig.of(CONTESTANTS[name])
        assert config is not None
        for drafter in config.drafters:
            check_drafter(drafter.method)
    return {name: CONTESTANTS[name] for name in wanted}
