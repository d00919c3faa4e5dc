"""The Llama-family decoder equals transformers on every architecture it covers."""

from __future__ import annotations

import pytest
import torch
from paged_runner import PagedRunner
from tiny_checkpoints import (
    SHAPE,
    assert_equals,
    config_class,
    load,
    random_prompts,
    save_random,
)
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from folospec.attention.metadata import AttentionMetadata, SequenceRows
from folospec.models.decoder import Decoder

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama, tied": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama, biases": lambda: LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "llama, head_dim 16, gelu": lambda: LlamaConfig(**SHAPE, head_dim=16, hidden_act="gelu"),
    "llama, one KV head": lambda: LlamaConfig(**{**SHAPE, "num_key_value_heads": 1}),
    "llama, rope llama3": lambda: LlamaConfig(**SHAPE, rope_parameters=dict(LLAMA3_ROPE)),
    "llama, rope linear": lambda: LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    ),
    "llama, rope yarn": lambda: LlamaConfig(**SHAPE, rope_parameters=dict(YARN_ROPE)),
    "llama, what it ignores": lambda: LlamaConfig(**SHAPE, pretraining_tp=2, max_window_layers=1),
    "llama, eps": lambda: LlamaConfig(**SHAPE, rms_norm_eps=0.3),
    "internlm3, biases": lambda: config_class("InternLM3Config")(
        **SHAPE, head_dim=8, qkv_bias=True, bias=True
    ),
    "iquestcoder": lambda: config_class("IQuestCoderConfig")(**SHAPE, head_dim=16),
    "mistral, what it ignores": lambda: MistralConfig(
        **SHAPE, sliding_window=9, attention_bias=True, mlp_bias=True
    ),
    "mistral, gelu": lambda: MistralConfig(**SHAPE, sliding_window=None, hidden_act="gelu"),
    "mistral, window": lambda: MistralConfig(**SHAPE, sliding_window=9),
    "mistral, no window": lambda: MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen2, window from layer 1": lambda: Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "qwen2, what it ignores": lambda: Qwen2Config(
        **SHAPE, attention_bias=False, mlp_bias=True, sliding_window=3, max_window_layers=0
    ),
    "qwen3, tied, relu2": lambda: Qwen3Config(
        **SHAPE, head_dim=8, tie_word_embeddings=True, hidden_act="relu2"
    ),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=16),
    "qwen3, layer types": lambda: Qwen3Config(
        **SHAPE,
        head_dim=8,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    return save_random(CONFIGS["qwen3, layer types"](), folder), load(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_greedy_tokens_are_those_of_transformers(name, tmp_path):
    reference = save_random(CONFIGS[name](), tmp_path)
    model = load(tmp_path)
    assert isinstance(model, Decoder)
    assert_equals(model, reference)


def test_the_window_of_each_layer_follows_the_config(qwen3):
    assert qwen3[1].config.sliding_windows == (6, None, 6)


def test_aux_layers_are_the_streams_before_each_layer_and_before_the_final_norm(qwen3):
    reference, model = qwen3
    (tokens,) = random_prompts(lengths=(11,))
    runner = PagedRunner(model)
    metadata = AttentionMetadata.from_rows([runner.rows(0, 11)], runner.block_size)
    hidden, aux_layers = model.forward(
        torch.tensor(tokens), metadata, runner.kv, aux_layers=(0, 1, 2, 3)
    )
    with torch.no_grad():
        expected = reference.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        normed = reference.model.norm(aux_layers[3])
    for layer in range(3):
        torch.testing.assert_close(aux_layers[layer], expected[layer][0], rtol=0, atol=1e-4)
    torch.testing.assert_close(hidden, expected[3][0], rtol=0, atol=1e-4)
    torch.testing.assert_close(normed, hidden, rtol=0, atol=1e-4)


def test_a_aux_layer_that_no_layer_has_is_refused(qwen3):
    runner = PagedRunner(qwen3[1])
    metadata = AttentionMetadata.from_rows([runner.rows(0, 1)], runner.block_size)
    with pytest.raises(ValueError, match=r"0\.\.3, got 4"):
        qwen3[1].forward(torch.tensor([1]), metadata, runner.kv, aux_layers=(4,))


def tree_rows(context: int, parents: list[int], table: list[int]) -> SequenceRows:
    """A root and the nodes of a tree behind `context` tokens, in blocks of 4."""
    depths, mask = [0], torch.eye(len(parents) + 1, dtype=torch.bool)
    for row, parent in enumerate(parents, start=1):
        depths.append(depths[parent + 1] + 1)
        mask[row] |= mask[parent + 1]
    indices = range(context, context + len(depths))
    return SequenceRows(
        positions=[context + depth for depth in depths],
        slots=[table[index // 4] * 4 + index % 4 for index in indices],
        context_len=context,
        block_table=table,
        suffix_mask=mask,
    )


def test_a_row_of_a_tree_has_the_logits_of_its_path_as_plain_text(qwen3):
    model = qwen3[1]
    context, root, nodes = random_prompts(lengths=(13, 1, 5))
    rows = tree_rows(13, [-1, -1, 0, 1, 3], [9, 3, 7, 1, 5])
    paths = [[], [0], [1], [0, 2], [1, 3], [1, 3, 4]]
    runner = PagedRunner(model)
    runner.tables[0], runner.free_blocks = [9, 3, 7, 1, 5], [11, 12]
    runner.step({0: context})
    metadata = AttentionMetadata.from_rows([rows], 4)
    hidden, _ = model.forward(torch.tensor(root + nodes), metadata, runner.kv)
    for row, path in enumerate(paths):
        plain = PagedRunner(model).step({0: [*context, *root, *(nodes[node] for node in path)]})
        torch.testing.assert_close(model.logits(hidden)[row], plain[0][-1], rtol=0, atol=1e-4)


def test_a_row_run_alone_has_the_same_bits_as_plain_text_and_as_a_node_of_a_tree(qwen3):
    model = qwen3[1]
    context, path = random_prompts(lengths=(13, 4))
    plain, tree = PagedRunner(model), PagedRunner(model)
    for runner in (plain, tree):
        for token in context:
            runner.step({0: [token]})
    slots = [tree.free_blocks.pop() * 4 + row for row in range(4)]
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
