"""Whether sampled texts look as if they were drawn from the model: a peer that draws from another
distribution may be fast for the wrong reason.

A token drawn from a distribution p has the surprise -log p(token), whose mean is the entropy of p.

    excess = mean over the tokens of (surprise - entropy)

is 0 up to chance if every token was drawn from the distribution at its place. Garbage lies far
above; a sampler that is too cautious, below. The demo target gives the distribution, also of the
grown ones, which compute the same; another model has to be named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from folospec.models.loader import resolve_model

DEMO = "folospec-demo"
MOST_TEXTS = 32
"""Enough to see a wrong distribution, and soon done."""


@torch.inference_mode()
def excess_surprise(
    prompts: Sequence[list[int]],
    outputs: Sequence[list[int]],
    temperature: float,
    model: str = DEMO,
) -> tuple[float, float]:
    """Excess in nats per token, and its standard error.

    Args:
        prompts: token ids; of many, the first are looked at.
        outputs: what was sampled after each of them at this temperature.
        model: the checkpoint that they should be drawn from.
    """
    excesses: list[float] = []
    for prompt, output in list(zip(prompts, outputs, strict=True))[:MOST_TEXTS]:
        logits = _loaded(model)(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
        logprobs = (logits / temperature).log_softmax(-1)
        surprise = -logprobs[torch.arange(len(output)), torch.tensor(output)]
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        excesses += (surprise - entropy).tolist()
    spread = torch.tensor(excesses).std().item()
    return sum(excesses) / len(excesses), spread / math.sqrt(len(excesses))


@cache
def _loaded(name: str) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype=torch.float32)
    return model.eval()
