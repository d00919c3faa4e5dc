"""Offers the offline interface: `LLM(model, speculative=...).generate(prompts)`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from tqdm import tqdm

from folospec.config import EngineConfig
from folospec.engine.llm_engine import LLMEngine
from folospec.errors import RequestError
from folospec.option_names import CHAT_NAMES, GENERATE_NAMES, STREAM_NAMES, takes_names
from folospec.outputs import RequestOutput
from folospec.requests.inbox import OutputDelta, Snapshots
from folospec.requests.input_processor import Prompt
from folospec.sampling_params import SamplingParams, is_token_list, shown
from folospec.spec.drafters.base import Drafter
from folospec.speculative_config import SpeculativeConfig
from folospec.text.chat import Message, conversations_of


class LLM:
    """A model that completes prompts, in batches, with or without speculation, with the same
    tokens.

    Its methods may be called from several threads: the engine serves all calls together, a step at
    a time, and each call returns its own results.

    Args:
        model: folder, hub id, or a bundled name such as "folospec-demo".
        speculative: None, "auto", a drafter's name, a mapping with "method" and its settings, a
            list of these in order of precedence, a mapping with "drafters" and "merge", or a
            `SpeculativeConfig`. `speculative_config=`, as in vLLM, is the same option.
        options: any field of `EngineConfig`: dtype, device, block_size, num_blocks, max_num_seqs,
            deterministic, seed, ... `trace="steps.jsonl"` writes what every step did to a file.

    Raises:
        ValueError: an option is unknown or out of range, or the model or drafter cannot be used.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        speculative: None | str | Mapping[str, Any] | Sequence[Any] | SpeculativeConfig = None,
        **options: Any,
    ) -> None:
        for name, value in (("model", model), ("speculative", speculative)):
            if value is not None:
                options[name] = value
        self.engine = LLMEngine(EngineConfig(**options))

    def __repr__(self) -> str:
        drafters = [drafter.name for drafter in self.engine.components.drafters]
        return f"LLM({self.engine.config.model!r}, speculative={drafters or None})"

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Abort what runs. Whatever adds requests afterwards raises `EngineClosedError`."""
        self.engine.close()

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer, None with `skip_tokenizer_init`."""
        return self.engine.tokenizer

    @takes_names(STREAM_NAMES)
    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[OutputDelta]:
        """Complete one prompt, yielding its text and tokens as they come; see
        `LLMEngine.stream`."""
        return self.engine.stream(prompt, sampling_params)

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer, None with `skip_tokenizer_init`."""
        return self.engine.tokenizer

    def drafter(self, name: str) -> Drafter:
        """The drafter of that name, for what it offers besides drafting: a store to save, say.

        Raises:
            ValueError: the engine has none of that name.
        """
        drafters = {handle.name: handle.drafter for handle in self.engine.components.handles}
        if name not in drafters:
            raise ValueError(f"name must be one of {sorted(drafters) or 'none'}, got {name!r}")
        return drafters[name]

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters that `generate` uses where it is given none: the defaults of the model's
        generation_config.json, or with `generation_config="folospec"` those of `SamplingParams`.
        `dataclasses.replace` makes changed copies."""
        return self.engine.components.default_sampling_params

    @takes_names(GENERATE_NAMES)
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        raise_on_error: bool = False,
    ) -> list[RequestOutput]:
        """Complete every prompt; results come in the order of the prompts.

        Args:
            prompts: a text, a list of texts, token ids, a list of lists of token ids, or mappings
                with "prompt" or "prompt_token_ids".
            sampling_params: one for all, or one for each prompt. Default:
                `get_default_sampling_params()`. Noise is keyed by seed and position: with one
                `seed` for all, prompts of one length get correlated samples. Give each its own
                seed where that matters, or none.
            use_tqdm: show a progress bar; a function makes the bar, in place of `tqdm.tqdm`.
            raise_on_error: raise when a request ends with an error; otherwise its `error` says
                why, its `finish_reason` is "error", and the others go on.

        Raises:
            ValueError: a prompt or parameter cannot be served. Every request is checked before any
                runs.
            RequestError: with `raise_on_error`; the unfinished requests are aborted.
            EngineBrokenError: a step failed, and no request is the cause.
            KeyboardInterrupt: on Ctrl-C, at the end of the step, after the unfinished requests of
                this call were aborted; the engine stays usable.
        """
        prompt_list = _as_list(prompts)
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        params = _params_list(sampling_params, len(prompt_list))
        make_bar = _bar_maker(use_tqdm)
        inbox = Snapshots()
        with self.engine.holding_interrupts() as interrupt:
            try:
                ids = self.engine.add_requests(list(zip(prompt_list, params, strict=True)), inbox)
                results: dict[str, RequestOutput] = {}
                with make_bar(total=len(ids), desc="Prompts", unit="prompt") as bar:
                    while len(results) < len(ids):
                        for output in self.engine.collect(inbox):
                            results[output.request_id] = output
                            if raise_on_error and output.error is not None:
                                raise _request_error(output, ids)
                            _show(bar, output)
                        interrupt.raise_now()
            finally:
                self.engine.discard(inbox)
        return [results[request_id] for request_id in ids]

    @takes_names(CHAT_NAMES)
    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        raise_on_error: bool = False,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """Complete one conversation or several, written with the tokenizer's chat template.

        Args:
            messages: a conversation, a list of mappings with "role" and "content", or a list of
                conversations. A content is a text, or a list of `{"type": "text", "text": ...}`.
            add_generation_prompt: end the prompt with the start of the assistant's message.
            continue_final_message: leave the last message open, to be continued; needs
                `add_generation_prompt=False`.
            chat_template: a Jinja template in place of the tokenizer's.
            chat_template_kwargs: variables for the template.
            tools: what the template is to offer the model, as JSON schemas.

        Raises:
            ValueError: a message is wrong, there is none, or the tokenizer has no chat template or
                its template refuses the messages; and see `generate`.
        """
        conversations = conversations_of(messages)
        options = {
            **_template_variables(chat_template_kwargs),
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "chat_template": chat_template,
            "tools": tools,
        }
        prompts = [self.engine.render_chat(one, **options) for one in conversations]
        return self.generate(prompts, sampling_params, use_tqdm, raise_on_error=raise_on_error)

    def stats(self) -> dict[str, Any]:
        """Counts, times and settings of the engine; see `LLMEngine.stats`."""
        return self.engine.stats()


def _as_list(prompts: Any) -> list[Prompt]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not is_token_list(prompts):
        hint = "; use .tolist()" if hasattr(prompts, "tolist") else ""
        raise ValueError(
            f"prompts must be a prompt or a list of them, got {shown(prompts)} of type "
            f"{type(prompts).__name__}{hint}"
        )
    items = list(prompts)
    return [items] if items and all(isinstance(item, int) for item in items) else items


def _params_list(
    params: SamplingParams | Sequence[SamplingParams], count: int
) -> list[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, Sequence):
        raise ValueError(f"sampling_params must be SamplingParams, or a list, got {shown(params)}")
    if len(params) != count:
        raise ValueError(f"{count} prompts need one SamplingParams or {count}, got {len(params)}")
    return list(params)


def _bar_maker(use_tqdm: bool | Callable[..., Any]) -> Callable[..., Any]:
    if isinstance(use_tqdm, bool):
        return partial(tqdm, disable=not use_tqdm)
    if not callable(use_tqdm):
        raise ValueError(
            f"use_tqdm must be True, False or a function such as tqdm, got {shown(use_tqdm)}"
        )
    return use_tqdm


def _template_variables(variables: Any) -> dict[str, Any]:
    if variables is None:
        return {}
    taken = {"conversation", "return_dict", "return_tensors", "tokenize"}
    is_mapping = isinstance(variables, Mapping) and all(isinstance(k, str) for k in variables)
    if not is_mapping or taken & set(variables):
        raise ValueError(
            f"chat_template_kwargs must be a mapping of names, none of {sorted(taken)}, got "
            f"{shown(variables)}"
        )
    return dict(variables)


def _request_error(output: RequestOutput, request_ids: list[str]) -> RequestError:
    place = request_ids.index(output.request_id)
    return RequestError(f"prompts[{place}] failed: {output.error}", output)


def _show(bar: Any, output: RequestOutput) -> None:
    """Count a prompt, and its tokens."""
    bar.num_tokens = getattr(bar, "num_tokens", 0) + sum(len(c.token_ids) for c in output.outputs)
    bar.set_postfix_str(f"{bar.num_tokens} tokens", refresh=False)
    bar.update()
