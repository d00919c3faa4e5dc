"""Prompts of code that the demo models were not trained on.

They are cut out of the standard library of the Python that runs: of the modules, and their tests,
that the training data leaves out.
"""

from __future__ import annotations

import importlib
import random
import re
import sys
from functools import cache
from typing import Any

from benchmarks import ROOT

LENGTHS = (64, 96, 128, 160, 192)
"""Tokens of the prompts, in turn: a batch is ragged."""
_CHARACTERS = 2000
_FUNCTION = re.compile(r"^ *def [^\n]*:\n", re.MULTILINE)


def held_out_prompts(tokenizer: Any, count: int, *, newline: bool = True) -> list[list[int]]:
    """Return token ids of `count` prompts, each ending where the body of a function begins.

    The choice is fixed for a given Python version, and the first prompts do not depend on `count`.

    Args:
        newline: whether they have the newline before the body. Where a token may be a newline and
            the spaces behind it, a model has hardly ever seen the newline alone.
    """
    rng = random.Random(0)
    places = [
        (text, match.end())
        for text in held_out_texts()
        for match in _FUNCTION.finditer(text)
        if match.end() >= _CHARACTERS
    ]
    rng.shuffle(places)
    if count > len(places):
        raise ValueError(f"the held-out modules give {len(places)} prompts, got {count=}")
    last = 0 if newline else 1
    return [
        tokenizer(text[end - _CHARACTERS : end - last])["input_ids"][-LENGTHS[i % len(LENGTHS)] :]
        for i, (text, end) in enumerate(places[:count])
    ]


@cache
def held_out_texts() -> list[str]:
    """The sources of all held-out modules and their tests."""
    folder = str(ROOT / "training")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    corpus = importlib.import_module("corpus")
    return [text for name, text in corpus.documents() if corpus.split(name) == "held_out"]
