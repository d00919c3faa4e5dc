"""The offline API: `LLM(model, speculative=...).generate(prompts)`."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from folospec.config import EngineConfig, SpeculativeConfig
from folospec.engine.input_processor import Prompt
from folospec.engine.llm_engine import LLMEngine
from folospec.outputs import RequestOutput
from folospec.sampling_params import SamplingParams
from folospec.spec.drafters.base import Drafter

Message = Mapping[str, Any]


class LLM:
    """A model that completes prompts, in batches, with or without speculation, with the same
    tokens.

    Args:
        model: folder, hub id, or a bundled name such as "folospec-demo".
        speculative: None, "auto", a drafter's name, a mapping with "method" and its settings, a
            list of these in order of precedence, a mapping with "drafters" and "merge", or a
            `SpeculativeConfig`.
        options: any field of `EngineConfig`: dtype, device, block_size, num_blocks, max_num_seqs,
            deterministic, seed, ... `trace="steps.jsonl"` writes what every step did to a file.

    Raises:
        ValueError: an option is unknown or out of range, or the model or drafter cannot be used.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        speculative: None | str | Mapping[str, Any] | SpeculativeConfig = None,
        **options: Any,
    ) -> None:
        known = EngineConfig.__dataclass_fields__
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(f"unknown options {unknown}; LLM has: {', '.join(sorted(known))}")
        config = EngineConfig(
            model=os.fspath(model) if isinstance(model, os.PathLike) else model,
            speculative=SpeculativeConfig.of(speculative),
            **options,
        )
        self.engine = LLMEngine(config)

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer, None with `skip_tokenizer_init`."""
        return self.engine.tokenizer

    def drafter(self, name: str) -> Drafter:
        """The drafter of that name, for what it offers besides drafting: a store to save, say.

        Raises:
            ValueError: the engine has none of that name.
        """
        drafters = {handle.name: handle.drafter for handle in self.engine.parts.handles}
        if name not in drafters:
            raise ValueError(f"name must be one of {sorted(drafters) or 'none'}, got {name!r}")
        return drafters[name]

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete every prompt; results come in the order of the prompts.

        Args:
            prompts: a text, a list of texts, token ids, a list of lists of token ids, or mappings
                with "prompt" or "prompt_token_ids".
            sampling_params: one for all, or one for each prompt. Default: `SamplingParams()`.
                Noise is keyed by seed and position: with one `seed` for all, prompts of one length
                get correlated samples. Give each its own seed where that matters, or none.
            use_tqdm: show a progress bar.

        Raises:
            ValueError: a prompt or parameter cannot be served. Every request is checked before any
            runs.
            KeyboardInterrupt: on Ctrl-C, after the unfinished requests were aborted; the engine
                stays usable.
        """
        prompt_list = _as_list(prompts)
        params = _params_list(sampling_params, len(prompt_list))
        request_ids: list[str] = []
        results: dict[str, RequestOutput] = {}
        try:
            for prompt, one in zip(prompt_list, params, strict=True):
                request_ids.append(self.engine.add_request(prompt, one))
            self._run(results, set(request_ids), use_tqdm)
        finally:
            for request_id in request_ids:
                self.engine.abort(request_id)
        return [results[request_id] for request_id in request_ids]

    def _run(self, results: dict[str, RequestOutput], wanted: set[str], use_tqdm: bool) -> None:
        num_tokens, total = 0, len(wanted)
        with tqdm(total=total, desc="Prompts", unit="prompt", disable=not use_tqdm) as bar:
            while len(results) < total:
                for output in self.engine.step(finished_only=True):
                    if output.request_id in wanted:
                        results[output.request_id] = output
                        num_tokens += sum(len(c.token_ids) for c in output.outputs)
                        bar.set_postfix_str(f"{num_tokens} tokens", refresh=False)
                        bar.update()

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete one conversation or several, written with the tokenizer's chat template.

        Raises:
            ValueError: no messages, or the tokenizer has no chat template.
        """
        if not messages:
            raise ValueError("messages must hold at least one message, got none")
        if self.tokenizer is None or not getattr(self.tokenizer, "chat_template", None):
            raise ValueError("chat needs a tokenizer with a chat template; use generate")
        conversations = [messages] if isinstance(messages[0], Mapping) else list(messages)
        prompts = [
            {
                "prompt_token_ids": self.tokenizer.apply_chat_template(
                    conversation, add_generation_prompt=True, return_dict=True
                )["input_ids"]
            }
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm)

    def stats(self) -> dict[str, Any]:
        """Counts, times and settings of the engine; see `LLMEngine.stats`."""
        return self.engine.stats()


def _as_list(prompts: Any) -> list[Prompt]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, Collection):
        raise ValueError(f"prompts must be a prompt or a list of them, got {prompts!r}")
    items = list(prompts)
    return [items] if items and all(isinstance(item, int) for item in items) else items


def _params_list(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise ValueError(f"{count} prompts need one SamplingParams or {count}, got {len(params)}")
    return list(params)
