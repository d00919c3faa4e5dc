"""transformers: `generate` on a batch padded on the left, its two speculative modes at batch 1, and
`generate_batch`. One copy of the models serves all of them.

`generate_batch` has to be told the size of its cache: left alone it takes a share of the machine's
memory. Its time is that from the start of the first request to the end of the last, as the requests
say themselves, so that starting its thread is not held against it.
"""

from __future__ import annotations

from typing import Any

import torch
from channel import Batch, Engine, Load, Result, serve
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, logging

_BATCHED_TOKENS = 2048


class Transformers(Engine):
    packages = ("transformers", "torch")

    def __init__(self, load: Load) -> None:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(load.threads)
        self.target = self._load(load.checkpoint, load.dtype)
        self.draft = self._load(load.draft, load.dtype) if load.draft else None
        self.batch_of_manager = 0

    def _load(self, folder: str, dtype: str) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        # Unset here, because `generate` fills what its config leaves out from this one.
        model.generation_config.eos_token_id = None
        return model.eval()

    def generate(self, batch: Batch) -> Result:
        torch.manual_seed(batch.seed)
        if batch.mode == "generate_batch":
            return self._generate_batch(batch)
        with torch.inference_mode():
            return self._generate(batch)

    def _generate(self, batch: Batch) -> Result:
        width = max(map(len, batch.prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in batch.prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch.prompts])
        output = self.target.generate(
            ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                max_new_tokens=batch.max_tokens, **_sampling(batch), eos_token_id=None
            ),
            **self._speculation(batch),
        )
        return Result(output[:, width:].tolist())

    def _speculation(self, batch: Batch) -> dict[str, Any]:
        options = batch.options
        if batch.mode == "lookup":
            return {
                "prompt_lookup_num_tokens": options["num_speculative_tokens"],
                "max_matching_ngram_size": options["ngram"],
            }
        if batch.mode == "draft_model":
            config = self.draft.generation_config
            config.num_assistant_tokens = options["num_speculative_tokens"]
            config.num_assistant_tokens_schedule = "constant"
            config.assistant_confidence_threshold = options["assistant_confidence_threshold"]
            return {"assistant_model": self.draft}
        return {}

    def _generate_batch(self, batch: Batch) -> Result:
        if self.batch_of_manager != len(batch.prompts):
            self.target.destroy_cached_continuous_batching_manager()
            self.batch_of_manager = len(batch.prompts)
        options = ContinuousBatchingConfig(
            max_batch_tokens=_BATCHED_TOKENS, allow_block_sharing=False
        )
        longest = max(map(len, batch.prompts)) + batch.max_tokens
        options.num_blocks = len(batch.prompts) * (-(-longest // options.page_size) + 1)
        outputs = self.target.generate_batch(
            batch.prompts,
            generation_config=GenerationConfig(
                max_new_tokens=batch.max_tokens, **_sampling(batch), eos_token_id=-1
            ),
            continuous_batching_config=options,
            persistent_manager=True,
            record_timestamps=True,
        )
        results = list(outputs.values())
        errors = [str(result.error) for result in results if result.error]
        if errors or len(results) != len(batch.prompts):
            raise RuntimeError(f"{len(results)} of {len(batch.prompts)} results; errors: {errors}")
        spans = [result.lifespan for result in results]
        return Result(
            [list(result.generated_tokens) for result in results],
            seconds=max(end for _, end in spans) - min(start for start, _ in spans),
        )


def _sampling(batch: Batch) -> dict[str, Any]:
    if batch.temperature == 0:
        return {"do_sample": False, "pad_token_id": 0}
    sampled = {"do_sample": True, "temperature": batch.temperature, "top_k": 0, "top_p": 1.0}
    return {**sampled, "pad_token_id": 0}


if __name__ == "__main__":
    serve(Transformers)
