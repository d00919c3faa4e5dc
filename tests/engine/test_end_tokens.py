"""What ends an output: the model's end tokens, and the tokenizer's own."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from folospec import LLM, SamplingParams
from folospec.models.loader import load_tokenizer

DEMO = "folospec-demo"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that knows of no end token, with the vocabulary of the demo's tokenizer."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("no_eos")
    config = LlamaConfig(
        vocab_size=len(load_tokenizer(DEMO)),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    (path / "generation_config.json").unlink(missing_ok=True)
    return str(path)


def test_the_tokenizers_end_token_ends_an_output_that_the_model_would_not_end(folder):
    eos = load_tokenizer(DEMO).eos_token_id
    params = SamplingParams(temperature=0, max_tokens=3, logit_bias={eos: 100.0})
    with_it = LLM(folder, tokenizer=DEMO, max_model_len=32)
    (output,) = with_it.generate([[1, 2]], params, use_tqdm=False)
    assert (output.outputs[0].token_ids, output.outputs[0].finish_reason) == ([eos], "stop")
    without = LLM(folder, skip_tokenizer_init=True, max_model_len=32)
    (output,) = without.generate([[1, 2]], params, use_tqdm=False)
    assert output.outputs[0].token_ids == [eos] * 3


def test_a_tokenizers_end_token_without_an_embedding_is_left_out(folder):
    llm = LLM(folder, tokenizer=DEMO, max_model_len=32)
    assert llm.engine.components.eos_token_ids == {llm.tokenizer.eos_token_id}
    tokenizer = load_tokenizer(DEMO)
    tokenizer.add_tokens(["<turn>"])
    tokenizer.eos_token = "<turn>"
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    from folospec.worker.loading import _eos_token_ids

    assert _eos_token_ids(llm.engine.components.target, tokenizer) == frozenset()
