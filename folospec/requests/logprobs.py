"""Takes the logprobs of prompt and output tokens from logits that a step computes anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from folospec.core.sequence import Sequence, SequenceGroup
from folospec.core.sequence_step import SequenceStep
from folospec.outputs import Logprob
from folospec.requests.output_processor import OutputProcessor
from folospec.sampling.logprobs import gather_logprobs
from folospec.text.token_decoder import token_decoder


class LogprobsProcessor:
    """Adds logprobs to requests, each with its token's text where there is a tokenizer."""

    def __init__(self, outputs: OutputProcessor, tokenizer: Any) -> None:
        self._outputs = outputs
        self._decoder = token_decoder(tokenizer) if tokenizer is not None else None

    def take_output(self, seq: Sequence, logits: Tensor, token_ids: list[int]) -> None:
        """Add the logprobs of new output tokens; `logits` is [num_tokens, vocab_size], the rows
        they were drawn from."""
        assert seq.group is not None
        output, wanted = self._outputs.of(seq), seq.group.params.logprobs
        entries = gather_logprobs(logits, token_ids, wanted or 0)
        output.cumulative_logprob += sum(
            e[t].logprob for e, t in zip(entries, token_ids, strict=True)
        )
        if wanted is not None:
            output.logprobs.extend(self._with_text(entry) for entry in entries)

    def wants_prompt(self, group: SequenceGroup) -> bool:
        """Whether prompt logprobs were asked for and some are still missing."""
        if group.params.prompt_logprobs is None:
            return False
        taken = self._outputs.of_group(group).prompt_logprobs
        return taken is not None and len(taken) < len(group.prompt_token_ids)

    def take_prompts(
        self,
        steps: Iterable[SequenceStep],
        logits: Tensor,
        fail: Callable[[SequenceGroup, Exception], None],
    ) -> None:
        """Add the logprobs of prompt tokens to the requests that want them; `fail` ends one where
        that goes wrong."""
        for step in steps:
            if step.wants_all_logits:
                rows = step.prompt_logits_indices
                try:
                    self.take_prompt(step.group, step.start, logits[rows.start : rows.stop])
                except Exception as error:
                    fail(step.group, error)

    def take_prompt(self, group: SequenceGroup, start: int, logits: Tensor) -> None:
        """Add the logprobs of prompt tokens; row r of `logits` is that of prompt token start + r,
        and speaks of the next."""
        wanted, taken = group.params.prompt_logprobs, self._outputs.of_group(group).prompt_logprobs
        assert wanted is not None
        assert taken is not None
        # After a preemption the prompt is run again from its start; what was taken is not taken
        # twice.
        begin = len(taken)
        token_ids = group.prompt_token_ids[begin : start + 1 + len(logits)]
        if token_ids:
            rows = logits[begin - 1 - start :][: len(token_ids)]
            entries = gather_logprobs(rows, token_ids, wanted)
            taken.extend(self._with_text(entry) for entry in entries)

    def _with_text(self, entry: dict[int, Logprob]) -> dict[int, Logprob]:
        if self._decoder is None:
            return entry
        text_of = self._decoder.text_of
        return {t: Logprob(p.logprob, p.rank, text_of(t)) for t, p in entry.items()}
