"""A view of a decoder computes the target less what it leaves out, on the target's own KV."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from paged_runner import PagedRunner, all_logits
from tiny_checkpoints import SHAPE, load, random_prompts, reference_logits, save_random

from folospec.attention.metadata import AttentionMetadata
from folospec.kernels.torch_ops import Int8Weight
from folospec.models.decoder import Decoder
from folospec.models.self_draft import self_draft_of

CONFIGS = {
    "llama, tied, biases": lambda: hf.LlamaConfig(
        **SHAPE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "qwen3, layer types": lambda: hf.Qwen3Config(
        **SHAPE,
        head_dim=8,
        use_sliding_window=True,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}
SKIPS: dict[str, dict[str, frozenset[int]]] = {
    "an attention": {"skip_attention": frozenset({1})},
    "an MLP": {"skip_mlp": frozenset({0})},
    "halves of two layers": {"skip_attention": frozenset({0}), "skip_mlp": frozenset({2})},
    "a layer": {"skip_attention": frozenset({1}), "skip_mlp": frozenset({1})},
    "exit after 1": {"skip_attention": frozenset({1, 2}), "skip_mlp": frozenset({1, 2})},
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory) -> tuple[Any, Decoder]:
    """A model of transformers, and the decoder that has its weights."""
    folder = tmp_path_factory.mktemp("target")
    reference = save_random(CONFIGS[request.param](), folder)
    model = load(folder)
    assert isinstance(model, Decoder)
    return reference, model


def logits_of(model: Any) -> list[torch.Tensor]:
    return all_logits(PagedRunner(model), random_prompts(), 4)


def difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def silenced(reference: Any, config: Any, skip_attention: Any = (), skip_mlp: Any = ()) -> Any:
    """A copy of a transformers model in which some halves of layers put out zeros."""
    silent = type(reference)(config)
    silent.load_state_dict(reference.state_dict())
    for index, layer in enumerate(silent.model.layers):
        for skipped, last in (
            (skip_attention, layer.self_attn.o_proj),
            (skip_mlp, layer.mlp.down_proj),
        ):
            if index in skipped:
                for parameter in last.parameters():
                    parameter.data.zero_()
    return silent.eval()


@pytest.mark.parametrize("skip", SKIPS)
def test_what_is_left_out_adds_nothing(pair, skip):
    """The oracle is transformers' own model, its output projections set to zero."""
    reference, model = pair
    oracle = silenced(reference, reference.config, **SKIPS[skip])
    expected = [reference_logits(oracle, tokens) for tokens in random_prompts()]
    assert difference(logits_of(self_draft_of(model, **SKIPS[skip])), expected) < 1e-4
    assert difference(logits_of(model), expected) > 0.1, "leaving it out must make a difference"


def test_a_view_that_leaves_nothing_out_has_the_bits_of_the_target(pair):
    _, model = pair
    assert difference(logits_of(self_draft_of(model)), logits_of(model)) == 0


def test_a_view_leaves_the_target_as_it_was(pair):
    _, model = pair
    before = logits_of(model)
    self_draft_of(model, quantized=True, skip_attention=frozenset({0}), skip_mlp=frozenset({1}))
    assert difference(logits_of(model), before) == 0


@pytest.mark.parametrize("skip", SKIPS)
def test_an_attention_that_is_left_out_writes_no_kv(pair, skip):
    runner = PagedRunner(self_draft_of(pair[1], **SKIPS[skip]))
    runner.step({0: random_prompts()[0]})
    skipped = SKIPS[skip].get("skip_attention", frozenset())
    assert [bool(kv.key.isnan().all()) for kv in runner.kv] == [i in skipped for i in range(3)]
    assert [bool(kv.value.isnan().all()) for kv in runner.kv] == [i in skipped for i in range(3)]


def test_nothing_behind_an_exit_is_looked_at(pair):
    view = self_draft_of(pair[1], **SKIPS["exit after 1"])
    expected = logits_of(view)
    view.layers = view.layers[:1]
    assert difference(logits_of(view), expected) == 0
    runner = PagedRunner(view)
    metadata = AttentionMetadata.from_rows([runner.rows(0, 3)], runner.block_size)
    _, aux_layers = view.forward(
        torch.tensor([4, 5, 6]), metadata, runner.kv, aux_layers=(0, 1, 2, 3)
    )
    assert torch.equal(aux_layers[1], aux_layers[2])
    assert torch.equal(aux_layers[1], aux_layers[3])
    assert not torch.equal(aux_layers[0], aux_layers[1])


def test_a_quantized_view_is_the_model_with_its_weights_on_the_grid(pair):
    reference, model = pair
    view = self_draft_of(model, quantized=True)
    rounded = silenced(reference, reference.config)
    rounded.lm_head.weight = torch.nn.Parameter(on_grid(view.lm_head))  # no longer tied
    shape = [model.num_heads * model.head_size] + [model.num_kv_heads * model.head_size] * 2
    for layer, copy in zip(rounded.model.layers, view.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        matrices = [
            *zip(
                (attention.q_proj, attention.k_proj, attention.v_proj),
                on_grid(copy.qkv).split(shape),
                strict=True,
            ),
            (attention.o_proj, on_grid(copy.output)),
            *zip((mlp.gate_proj, mlp.up_proj), on_grid(copy.gate_up).chunk(2), strict=True),
            (mlp.down_proj, on_grid(copy.down)),
        ]
        for linear, weight in matrices:
            linear.weight.data.copy_(weight)
    expected = [reference_logits(rounded, tokens) for tokens in random_prompts()]
    assert difference(logits_of(view), expected) < 1e-4
    assert 1e-3 < difference(logits_of(model), expected) < 0.5


def on_grid(weight: Any) -> torch.Tensor:
    assert isinstance(weight, Int8Weight)
    return weight.values * weight.scale[:, None]


def test_a_view_shares_all_but_the_int8_copies(pair):
    _, model = pair
    view = self_draft_of(model, quantized=True, **SKIPS["exit after 1"])
    assert view.config is model.config
    assert view.embedding is model.embedding
    assert view.final_norm is model.final_norm
    assert view.layers[0].input_norm is model.layers[0].input_norm
    assert view.layers[1] is model.layers[1], "what an exit leaves out is not copied"
    assert self_draft_of(model, **SKIPS["an MLP"]).lm_head is model.lm_head


@pytest.mark.parametrize("name", ["skip_attention", "skip_mlp"])
@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_does_not_exist_is_refused(pair, name, layer):
    with pytest.raises(ValueError, match=rf"{name} must have layers in 0\.\.2, got {layer}"):
        self_draft_of(pair[1], **{name: frozenset({1, layer})})


def test_a_model_that_the_decoder_does_not_serve_is_refused(tmp_path):
    config = hf.GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    save_random(config, tmp_path)
    with pytest.raises(ValueError, match="GPT2LMHeadModel cannot draft for itself"):
        self_draft_of(load(tmp_path), quantized=True)
