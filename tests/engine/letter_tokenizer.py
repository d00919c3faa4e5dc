"""A tokenizer for the tiny models, of single letters."""

from __future__ import annotations

import shutil
from pathlib import Path

from harness import MAX_LEN, VOCAB_SIZE
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}{% endfor %}a"


def save_with_tokenizer(model: str, folder: Path) -> None:
    """Copy a tiny model and give it a tokenizer: one token per letter, and two words, of which the
    model has a row only for the first."""
    shutil.copytree(model, folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCAB_SIZE - 1]
    tokenizer = Tokenizer(BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=TEMPLATE, model_max_length=MAX_LEN
    )
    fast.add_tokens(["<known>", "<tool>"])
    fast.save_pretrained(folder)
