"""OpenVINO GenAI: continuous batching, plain, with prompt lookup, or with a draft model; each is a
pipeline of its own. The checkpoints are converted before: see `checkpoints`.

With AVX2 alone it calculates in float32: asked for bfloat16 it finds no operation for it, whether
the processor has nothing wider or it is held to AVX2.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import openvino
import openvino_genai
from channel import Batch, Engine, Load, Result, serve

_PRECISION = {"float32": "f32", "bfloat16": "bf16"}


class OpenVino(Engine):
    packages = ("openvino", "openvino-genai")

    def __init__(self, load: Load) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = load.kv_gib
        scheduler.max_num_seqs = load.max_batch
        scheduler.enable_prefix_caching = False
        capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        has_bfloat16 = "BF16" in capabilities and os.environ.get("ONEDNN_MAX_CPU_ISA") != "AVX2"
        precision = _PRECISION[load.dtype] if has_bfloat16 else "f32"
        properties: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": precision,
            "INFERENCE_NUM_THREADS": load.threads,
        }
        speculation: dict[str, Any] = {}
        if load.mode == "lookup":
            speculation["prompt_lookup"] = True
        if load.mode == "draft_model":
            draft = openvino_genai.draft_model(load.draft, "CPU", **properties)
            speculation["draft_model"] = draft
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(
            load.checkpoint,
            scheduler_config=scheduler,
            device="CPU",
            properties={**properties, **speculation},
        )

    def generate(self, batch: Batch) -> Result:
        inputs = [openvino.Tensor(np.array([ids], dtype=np.int64)) for ids in batch.prompts]
        configs = [_config(batch, index) for index in range(len(batch.prompts))]
        results = self.pipeline.generate(inputs, configs)
        return Result([list(result.m_generation_ids[0]) for result in results])


def _config(batch: Batch, index: int) -> Any:
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = batch.max_tokens
    config.ignore_eos = True
    if batch.temperature > 0:
        config.do_sample = True
        config.temperature = batch.temperature
        config.rng_seed = batch.seed + index
    if batch.mode != "plain":
        config.num_assistant_tokens = batch.options["num_speculative_tokens"]
    if batch.mode == "lookup":
        config.max_ngram_size = batch.options["ngram"]
    return config


if __name__ == "__main__":
    serve(OpenVino)
