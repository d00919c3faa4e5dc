"""Other causal LMs of transformers run on our paged attention, or are refused by name."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from paged_runner import PagedRunner
from tiny_checkpoints import SHAPE, assert_equals, load, random_prompts, save_random

from folospec.attention.metadata import AttentionMetadata, SequenceRows
from folospec.models.transformers_backend import TransformersModel

SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
CONFIGS = {
    "gpt2": lambda: hf.GPT2Config(
        **SPECIAL,
        vocab_size=101,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=64,
        scale_attn_by_inverse_layer_idx=True,
    ),
    "opt, projected": lambda: hf.OPTConfig(
        **{**SHAPE, "pad_token_id": 1}, ffn_dim=48, word_embed_proj_dim=24
    ),
    "gemma2, soft caps": lambda: hf.Gemma2Config(
        **SHAPE,
        head_dim=8,
        sliding_window=6,
        attn_logit_softcapping=4.0,
        final_logit_softcapping=0.5,
        query_pre_attn_scalar=5,
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **SHAPE, head_dim=8, sliding_window=6, layer_types=list(KINDS)
    ),
    "phi3, window": lambda: hf.Phi3Config(**SHAPE, sliding_window=7),
    "olmo2": lambda: hf.Olmo2Config(**SHAPE),
    "granite": lambda: hf.GraniteConfig(
        **SHAPE,
        logits_scaling=2.0,
        attention_multiplier=0.3,
        residual_multiplier=0.7,
        embedding_multiplier=3.0,
    ),
    "cohere": lambda: hf.CohereConfig(**SHAPE, logit_scale=0.3),
    "qwen3 moe": lambda: hf.Qwen3MoeConfig(
        **SHAPE, head_dim=8, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2
    ),
    "mixtral": lambda: hf.MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
}
REFUSED = {
    "attention sinks": lambda: hf.GptOssConfig(**SHAPE, num_local_experts=4, head_dim=8),
    "share keys": lambda: hf.Gemma3nTextConfig(
        **SHAPE,
        head_dim=8,
        vocab_size_per_layer_input=101,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=1,
        laurel_rank=4,
        layer_types=list(KINDS),
        sliding_window=8,
        activation_sparsity_pattern=None,
    ),
    "more than causal": lambda: hf.Llama4TextConfig(
        **SHAPE, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=8
    ),
    "1 of its 3 layers": lambda: hf.Lfm2Config(
        **SHAPE, layer_types=["conv", "full_attention", "conv"], block_multiple_of=8
    ),
    "not causal": lambda: hf.Gemma3TextConfig(
        **SHAPE, head_dim=8, use_bidirectional_attention=True
    ),
    "12 keys and 6 values": lambda: hf.DeepseekV3Config(
        **{**SHAPE, "num_key_value_heads": 4},
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
    ),
}
REFUSED_UNREAD = {  # by their class alone: the folder has no weights
    "MambaForCausalLM.*recurrent": lambda: hf.MambaConfig(hidden_size=32, num_hidden_layers=2),
    "JambaForCausalLM.*recurrent": lambda: hf.JambaConfig(**SHAPE),
    "BloomForCausalLM.*ALiBi": lambda: hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4),
    "MptForCausalLM.*ALiBi": lambda: hf.MptConfig(d_model=32, n_heads=4, n_layers=2),
    "FalconForCausalLM.*ALiBi": lambda: hf.FalconConfig(hidden_size=32, alibi=True),
    "T5ForConditionalGeneration.*encoder": lambda: hf.T5Config(d_model=32),
    "ViTForImageClassification.*no causal": lambda: hf.ViTConfig(hidden_size=32),
}


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma3")
    return save_random(CONFIGS["gemma3"](), folder), load(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_greedy_tokens_are_those_of_transformers(name, tmp_path):
    reference = save_random(CONFIGS[name](), tmp_path)
    model = load(tmp_path)
    assert isinstance(model, TransformersModel)
    assert_equals(model, reference)


@pytest.mark.parametrize("reason", REFUSED)
def test_an_architecture_that_needs_more_is_refused_by_name(reason, tmp_path):
    config = REFUSED[reason]()
    save_random(config, tmp_path)
    name = config.architectures[0] if config.architectures else config.model_type.split("_")[0]
    with pytest.raises(ValueError, match=f"(?i)architecture '{name}.*{reason}"):
        load(tmp_path)


@pytest.mark.parametrize("message", REFUSED_UNREAD)
def test_what_its_class_rules_out_is_refused_before_any_weight_is_read(message, tmp_path):
    config = REFUSED_UNREAD[message]()
    config.architectures = [message.partition(".")[0]]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_windows_are_found_layer_by_layer(gemma3):
    assert gemma3[1].config.sliding_windows == (6, None, 6)


def test_aux_layers_are_the_streams_before_each_layer_and_before_the_final_norm(gemma3):
    reference, model = gemma3
    (tokens,) = random_prompts(lengths=(11,))
    runner = PagedRunner(model)
    metadata = AttentionMetadata.from_rows([runner.rows(0, 11)], runner.block_size)
    hidden, aux_layers = model.forward(
        torch.tensor(tokens), metadata, runner.kv, aux_layers=(0, 2, 3)
    )
    with torch.no_grad():
        expected = reference.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        normed = reference.model.norm(aux_layers[3])
    for layer in (0, 2):
        torch.testing.assert_close(aux_layers[layer], expected[layer][0], rtol=0, atol=1e-4)
    torch.testing.assert_close(hidden, expected[3][0], rtol=0, atol=1e-4)
    torch.testing.assert_close(normed, hidden, rtol=0, atol=1e-4)
    assert model.forward(torch.tensor(tokens), metadata, runner.kv)[1] == {}


def test_a_row_run_alone_has_the_same_bits_as_plain_text_and_behind_scattered_ancestors(gemma3):
    model = gemma3[1]
    context, path = random_prompts(lengths=(13, 3))
    plain, tree = PagedRunner(model), PagedRunner(model)
    for runner in (plain, tree):
        for token in context:
            runner.step({0: [token]})
    slots = [tree.free_blocks.pop() * 4 + 1 for _ in path]
    for depth, token in enumerate(path):
        expected = plain.step({0: [token]})[0]
        rows = SequenceRows(
            positions=[13 + depth],
            slots=[slots[depth]],
            context_len=13,
            block_table=tree.tables[0],
            suffix_slots=slots[: depth + 1],
            suffix_positions=list(range(13, 14 + depth)),
        )
        metadata = AttentionMetadata.from_rows([rows], 4)
        hidden, _ = model.forward(torch.tensor([token]), metadata, tree.kv)
        assert torch.equal(model.logits(hidden), expected)


def test_a_missing_or_misshapen_tensor_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    save_random(CONFIGS["olmo2"](), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    wrong = {**tensors, name: tensors[name][:-1].contiguous()}
    save_file(wrong, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"mismatched.*{name}"):
        load(tmp_path)
    del wrong[name]
    save_file(wrong, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"missing.*{name}"):
        load(tmp_path)
