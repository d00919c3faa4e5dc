"""Runs a transformers model once on two tokens, to learn what its attention does.

No list of names: the model runs with an attention function that only writes down what it is given,
and with masks that can be asked what they would hide. Anything beyond scaling, a sliding window and
a soft cap is refused by the name of the architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from folospec.models.transformers_check import refusal, refusing

PROBE = "folospec_probe"
STEP = "folospec_step"
"""Keyword argument that carries our own object through the model to its attention."""
HARMLESS = frozenset(
    ("dropout", "position_ids", "position_embeddings", "output_attentions", "use_cache")
    + ("output_hidden_states", "output_router_logits", "past_key_values", "is_causal", "debug_io")
    + ("logits_to_keep",)
)
"""Keyword arguments of attention that change nothing in a causal forward without a cache."""
SINKS = ("s_aux", "sinks")
POINTS = tuple(sorted({max(0, 2**e + d) for e in range(21) for d in (-1, 0, 1)}))
"""Positions at which masks are compared: dense enough to notice any window or chunk."""


@dataclass(slots=True)
class AttentionCall:
    """What one attention module was called with."""

    module: nn.Module
    layer: int
    kv_shape: tuple[int, int]
    value_size: int
    window: int | None
    mask: Any
    extras: dict[str, Any]


@dataclass(slots=True)
class Probe:
    """What the run has shown."""

    calls: list[AttentionCall] = field(default_factory=list)
    trunk: nn.Module | None = None
    """The module that the causal LM calls for hidden states."""
    trunk_output: Any = None
    logits: Tensor | None = None

    def attention_modules(self) -> list[nn.Module]:
        """By layer."""
        return [call.module for call in self.calls]


@dataclass(frozen=True, slots=True)
class ProbedMask:
    """Stands for a mask that was never built."""

    sees: Callable[..., Tensor]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError("it computes with its attention mask")

    def __getitem__(self, place: Any) -> Any:
        raise TypeError("it computes with its attention mask")

    def matches(self, window: int | None) -> bool:
        """Whether it is the causal mask with this window."""
        points = {*POINTS, *(max(0, (window or 0) + d) for d in (-1, 0, 1))}
        row = torch.tensor(sorted(points))[:, None]
        key, zero = row.T, torch.tensor(0)
        expected = key <= row
        if window is not None:
            expected &= key > row - window
        return bool(torch.equal(self.sees(zero, zero, row, key).expand_as(expected), expected))


@torch.no_grad()
def probe(model: Any, name: str) -> Probe:
    """Run the model, loaded with attention PROBE, and check that paged attention can serve it.

    Args:
        model: a transformers causal LM.
        name: its architecture, for messages.

    Returns:
        One call per layer, in order; windows are those that the masks show.

    Raises:
        ValueError: it needs more than paged attention with scaling, window and soft cap gives.
    """
    found = Probe()
    hooks = [module.register_forward_hook(_note_trunk(found, model)) for module in model.modules()]
    tokens = torch.tensor([[0, 1]], device=model.device)
    try:
        with refusing(name, "its forward does not run on packed rows"):
            output = model(
                input_ids=tokens, position_ids=tokens.clone(), use_cache=False, **{STEP: found}
            )
            found.logits = output.logits
    finally:
        for hook in hooks:
            hook.remove()
    if found.trunk is None:
        raise refusal(name, "its hidden states are not to be had apart from its logits")
    found.calls.sort(key=lambda call: call.layer)
    for call in found.calls:
        _check_call(call, model.config.get_text_config(decoder=True), name)
    _check_layers(found, model.config.get_text_config(decoder=True), name)
    return found


def _note_trunk(found: Probe, model: nn.Module) -> Callable[..., None]:
    def hook(module: nn.Module, _args: Any, output: Any) -> None:
        # Outer modules finish last, so that the last one noted is the outermost.
        if module is not model and getattr(output, "last_hidden_state", None) is not None:
            found.trunk, found.trunk_output = module, output

    return hook


def _check_call(call: AttentionCall, config: Any, name: str) -> None:
    module = call.module
    for extra, value in call.extras.items():
        if extra in SINKS and value is not None:
            raise refusal(name, f"it has attention sinks ({extra!r})")
        if value is not None and not isinstance(value, bool) and extra not in HARMLESS:
            raise refusal(name, f"it passes {extra!r} to its attention")
    if getattr(module, "is_kv_shared_layer", False):
        raise refusal(name, "its layers share keys and values")
    if getattr(module, "is_cross_attention", False):
        raise refusal(name, "it has cross attention")
    if call.extras.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise refusal(name, "its attention is not causal")
    if call.value_size != call.kv_shape[1]:
        raise refusal(name, f"its heads have {call.kv_shape[1]} keys and {call.value_size} values")
    if isinstance(call.mask, ProbedMask):
        windows = (None, call.window, getattr(config, "sliding_window", None))
        with refusing(name, "its mask depends on more than positions"):
            matching = [window for window in windows if call.mask.matches(window)]
        if not matching:
            raise refusal(name, "its mask is more than causal with a sliding window")
        call.window = matching[0]
    elif call.mask is not None:
        raise refusal(name, "it builds an attention mask of its own")


def _check_layers(found: Probe, config: Any, name: str) -> None:
    layers = [call.layer for call in found.calls]
    expected = config.num_hidden_layers
    if len(set(layers)) < len(layers):
        raise refusal(name, "some of its layers attend more than once")
    if layers != list(range(expected)):
        raise refusal(
            name,
            f"{len(layers)} of its {expected} layers use the attention interface; the others are "
            "recurrent or have attention of their own",
        )


def _write_down(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of the probe: notes the call, returns zeros [1, N, heads, size]."""
    found = kwargs.pop(STEP, None)
    if found is None:
        raise TypeError("keyword arguments do not reach the attention")
    found.calls.append(
        AttentionCall(
            module=module,
            layer=int(module.layer_idx),  # type: ignore[arg-type]
            kv_shape=(key.shape[1], key.shape[3]),
            value_size=value.shape[3],
            window=sliding_window,
            mask=attention_mask,
            extras=kwargs,
        )
    )
    return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


def _mask_to_ask(*_args: Any, mask_function: Callable[..., Tensor], **_kwargs: Any) -> ProbedMask:
    return ProbedMask(mask_function)


AttentionInterface.register(PROBE, _write_down)
AttentionMaskInterface.register(PROBE, _mask_to_ask)
