"""Logprobs of prompt and output tokens, from the rows of logits that a step has computed anyway."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from folospec.core.sequence import Sequence
from folospec.engine.request import Request
from folospec.engine.token_decoder import token_decoder
from folospec.outputs import Logprob
from folospec.sampling.logprobs import gather_logprobs


class LogprobsTaker:
    """Adds logprobs to requests, each with its token's text where there is a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._decoder = token_decoder(tokenizer) if tokenizer is not None else None

    def take_output(
        self, request: Request, seq: Sequence, logits: Tensor, token_ids: list[int]
    ) -> None:
        """Add the logprobs of new output tokens; `logits` is [num_tokens, vocab_size], the rows
        they were drawn from."""
        output = request.outputs[seq.seq_id]
        entries = gather_logprobs(logits, token_ids, request.params.logprobs or 0)
        output.cumulative_logprob += sum(
            e[t].logprob for e, t in zip(entries, token_ids, strict=True)
        )
        if request.params.logprobs is not None:
            output.logprobs.extend(self._with_text(entry) for entry in entries)

    def take_prompt(self, request: Request, start: int, logits: Tensor) -> None:
        """Add the logprobs of prompt tokens; row r of `logits` is that of prompt token start + r,
        and speaks of the next."""
        assert request.prompt_logprobs is not None
        assert request.params.prompt_logprobs is not None
        # After a preemption the prompt is run again from its start; what was taken is not taken
        # twice.
        begin = len(request.prompt_logprobs)
        token_ids = request.group.prompt_token_ids[begin : start + 1 + len(logits)]
        if token_ids:
            rows = logits[begin - 1 - start :][: len(token_ids)]
            entries = gather_logprobs(rows, token_ids, request.params.prompt_logprobs)
            request.prompt_logprobs.extend(self._with_text(entry) for entry in entries)

    def _with_text(self, entry: dict[int, Logprob]) -> dict[int, Logprob]:
        if self._decoder is None:
            return entry
        text_of = self._decoder.text_of
        return {t: Logprob(p.logprob, p.rank, text_of(t)) for t, p in entry.items()}
