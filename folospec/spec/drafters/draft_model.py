"""Drafts with a smaller model of the same vocabulary (arXiv 2211.17192, arXiv 2302.01318).

The method is by Leviathan et al. and Chen et al.

The draft model has its own KV tensors on the target's block tables and its own progress per
sequence. Before it drafts it runs whatever committed tokens it has not seen: the last one or two as
a rule, more after it was off, preempted, or met a cached prefix.

    tokens      t0 t1 t2 t3 t4 | root       progress 3: t3, t4 and the root are caught up in one
    pass, draft KV     *  *  *  .  . |  .         then x1, x2, ... are fed one at a time at the
    slots after the root; drafts                     |  x1 x2 x3  x3 is proposed and never fed, so
    it has no draft KV.
"""

from __future__ import annotations

from folospec.spec.drafters.base import DrafterContext
from folospec.spec.drafters.model_drafter import DRAFTING_OPTIONS, ModelDrafter


def find_draft_model(context: DrafterContext) -> str:
    """The model that the user names, or else the one that comes with the target.

    Raises:
        ValueError: there is neither.
    """
    model = context.config.model or context.default_draft_model
    if model is None:
        raise ValueError(
            f"speculative method {context.config.method!r} needs the draft model's path or "
            "name as 'model', got None"
        )
    return model


class DraftModelDrafter(ModelDrafter):
    """Drafts with a causal language model that has the target's vocabulary."""

    def __init__(self, context: DrafterContext) -> None:
        model = find_draft_model(context)
        self.name = context.name
        options = context.read_options(DRAFTING_OPTIONS)
        runner = context.load_draft_model(model, self.kv_owner)
        super().__init__(context, options, runner)

    @property
    def kv_owner(self) -> str:
        return self.name
