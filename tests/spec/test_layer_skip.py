"""Which layers the drafter leaves out, and which options it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from folospec.spec.drafters.base import DrafterContext
from folospec.spec.drafters.layer_skip import LayerSkipDrafter
from folospec.spec.drafters.quantized import QuantizedDrafter
from folospec.speculative_config import DrafterConfig


@dataclass
class Target:
    vocab_size: int = 61
    num_layers: int = 6
    early_exit_layer: int | None = None


class Views:
    """Stands in for the engine: notes which view was asked for."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def __call__(self, **changes: Any) -> Any:
        self.asked.append(changes)
        return SimpleNamespace(vocab_size=61)


def make(drafter: Any, *, early_exit_layer: int | None = None, model: Any = None, **options: Any):
    """The drafter, and the view it asked for."""
    views = Views()
    context = DrafterContext(
        config=DrafterConfig(method="mine", model=model, options=options),
        name="mine",
        stream=0,
        acceptance="coupled",
        target=Target(early_exit_layer=early_exit_layer),
        encode=None,
        default_draft_model=None,
        load_draft_model=None,
        self_draft_model=views,
    )
    made = drafter(context)
    (asked,) = views.asked
    return made, asked


def layers(*numbers: int) -> frozenset[int]:
    return frozenset(numbers)


@pytest.mark.parametrize(
    ("early_exit_layer", "options", "skip_attention", "skip_mlp"),
    [
        (3, {}, layers(3, 4, 5), layers(3, 4, 5)),
        (3, {"exit_layer": 5}, layers(5), layers(5)),
        (None, {"exit_layer": 1}, layers(1, 2, 3, 4, 5), layers(1, 2, 3, 4, 5)),
        (None, {"skip_attention": [2, 4], "skip_mlp": [4]}, layers(2, 4), layers(4)),
        (3, {"skip_mlp": (0, 5)}, layers(), layers(0, 5)),
    ],
)
def test_the_options_say_what_is_left_out(early_exit_layer, options, skip_attention, skip_mlp):
    made, asked = make(LayerSkipDrafter, early_exit_layer=early_exit_layer, **options)
    assert asked == {"skip_attention": skip_attention, "skip_mlp": skip_mlp}
    assert made.stats()["skip_attention"] == sorted(skip_attention)
    assert made.stats()["skip_mlp"] == sorted(skip_mlp)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"no early_exit_layer.*'exit_layer' \(1\.\.5\).*layers \(0\.\.5\); got none"),
        ({"exit_layer": 0}, r"1\.\.5, got 0"),
        ({"exit_layer": 6}, r"1\.\.5, got 6"),
        ({"exit_layer": True}, r"1\.\.5, got True"),
        ({"exit_layer": 2.0}, r"1\.\.5, got 2\.0"),
        ({"exit_layer": 2, "skip_mlp": [1]}, "exit_layer excludes.*got exit_layer=2"),
        ({"exit_layer": 2, "skip_mlp": []}, "exit_layer excludes"),
        ({"skip_mlp": [6]}, r"skip_mlp must be a list.*0\.\.5, got \[6\]"),
        ({"skip_attention": [-1]}, r"skip_attention must be a list.*got \[-1\]"),
        ({"skip_attention": ["1"]}, "skip_attention must be a list"),
        ({"skip_attention": 1}, "skip_attention must be a list.*got 1"),
        ({"skip_attention": [], "skip_mlp": []}, "must name a layer"),
        ({"skip_attention": range(6)}, "must be a list"),
        ({"skip_attention": list(range(6)), "skip_mlp": list(range(6))}, "leave something"),
        ({"exit_layers": 3}, "drafter 'exit_layers'; did you mean 'exit_layer'"),
        ({"model": "a folder", "exit_layer": 3}, "has no model, got model='a folder'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(LayerSkipDrafter, **options)


def test_the_quantized_drafter_wants_int8_weights_and_no_model():
    assert make(QuantizedDrafter)[1] == {"quantized": True}
    with pytest.raises(ValueError, match="has no model"):
        make(QuantizedDrafter, model="a folder")
    with pytest.raises(ValueError, match="unknown option"):
        make(QuantizedDrafter, exit_layer=3)


@pytest.mark.parametrize("drafter", [LayerSkipDrafter, QuantizedDrafter])
def test_self_drafts_keep_no_kv_and_draw_chains_or_trees(drafter):
    exit_layer = {"exit_layer": 3} if drafter is LayerSkipDrafter else {}
    assert make(drafter, **exit_layer)[0].kv_owner is None
    assert make(drafter, **exit_layer)[0].num_speculative_tokens == 5
    assert make(drafter, tree=[3, 2], **exit_layer)[0].num_speculative_tokens == 9
