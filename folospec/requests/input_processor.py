"""Checks a request at admission, before any state changes.

What is wrong is said with the value.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from folospec.config import EngineConfig
from folospec.core.sequence import SequenceGroup
from folospec.requests.output_processor import GroupOutput, SequenceOutput
from folospec.sampling.constraints import check_token_ids
from folospec.sampling.metadata import SamplingMetadata
from folospec.sampling.noise import derived_seed
from folospec.sampling_params import SamplingParams, check_text, is_int, is_token_list, shown
from folospec.spec.proposer import Proposer
from folospec.text.detokenizer import Detokenizer
from folospec.text.stop_strings import StopSearch, StopStrings
from folospec.text.token_decoder import token_decoder

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine found out at start: sizes that requests are checked against."""

    vocab_size: int
    max_model_len: int
    num_slots: int
    """Tokens that the whole KV pool holds."""
    eos_token_ids: frozenset[int]


class InputProcessor:
    """Turns prompts and parameters into requests.

    Raises (from `process`):
        ValueError: the prompt or a parameter cannot be served; the message says which and why.
    """

    def __init__(
        self, config: EngineConfig, limits: Limits, tokenizer: Any, proposer: Proposer
    ) -> None:
        self.config, self.limits, self.tokenizer = config, limits, tokenizer
        self.proposer = proposer

    def check_request_id(self, request_id: Any, in_use: Container[str]) -> None:
        """
        Raises:
            ValueError: it is no text, or it is in use.
        """
        if not isinstance(request_id, str) or not request_id:
            raise ValueError(f"request_id must be a non-empty string, got {shown(request_id)}")
        check_text("request_id", request_id)
        if request_id in in_use:
            raise ValueError(f"request_id {request_id!r} is in use")

    def process(
        self, request_id: str, prompt: Prompt, params: SamplingParams, ordinal: int
    ) -> tuple[SequenceGroup, GroupOutput]:
        """The request, and its empty output."""
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params must be SamplingParams, got {shown(params)}")
        text, token_ids = self._read_prompt(prompt)
        self._check_prompt(token_ids)
        self._check_params(params)
        max_num_tokens = self._max_num_tokens(len(token_ids), params)
        eos_token_ids = frozenset() if params.ignore_eos else self.limits.eos_token_ids
        stop_ids = eos_token_ids.union(params.stop_token_ids)
        group = SequenceGroup(
            request_id,
            token_ids,
            params,
            arrival=ordinal,
            prompt=text,
            seed=self._seed(params, ordinal),
            max_num_tokens=max_num_tokens,
            eos_token_ids=eos_token_ids,
            prediction_token_ids=self._prediction(params),
            sampling=SamplingMetadata(params, self._bad_words(params.bad_words), stop_ids),
        )
        return group, self._output(group)

    def _output(self, group: SequenceGroup) -> GroupOutput:
        params = group.params
        output = SequenceOutput(self._detokenizer(group.prompt_token_ids, params))
        if params.stop_strings:
            output.search = StopSearch(StopStrings(params.stop_strings))
        return GroupOutput(
            {group.sequences[0].seq_id: output},
            prompt_logprobs=None if params.prompt_logprobs is None else [None],
            special_stops=self._special_stops(params),
        )

    def _seed(self, params: SamplingParams, ordinal: int) -> int:
        """The seed of a request's noise.

        A rule that does not share noise wants drafts that know nothing of it, and drafters remember
        other requests. So there two requests with one seed have different noise.
        """
        if params.seed is None:
            return derived_seed(self.config.seed, ordinal)
        if self.proposer.rule.shares_noise:
            return params.seed
        return derived_seed(params.seed, ordinal)

    def _read_prompt(self, prompt: Any) -> tuple[str | None, list[int]]:
        text, token_ids = prompt, None
        if isinstance(prompt, Mapping):
            if not prompt or set(prompt) - {"prompt", "prompt_token_ids"}:
                raise ValueError(
                    "a prompt mapping has 'prompt' or 'prompt_token_ids', got "
                    f"{shown(list(prompt))}"
                )
            text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        elif not isinstance(prompt, str):
            text, token_ids = None, prompt
        if not (text is None or isinstance(text, str)) or (text is None and token_ids is None):
            raise ValueError(f"a prompt must be a text or a list of token ids, got {shown(prompt)}")
        if text is not None:
            check_text("prompt", text)
        if token_ids is not None:
            if not is_token_list(token_ids):
                hint = "; use .tolist()" if hasattr(token_ids, "tolist") else ""
                raise ValueError(
                    f"a prompt must be a text or a list of token ids, got {shown(token_ids)} of "
                    f"type {type(token_ids).__name__}{hint}"
                )
            return text, list(token_ids)
        assert text is not None
        if self.tokenizer is None:
            raise ValueError("a text prompt needs a tokenizer, but skip_tokenizer_init is on")
        return text, self._tokenize("prompt", text)

    def _tokenize(self, what: str, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text, whatever a tokenizer makes of it; the caller checks their range,
        and their number, of which the tokenizer is not to warn."""
        try:
            encoded = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
            return list(encoded["input_ids"])
        except Exception as error:
            raise ValueError(f"the tokenizer cannot read {what} {shown(text)}: {error}") from error

    def _check_prompt(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise ValueError("the prompt is empty; it must have at least one token")
        self._check_token_ids("prompt", token_ids)
        limit = self.limits.max_model_len
        if len(token_ids) >= limit:
            raise ValueError(
                f"the prompt has {len(token_ids)} tokens; with max_model_len={limit} it may have "
                f"at most {limit - 1}"
            )

    def _check_token_ids(self, what: str, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            if not is_int(token_id) or not 0 <= token_id < self.limits.vocab_size:
                raise ValueError(
                    f"{what} token ids must be integers between 0 and "
                    f"{self.limits.vocab_size - 1}, got {shown(token_id)}"
                )

    def _check_params(self, params: SamplingParams) -> None:
        check_token_ids(params, self.limits.vocab_size)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(params, name)
            if value is not None and value > self.limits.vocab_size:
                raise ValueError(
                    f"{name} must be at most the vocabulary size {self.limits.vocab_size}, got "
                    f"{value}"
                )
        if params.num_sequences > self.config.max_num_seqs:
            raise ValueError(
                f"n or best_of must be at most max_num_seqs={self.config.max_num_seqs}, got "
                f"{params.num_sequences}"
            )
        if self.tokenizer is None and (params.stop_strings or params.bad_words):
            raise ValueError(
                f"stop strings and bad_words need a tokenizer, and skip_tokenizer_init is on; "
                f"got stop={params.stop!r}, bad_words={params.bad_words!r}"
            )
        self._check_speculation(params)

    def _check_speculation(self, params: SamplingParams) -> None:
        most = self.proposer.limit
        if (params.num_speculative_tokens or 0) > most:
            raise ValueError(
                f"num_speculative_tokens must be at most the engine's {most}, got "
                f"{params.num_speculative_tokens}"
            )
        names = [drafter.name for drafter in self.proposer.drafters]
        for name in params.drafters or ():
            if name not in names:
                raise ValueError(
                    f"drafters must be among the engine's {names or 'none'}, got {name!r}"
                )
        if params.prediction is not None and not self.proposer.needs.prediction:
            raise ValueError(
                f"a prediction needs a drafter that reads it, and the engine has {names or 'none'}"
            )

    def _prediction(self, params: SamplingParams) -> list[int]:
        if params.prediction is None:
            return []
        if isinstance(params.prediction, str):
            if self.tokenizer is None:
                raise ValueError("a text prediction needs a tokenizer; give token ids instead")
            token_ids = self._tokenize("prediction", params.prediction, add_special_tokens=False)
        else:
            token_ids = list(params.prediction)
        self._check_token_ids("prediction", token_ids)
        return token_ids

    def _max_num_tokens(self, num_prompt_tokens: int, params: SamplingParams) -> int:
        limits = self.limits
        wanted = limits.max_model_len - num_prompt_tokens
        if params.max_tokens is not None:
            wanted = min(wanted, params.max_tokens)
        total = num_prompt_tokens + wanted
        if total > limits.num_slots:
            raise ValueError(
                f"{num_prompt_tokens} prompt tokens and up to {wanted} output tokens do not fit "
                "the KV pool of "
                f"{limits.num_slots} tokens; lower max_tokens or raise num_blocks or "
                "kv_cache_memory"
            )
        budget = self.config.max_num_batched_tokens
        if not self.config.enable_chunked_prefill and total > budget:
            raise ValueError(
                "without chunked prefill, prompt and output must fit "
                f"max_num_batched_tokens={budget}, got {total} tokens"
            )
        return total

    def _bad_words(self, bad_words: Sequence[str]) -> list[list[int]]:
        """Token sequences of each word, at the start of a text and after a space, each once."""
        sequences: dict[tuple[int, ...], None] = {}
        for word in bad_words:
            forms = [
                self._tokenize("bad word", text, add_special_tokens=False)
                for text in (word, " " + word.lstrip())
            ]
            if not any(forms):
                raise ValueError(f"bad_words must be words with tokens, got {shown(word)}")
            for token_ids in forms:
                self._check_token_ids(f"bad word {shown(word)}:", token_ids)
                if token_ids:
                    sequences[tuple(token_ids)] = None
        return [list(token_ids) for token_ids in sequences]

    def _special_stops(self, params: SamplingParams) -> dict[int, str]:
        """The stop strings that are one special token, by its id, where the text has none of it."""
        if not params.stop_strings or not params.skip_special_tokens:
            return {}
        ids = token_decoder(self.tokenizer).special_ids
        found = {ids[stop]: stop for stop in params.stop_strings if stop in ids}
        return {t: stop for t, stop in found.items() if t < self.limits.vocab_size}

    def _detokenizer(self, token_ids: list[int], params: SamplingParams) -> Detokenizer | None:
        if self.tokenizer is None:
            return None
        return Detokenizer(self.tokenizer, token_ids, params.skip_special_tokens)
