"""Runs causal models of transformers whose attention goes through the attention interface.

The model runs on packed rows [1, N] with our attention in place of its own. No mask is built:
transformers makes none for an attention function that has no mask function of the same name.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from folospec.attention.base import AttentionBackend, LayerKV
from folospec.attention.metadata import AttentionMetadata
from folospec.models.base import ModelSpec, as_logits, check_aux_layers
from folospec.models.checkpoint import Checkpoint
from folospec.models.generation_config import read_eos_token_ids
from folospec.models.transformers_check import Comparison, own_logits, refusal, refusing
from folospec.models.transformers_probe import PROBE, STEP, Probe, probe

logger = logging.getLogger(__name__)

PAGED = "folospec_paged"
HIDDEN = "folospec_hidden"
"""Keyword argument by which the causal LM's head is run on hidden states that are there already."""


@dataclass(slots=True)
class Step:
    """What every layer of a step needs."""

    attention: AttentionBackend
    metadata: AttentionMetadata
    kv: Sequence[LayerKV]
    windows: tuple[int | None, ...]


def _paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function: [1, heads, N, size] each, to [1, N, heads, size]."""
    step: Step = kwargs[STEP]
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    output = step.attention.forward(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        step.kv[layer],
        step.metadata,
        scale=query.shape[3] ** -0.5 if scaling is None else scaling,
        sliding_window=step.windows[layer],
        softcap=softcap,
    )
    return output.unsqueeze(0).contiguous(), None


AttentionInterface.register(PAGED, _paged_attention)


class TransformersModel:
    """A transformers causal LM behind the `Model` interface.

    The hidden states are what the causal LM's inner model returns; the logits are computed by the
    causal LM's own forward with the inner model passed over, so that whatever it does to its logits
    (scaling, soft caps, biases) holds here too.
    """

    def __init__(
        self, model: Any, found: Probe, spec: ModelSpec, attention: AttentionBackend
    ) -> None:
        assert found.trunk is not None
        self.config = spec
        self.device: torch.device = model.device
        self._model = model
        self.attention = attention
        self._trunk = found.trunk
        self._layers = _decoder_layers(found, spec)
        self.deterministic = False  # torch's products sum by the number of rows
        self.supports_cuda_graphs = False  # its own code may do anything
        self._trunk.forward = _passing_over(self._trunk.forward, type(found.trunk_output))

    def forward(
        self,
        input_ids: Tensor,
        metadata: AttentionMetadata,
        kv: Sequence[LayerKV],
        aux_layers: tuple[int, ...] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """See `Model.forward`."""
        check_aux_layers(aux_layers, self.config.num_layers)
        step = Step(self.attention, metadata, kv, self.config.sliding_windows)
        with torch.no_grad(), self._tapping(aux_layers) as aux_hidden_states:
            output = self._trunk(
                input_ids=input_ids[None],
                position_ids=metadata.positions[None],
                use_cache=False,
                **{STEP: step},
            )
        return output.last_hidden_state[0], aux_hidden_states

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Model.logits`."""
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        with torch.no_grad():  # some look at the shape of their ids; the inner model is passed over
            output = self._model(input_ids=ids, use_cache=False, **{HIDDEN: hidden[None]})
        return as_logits(output.logits[0])

    @contextmanager
    def _tapping(self, aux_layers: tuple[int, ...]) -> Iterator[dict[int, Tensor]]:
        aux_hidden_states: dict[int, Tensor] = {}
        hooks = []

        def before(index: int) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
                aux_hidden_states[index] = (args[0] if args else kwargs["hidden_states"])[0]

            return hook

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            aux_hidden_states[self.config.num_layers] = (
                output[0] if isinstance(output, tuple) else output
            )[0]

        for index in aux_layers:
            if index < self.config.num_layers:
                layer = self._layers[index]
                hooks.append(layer.register_forward_pre_hook(before(index), with_kwargs=True))
            else:
                hooks.append(self._layers[-1].register_forward_hook(after))
        try:
            yield aux_hidden_states
        finally:
            for hook in hooks:
                hook.remove()


def load_transformers_model(
    checkpoint: Checkpoint,
    hf_config: Any,
    *,
    architecture: str,
    dtype: torch.dtype,
    device: torch.device,
    attention: Callable[[ModelSpec], AttentionBackend],
    block_size: int,
    max_model_len: int,
    trust_remote_code: bool,
) -> TransformersModel:
    """Load a checkpoint that transformers knows and check that paged attention can serve it.

    A few tokens run through the model's own forward and through ours, and must have the same
    logits.

    Args:
        attention: chooses the backend, once the model's facts are known.

    Raises:
        ValueError: the architecture is no causal LM or needs more than paged attention gives, or a
            tensor is missing or misshapen; the message names it.
    """
    model = _from_pretrained(
        checkpoint, config=hf_config, dtype=dtype, trust_remote_code=trust_remote_code
    )
    model.to(device).requires_grad_(False)
    _fix_rope(model, max_model_len)
    found = probe(model, architecture)
    assert found.logits is not None
    hidden = found.trunk_output.last_hidden_state
    vocab_size, windows = found.logits.shape[-1], tuple(call.window for call in found.calls)
    comparison = _compare(model, architecture, vocab_size, windows)
    with refusing(architecture, "its attention cannot be replaced"):
        model.set_attn_implementation(PAGED)
    spec = ModelSpec(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden.shape[-1],
        num_layers=len(found.calls),
        max_model_len=max_model_len,
        kv_shapes=tuple(call.kv_shape for call in found.calls),
        sliding_windows=windows,
        eos_token_ids=read_eos_token_ids(checkpoint.folder, hf_config, vocab_size),
        dtype=dtype,
    )
    loaded = TransformersModel(model, found, spec, attention(spec))
    with refusing(architecture, "its logits do not follow from its hidden states alone"):
        logits = loaded.logits(hidden[0])
    expected = as_logits(found.logits[0])
    if not torch.allclose(logits, expected, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise refusal(architecture, "its logits do not follow from its hidden states alone")
    comparison.check(loaded, block_size)
    return loaded


def _compare(
    model: Any, architecture: str, vocab_size: int, windows: tuple[int | None, ...]
) -> Comparison:
    """What the model's own forward makes of the texts of the comparison, by its plain attention."""
    with refusing(architecture, "its own attention does not run"):
        model.set_attn_implementation("eager")
    config = model.config.get_text_config(decoder=True)
    named = [getattr(config, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos")]
    special = [token for token in named if isinstance(token, int) and 0 <= token < vocab_size]
    own = partial(own_logits, model)
    return Comparison(own, architecture, vocab_size, windows, special, model.device)


def _from_pretrained(checkpoint: Checkpoint, **options: Any) -> Any:
    load: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
    folder = checkpoint.folder
    try:
        _check_outline(checkpoint, options["config"], options["trust_remote_code"])
        model, report = load(
            folder,
            attn_implementation=PROBE,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # it reads files, and may run the checkpoint's own code
        raise ValueError(f"{folder} does not load: {error}") from error
    for problem in ("missing_keys", "mismatched_keys"):
        if report[problem]:
            word, names = problem.removesuffix("_keys"), sorted(map(str, report[problem]))
            raise ValueError(f"{folder} has {word} tensors: {', '.join(names)}")
    if unexpected := sorted(map(str, report["unexpected_keys"])):
        logger.warning(
            "%s has tensors that the model does not use: %s", folder, ", ".join(unexpected)
        )
    return model


def _check_outline(checkpoint: Checkpoint, config: Any, trust_remote_code: bool) -> None:
    """Refuse weights that are no floating numbers, and a model that is far larger than its files:
    transformers would allocate it before it says that tensors are missing or misshapen."""
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    names = [name for name, _ in outline.named_parameters()]
    # A checkpoint of the inner model alone has its names without the first part.
    checkpoint.check_types([*names, *(name.partition(".")[2] for name in names)])
    asked = sum(parameter.numel() for parameter in outline.parameters())
    held = sum(math.prod(shape) for shape in checkpoint.shapes.values())
    if asked > 2 * held + 1000:  # tied matrices may be there once
        raise ValueError(f"its config asks for {asked} parameters, its files hold {held}")


def check_class(hf_config: Any, name: str, trust_remote_code: bool) -> None:
    """Refuse what needs no weights to be refused.

    Raises:
        ValueError: the architecture is no causal LM, keeps recurrent state, or does not let its
            attention be replaced.
    """
    if hf_config.is_encoder_decoder:
        raise refusal(name, "it has an encoder and cross attention")
    if trust_remote_code and getattr(hf_config, "auto_map", None):
        return
    if type(hf_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise refusal(name, "transformers has no causal language model for it")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)]
    if getattr(model_class, "_is_stateful", False):
        raise refusal(name, "it has recurrent state")
    if not getattr(model_class, "_supports_attention_backend", False):
        raise refusal(
            name, "its attention (ALiBi, for one) does not go through transformers' interface"
        )


def _fix_rope(model: nn.Module, max_model_len: int) -> None:
    """Choose the frequencies of `dynamic` and `longrope` once; see `folospec.models.rope`."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        by_layer = kinds if isinstance(kinds, dict) else {None: kinds}
        for layer_type, kind in list(by_layer.items()):
            if not isinstance(kind, str) or ("dynamic" not in kind and kind != "longrope"):
                continue
            prefix = "" if layer_type is None else f"{layer_type}_"
            inverse, scaling = ROPE_INIT_FUNCTIONS[kind](
                module.config, None, seq_len=max_model_len, layer_type=layer_type
            )
            getattr(module, f"{prefix}inv_freq").copy_(inverse)
            setattr(module, f"{prefix}attention_scaling", scaling)
            # A module of the default type never computes frequencies anew.
            if layer_type is None:
                module.rope_type = "default"  # type: ignore[assignment]
            else:
                by_layer[layer_type] = "default"


def _decoder_layers(found: Probe, spec: ModelSpec) -> list[nn.Module]:
    """The layers, by the list of modules that holds one attention each."""
    assert found.trunk is not None
    attention = found.attention_modules()
    for modules in found.trunk.modules():
        if isinstance(modules, nn.ModuleList) and len(modules) == spec.num_layers:
            layers = list(modules)
            pairs = zip(layers, attention, strict=True)
            if all(any(own is inner for inner in layer.modules()) for layer, own in pairs):
                return layers
    raise refusal(spec.architecture, "its layers are not a list of modules")


def _passing_over(forward: Callable[..., Any], output_class: type) -> Callable[..., Any]:
    """Wrap the inner model's forward: given hidden states it returns those."""

    def run(*args: Any, **kwargs: Any) -> Any:
        hidden = kwargs.pop(HIDDEN, None)
        if hidden is not None:
            return output_class(last_hidden_state=hidden)
        return forward(*args, **kwargs)

    return run
