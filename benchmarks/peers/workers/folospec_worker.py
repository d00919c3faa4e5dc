"""folospec: whatever `LLM` takes goes in the options, `speculative` above all."""

from __future__ import annotations

import gc

import torch
from channel import Batch, Engine, Load, Result, serve

from folospec import LLM, SamplingParams

_BATCHED_TOKENS = 2048
_COUNTS = (
    "num_steps",
    "num_target_passes",
    "num_drafts",
    "num_draft_tokens",
    "num_accepted_tokens",
    "draft_time",
    "target_time",
    "sampling_time",
)


class Folospec(Engine):
    packages = ("folospec", "torch")

    def __init__(self, load: Load) -> None:
        torch.set_num_threads(load.threads)
        self.load = load
        self.llm = self._make()

    def _make(self) -> LLM:
        load = self.load
        standard = {
            "dtype": load.dtype,
            "max_num_seqs": load.max_batch,
            "max_num_batched_tokens": max(_BATCHED_TOKENS, load.max_batch),
            "max_model_len": load.max_len,
            "kv_cache_memory": load.kv_gib << 30,
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
        }
        return LLM(load.checkpoint, **{**standard, **load.options})

    def reset(self) -> None:
        """Drafters and planners learn from what they see: all of it goes."""
        del self.llm
        gc.collect()
        self.llm = self._make()

    def generate(self, batch: Batch) -> Result:
        params = [
            SamplingParams(
                temperature=batch.temperature,
                max_tokens=batch.max_tokens,
                ignore_eos=True,
                seed=batch.seed + index,
            )
            for index in range(len(batch.prompts))
        ]
        before = self.llm.stats()
        requests = [{"prompt_token_ids": ids} for ids in batch.prompts]
        outputs = self.llm.generate(requests, params, use_tqdm=False)
        after = self.llm.stats()
        details = {key: after[key] - before[key] for key in _COUNTS}
        return Result([list(output.outputs[0].token_ids) for output in outputs], details)


if __name__ == "__main__":
    serve(Folospec)
