from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from folospec import LLMEngine
from folospec.cli.main import app

NUM_WORDS = 64


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random model whose tokens are the words w0 to w63."""
    return _save(tmp_path_factory.mktemp("target"), noise=0.0)


@pytest.fixture(scope="session")
def draft(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The target with noise on its weights: it agrees now and then."""
    return _save(tmp_path_factory.mktemp("draft"), noise=0.12)


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with the target's words and none of its opinions."""
    return _save(tmp_path_factory.mktemp("stranger"), noise=1.0)


def _save(folder: Path, *, noise: float) -> str:
    config = LlamaConfig(
        vocab_size=NUM_WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(0.0, 1.5 * weight.shape[-1] ** -0.5)
            weight.add_(torch.randn(weight.shape, generator=draws) * weight.std().item() * noise)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(NUM_WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folospec() -> Callable[..., Any]:
    """Run the command in this process: `folospec("generate", "w1", ..., input=None)`."""

    def run(*arguments: str, input: str | None = None) -> Any:  # noqa: A002 - CliRunner's word
        return CliRunner().invoke(app, [str(a) for a in arguments], input=input)

    return run


@pytest.fixture
def ctrl_c_at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`ctrl_c_at_step(n)`: SIGINT, or another signal, arrives during the n-th step of all
    engines."""

    def arrange(number: int, signum: int = signal.SIGINT) -> None:
        real, seen = LLMEngine.step, []

        def step(self: LLMEngine, **options: Any) -> Any:
            seen.append(self)
            if len(seen) == number:
                signal.raise_signal(signum)
            return real(self, **options)

        monkeypatch.setattr(LLMEngine, "step", step)

    return arrange
