"""Drafts with some of the target's own layers (LayerSkip, arXiv 2404.16710).

Draft & Verify (arXiv 2309.08168) skips sublayers.

    exit_layer=3       layers 0, 1 and 2, then the final norm and the output matrix: LayerSkip's
                       early exit. It wants a target that was trained for it, with layer dropout and
                       a loss at the exit.
    skip_attention=[2], skip_mlp=[1, 4]
                       some halves of some layers are left out, as in Draft & Verify: any target, no
                       training.

A skip set is chosen once per target, before serving: draft with candidate sets on a few typical
texts, and keep the one that gives the most tokens per second. Draft & Verify searches them by
Bayesian optimisation; the first layers and the last can seldom be spared.

There is no KV to keep. The drafter reads the target's own KV and writes at the slots of the root
and behind, where verification writes all layers of all rows again (see `quantized`). For an early
exit the rows of the first layers are what the target computes too, and LayerSkip's own verifier
starts from them ("KVQ cache"). Here it starts from the tokens, whichever drafter they come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from folospec.spec.drafters.base import DrafterContext
from folospec.spec.drafters.model_drafter import DRAFTING_OPTIONS, ModelDrafter


class LayerSkipDrafter(ModelDrafter):
    """Drafts with the target, less some of its layers.

    Options, besides `DRAFTING_OPTIONS`:
        exit_layer: how many layers draft, from the first on. Default: what the target was trained
            for, if its config has an `early_exit_layer`.
        skip_attention, skip_mlp: lists of layers, counted from 0, whose attention or MLP is left
            out. They exclude `exit_layer`.

    Raises:
        ValueError: an option is wrong, nothing or everything is left out, or the target cannot be
            copied.
    """

    def __init__(self, context: DrafterContext) -> None:
        context.refuse_model()
        options = context.read_options(
            {**DRAFTING_OPTIONS, "exit_layer": None, "skip_attention": None, "skip_mlp": None}
        )
        self.skip_attention, self.skip_mlp = _skipped(options, context)
        runner = context.self_draft_model(
            skip_attention=self.skip_attention, skip_mlp=self.skip_mlp
        )
        super().__init__(context, options, runner)

    def stats(self) -> dict[str, Any]:
        return {
            **super().stats(),
            "skip_attention": sorted(self.skip_attention),
            "skip_mlp": sorted(self.skip_mlp),
        }


def _skipped(
    options: Mapping[str, Any], context: DrafterContext
) -> tuple[frozenset[int], frozenset[int]]:
    """The layers without attention, and those without MLP."""
    num_layers, exit_layer = context.target.num_layers, options["exit_layer"]
    sets = {name: options[name] for name in ("skip_attention", "skip_mlp")}
    if sets["skip_attention"] is None and sets["skip_mlp"] is None:
        trained_for = context.target.early_exit_layer
        behind = _behind_exit(trained_for if exit_layer is None else exit_layer, num_layers)
        return behind, behind
    if exit_layer is not None:
        raise ValueError(
            f"exit_layer excludes skip_attention and skip_mlp, got exit_layer={exit_layer!r} and "
            f"{sets}"
        )
    attention = _read_layers("skip_attention", sets["skip_attention"], num_layers)
    mlp = _read_layers("skip_mlp", sets["skip_mlp"], num_layers)
    if not attention | mlp:
        raise ValueError(f"skip_attention and skip_mlp must name a layer, got {sets}")
    if len(attention & mlp) == num_layers:
        raise ValueError(f"skip_attention and skip_mlp must leave something of a layer, got {sets}")
    return attention, mlp


def _behind_exit(exit_layer: object, num_layers: int) -> frozenset[int]:
    if exit_layer is None:
        raise ValueError(
            "the target's config has no early_exit_layer, so the layer_skip drafter needs "
            f"'exit_layer' (1..{num_layers - 1}), or lists 'skip_attention' and 'skip_mlp' of "
            f"layers (0..{num_layers - 1}); got none of them"
        )
    if not _is_int(exit_layer) or not 1 <= exit_layer < num_layers:
        raise ValueError(
            f"exit_layer must be an integer in 1..{num_layers - 1}, got {exit_layer!r}"
        )
    return frozenset(range(exit_layer, num_layers))


def _read_layers(name: str, layers: object, num_layers: int) -> frozenset[int]:
    if layers is None:
        return frozenset()
    if not isinstance(layers, (list, tuple, set, frozenset)) or not all(
        _is_int(layer) and 0 <= layer < num_layers for layer in layers
    ):
        raise ValueError(
            f"{name} must be a list of layers, integers in 0..{num_layers - 1}, got {layers!r}"
        )
    return frozenset(layers)


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
