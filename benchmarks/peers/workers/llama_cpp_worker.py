"""llama.cpp through llama-cpp-python: plain, by its C functions, any number of sequences at once;
and the prompt lookup of its `Llama` class, which runs one sequence.

The checkpoint is a GGUF file: see `checkpoints`. Weights are in the type asked for; KV is
float32 with float32 weights, and float16 otherwise, which is what it offers. Flash attention is off
in float32, where it would round to less.
"""

from __future__ import annotations

from typing import Any

import llama_cpp
from channel import Batch, Engine, Load, Result, serve
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

_BATCHED_TOKENS = 2048


class LlamaCpp(Engine):
    packages = ("llama-cpp-python",)

    def __init__(self, load: Load) -> None:
        self.load = load
        self.exact = load.dtype == "float32"
        self.llama: Any = None
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(load.checkpoint.encode(), params)
        if not self.model:
            raise RuntimeError(f"{load.checkpoint} does not load")
        self.context: Any = None
        self.num_sequences = 0

    def generate(self, batch: Batch) -> Result:
        return self._lookup(batch) if batch.mode == "lookup" else self._plain(batch)

    def _context(self, num_sequences: int) -> Any:
        """A context for so many sequences, each with its own part of the cells. One at a time is
        kept, for the memory."""
        if num_sequences != self.num_sequences:
            if self.context:
                llama_cpp.llama_free(self.context)
            params = llama_cpp.llama_context_default_params()
            params.n_ctx = self.load.max_len * num_sequences
            params.n_seq_max = num_sequences
            params.n_batch = _BATCHED_TOKENS
            params.n_threads = params.n_threads_batch = self.load.threads
            params.kv_unified = False
            if self.exact:
                params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
                params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
            self.context = llama_cpp.llama_init_from_model(self.model, params)
            if not self.context:
                raise RuntimeError(f"no context for {num_sequences} sequences")
            self.num_sequences = num_sequences
        return self.context

    def _plain(self, batch: Batch) -> Result:
        context = self._context(len(batch.prompts))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        samplers = [_sampler(batch, index) for index in range(len(batch.prompts))]
        rows = llama_cpp.llama_batch_init(_BATCHED_TOKENS, 0, 1)
        try:
            tokens = self._prefill(context, rows, batch.prompts, samplers)
            outputs = [[token] for token in tokens]
            for step in range(batch.max_tokens - 1):
                for index, ids in enumerate(batch.prompts):
                    _put(rows, index, tokens[index], len(ids) + step, index, True)
                rows.n_tokens = len(batch.prompts)
                _decode(context, rows)
                tokens = [
                    llama_cpp.llama_sampler_sample(sampler, context, index)
                    for index, sampler in enumerate(samplers)
                ]
                for output, token in zip(outputs, tokens, strict=True):
                    output.append(token)
        finally:
            llama_cpp.llama_batch_free(rows)
            for sampler in samplers:
                llama_cpp.llama_sampler_free(sampler)
        return Result(outputs)

    def _prefill(
        self, context: Any, rows: Any, prompts: list[list[int]], samplers: list[Any]
    ) -> list[int]:
        """Run the prompts, as many at once as fit, and sample the first token of each."""
        tokens: list[int] = []
        first = 0
        while first < len(prompts):
            last, used = first, 0
            ends = []
            while last < len(prompts) and used + len(prompts[last]) <= _BATCHED_TOKENS:
                ids = prompts[last]
                for position, token in enumerate(ids):
                    _put(rows, used + position, token, position, last, position == len(ids) - 1)
                used += len(ids)
                ends.append(used - 1)
                last += 1
            rows.n_tokens = used
            _decode(context, rows)
            tokens += [
                llama_cpp.llama_sampler_sample(samplers[first + i], context, end)
                for i, end in enumerate(ends)
            ]
            first = last
        return tokens

    def _lookup(self, batch: Batch) -> Result:
        if len(batch.prompts) != 1:
            raise ValueError(f"lookup runs one sequence, got {len(batch.prompts)}")
        if self.llama is None:
            kind = llama_cpp.GGML_TYPE_F32 if self.exact else llama_cpp.GGML_TYPE_F16
            self.llama = llama_cpp.Llama(
                self.load.checkpoint,
                n_ctx=self.load.max_len,
                n_batch=self.load.max_len,
                n_threads=self.load.threads,
                n_threads_batch=self.load.threads,
                type_k=kind,
                type_v=kind,
                flash_attn=not self.exact,
                draft_model=LlamaPromptLookupDecoding(
                    max_ngram_size=batch.options["ngram"],
                    num_pred_tokens=batch.options["num_speculative_tokens"],
                ),
                verbose=False,
            )
        self.llama.reset()
        self.llama.set_seed(batch.seed)
        generated = self.llama.generate(
            batch.prompts[0], temp=batch.temperature, top_k=0, top_p=1.0, min_p=0.0
        )
        return Result([[next(generated) for _ in range(batch.max_tokens)]])


def _sampler(batch: Batch, index: int) -> Any:
    params = llama_cpp.llama_sampler_chain_default_params()
    chain = llama_cpp.llama_sampler_chain_init(params)
    if batch.temperature == 0:
        parts = [llama_cpp.llama_sampler_init_greedy()]
    else:
        parts = [
            llama_cpp.llama_sampler_init_temp(batch.temperature),
            llama_cpp.llama_sampler_init_dist(batch.seed + index),
        ]
    for part in parts:
        llama_cpp.llama_sampler_chain_add(chain, part)
    return chain


def _put(rows: Any, place: int, token: int, position: int, sequence: int, read: bool) -> None:
    rows.token[place] = token
    rows.pos[place] = position
    rows.n_seq_id[place] = 1
    rows.seq_id[place][0] = sequence
    rows.logits[place] = read


def _decode(context: Any, rows: Any) -> None:
    status = llama_cpp.llama_decode(context, rows)
    if status:
        raise RuntimeError(f"llama_decode returned {status}")


if __name__ == "__main__":
    serve(LlamaCpp)
