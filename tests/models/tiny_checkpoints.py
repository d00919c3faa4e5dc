"""Random tiny checkpoints whose greedy output varies, and the proof that a model equals them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from paged_runner import PagedRunner, all_logits, greedy
from transformers import AutoModelForCausalLM

from folospec.models.base import Model
from folospec.models.loader import load_model

SHAPE = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LENGTHS = (5, 23, 1, 12)
NUM_NEW_TOKENS = 10


def config_class(name: str) -> Any:
    """A config that older releases of transformers, the last for Python 3.10 among them, lack."""
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return getattr(transformers, name)


def save_random(config: Any, folder: Path, **save_options: Any) -> Any:
    """Write a random checkpoint and load it back with transformers: the model to compare with.

    With its own attention: older releases leave soft caps out of torch's.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    # Small enough that the layers, not the last token, decide; Gemma scales its embeddings up.
    embedding_scale = 0.05 if config.model_type.startswith("gemma") else 0.3
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "emb" in name or "wte" in name or "wpe" in name:
                parameter.normal_(0.0, embedding_scale)
            else:
                parameter.normal_(0.0, 1.5 * config.hidden_size**-0.5)
    model.save_pretrained(folder, **save_options)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def load(folder: Path, **options: Any) -> Model:
    """Load with folospec."""
    return load_model(str(folder), attention="torch", **options)


def random_prompts(vocab_size: int = 101, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    """Prompts of several lengths."""
    draws = torch.Generator().manual_seed(7)
    return [torch.randint(0, vocab_size, (n,), generator=draws).tolist() for n in lengths]


@torch.no_grad()
def reference_logits(reference: Any, tokens: list[int]) -> torch.Tensor:
    """Logits of every position by transformers, [len(tokens), vocab_size]."""
    return reference(torch.tensor([tokens])).logits[0]


def assert_equals(model: Model, reference: Any) -> None:
    """Logits within 1e-4 and greedy tokens equal, ragged, chunked or not; controls must differ."""
    prompts = random_prompts()
    expected = [_generate(reference, prompt) for prompt in prompts]
    assert len({token for output in expected for token in output}) >= 8, expected
    full = [prompt + output for prompt, output in zip(prompts, expected, strict=True)]
    references = [reference_logits(reference, tokens) for tokens in full]
    for chunk in (4, 64):
        for logits, theirs in zip(
            all_logits(PagedRunner(model), full, chunk), references, strict=True
        ):
            torch.testing.assert_close(logits, theirs, rtol=0, atol=1e-4)
        assert greedy(PagedRunner(model), prompts, NUM_NEW_TOKENS, chunk) == expected
    shifted = PagedRunner(model, move=lambda position: position + (position >= 3))
    assert greedy(shifted, prompts, NUM_NEW_TOKENS, 4) != expected
    assert greedy(PagedRunner(model, drop=4), prompts, NUM_NEW_TOKENS, 4) != expected


def _generate(reference: Any, prompt: list[int]) -> list[int]:
    output = reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=NUM_NEW_TOKENS,
        do_sample=False,
    )
    return output[0, len(prompt) :].tolist()
